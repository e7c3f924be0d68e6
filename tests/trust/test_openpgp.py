# SPDX-License-Identifier: Apache-2.0
"""OpenPGP signatures through each program that verifies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pysingularity.errors import HostError, UserError
from pysingularity.trust.openpgp import Verifier, armoured_keys, split

TEXT = b"Suite: toy\n- dashes\n-----nearly\ntrailing  \n"


@pytest.fixture(params=["gpgv", "sqv", "pysequoia"])
def environ(request: pytest.FixtureRequest, tmp_path: Path, tool) -> dict[str, str]:
    """A PATH on which only one verifier is found."""
    (tmp_path / "bin").mkdir()
    if request.param == "pysequoia":
        pytest.importorskip("pysequoia", reason="needs the Python package pysequoia")
    else:
        os.symlink(tool(request.param), tmp_path / "bin" / request.param)
    return {"PATH": str(tmp_path / "bin")}


def test_a_right_signature_gives_the_signed_text(keys, tmp_path: Path, environ: dict[str, str]) -> None:
    verifier = Verifier([str(keys[0].public)], str(tmp_path), environ)
    assert verifier.inline(keys[0].clear(TEXT), "it") == b"Suite: toy\n- dashes\n-----nearly\ntrailing"
    assert verifier.detached(TEXT, keys[0].detached(TEXT), "it") == [keys[0].fingerprint]


def test_changed_text_and_strangers_are_refused(keys, tmp_path: Path, environ: dict[str, str]) -> None:
    verifier = Verifier([str(keys[0].public)], str(tmp_path), environ)
    for message in (keys[0].clear(TEXT).replace(b"toy", b"top"), keys[1].clear(TEXT)):
        with pytest.raises(UserError) as caught:
            verifier.inline(message, "it")
        assert caught.value.id in ("bad-signature", "unknown-signer")
    with pytest.raises(UserError):
        verifier.detached(TEXT + b"more", keys[0].detached(TEXT), "it")
    assert [name for name in os.listdir(tmp_path) if name.startswith("verify")] == []


@pytest.mark.parametrize("where", ["before", "behind", "twice", "header"])
def test_nothing_may_stand_around_a_signed_text(keys, tmp_path: Path, where: str) -> None:
    message = keys[0].clear(TEXT)
    message = {
        "before": b"Suite: evil\n" + message,
        "behind": message + b"Suite: evil\n",
        "twice": message + message,
        "header": message.replace(b"Hash: ", b"NotDashEscaped: x\nHash: "),
    }[where]
    with pytest.raises(UserError, match=r"nothing around it|unknown header"):
        Verifier([str(keys[0].public)], str(tmp_path)).inline(message, "it")


def test_armoured_keyrings_are_as_good(keys, tmp_path: Path) -> None:
    armoured = keys[0].gpg("--armor", "--export")
    assert armoured_keys(armoured) == keys[0].public.read_bytes()
    assert armoured_keys(b"\x99binary") == b"\x99binary"
    (tmp_path / "k.asc").write_bytes(armoured)
    Verifier([str(tmp_path / "k.asc")], str(tmp_path)).inline(keys[0].clear(TEXT), "it")
    with pytest.raises(UserError, match="damaged"):
        armoured_keys(armoured.replace(b"m", b"!"))


def test_without_keys_or_a_verifier_the_hint_says_what_to_do(keys, tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        Verifier([str(tmp_path / "none")], str(tmp_path), missing="get one").inline(keys[0].clear(TEXT), "it")
    assert caught.value.hint == "get one"


def test_split_undoes_what_signing_did() -> None:
    with pytest.raises(UserError):
        split(b"Suite: x\n", "it")
    with pytest.raises(UserError):
        split(b"-----BEGIN PGP SIGNED MESSAGE-----\n-----BEGIN PGP SIGNATURE-----\n-----END PGP SIGNATURE-----\n", "it")
