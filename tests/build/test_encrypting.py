# SPDX-License-Identifier: Apache-2.0
"""Builds that encrypt, and builds from what is encrypted: nothing stays behind in the clear that was to be secret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pysingularity.image.open import open_image
from pysingularity.trust.encryption import Key

pytestmark = [pytest.mark.rootless]

SECRET = {"SINGULARITY_ENCRYPTION_PASSPHRASE": "a word"}
MARK = "the-mark-that-nobody-may-find"
RECIPE = f"""\
Bootstrap: localimage
From: {{base}}
%post
#step mark
  echo {MARK} > /opt/mark
  env > /opt/env
"""


def build(user, *words, status=0, env=SECRET):
    result = user(["singularity", "build", *map(str, words)], env=env)
    assert result.returncode == status, result.stderr
    return result


def kind(path: Path) -> str:
    with open_image(str(path)) as image:
        return image.filesystem


@pytest.fixture
def locked(as_user, base):
    """The small root file system, encrypted."""
    build(as_user, "--encrypt", "base.sif", base)
    return as_user.tmp / "base.sif"


def kept(folder: Path) -> list[Path]:
    """Return the images in a cache folder."""
    return [path for path in folder.rglob("*.sif") if path.is_file()]


def test_recipe_becomes_an_encrypted_image_and_no_step_is_kept(as_user, base):
    as_user.write("x.def", RECIPE.format(base=base))
    build(as_user, "--encrypt", "x.sif", "x.def")
    assert kind(as_user.tmp / "x.sif") == "gocryptfs"
    assert kept(as_user.tmp / "cache") == []
    # Without encryption the same step is kept.
    build(as_user, "y.sif", "x.def", env={})
    assert kept(as_user.tmp / "cache") != []


def test_key_without_encrypt_is_told_and_encrypts_nothing(as_user, base):
    said = build(as_user, "x.sif", base).stderr
    assert "NOT encrypted" in said
    assert kind(as_user.tmp / "x.sif") == "squashfs"


def test_encrypted_image_is_a_base_for_those_with_the_key(as_user, locked):
    as_user.write("x.def", RECIPE.format(base="base.sif"))
    build(as_user, "--sandbox", "box", "x.def")
    assert (as_user.tmp / "box/opt/mark").read_text() == MARK + "\n"
    assert "a word" not in (as_user.tmp / "box/opt/env").read_text()
    assert kept(as_user.tmp / "cache") == []
    said = build(as_user, "--sandbox", "box2", "x.def", env={}, status=255).stderr
    assert "no key was given" in said
    assert not (as_user.tmp / "box2").exists()


def test_files_are_added_to_an_encrypted_image_without_unpacking_it(as_user, locked):
    as_user.write("note", MARK)
    as_user.write("x.def", "Bootstrap: localimage\nFrom: base.sif\n%files\n  note /opt/note\n")
    build(as_user, "--encrypt", "x.sif", "x.def")
    with open_image(str(as_user.tmp / "x.sif")) as image:
        image.unlock(Key(passphrase=b"a word"))
        from pysingularity.image.inside import source_of

        assert source_of(image).read("opt/note") == MARK.encode()
    assert MARK.encode() not in (as_user.tmp / "x.sif").read_bytes()


def test_sandbox_of_an_encrypted_image_is_the_tree_it_was_made_of(as_user, base, locked):
    build(as_user, "--sandbox", "box", locked)
    result = subprocess.run(["diff", "-r", base / "bin", as_user.tmp / "box/bin"], capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


def test_encrypted_image_gets_another_key_or_none(as_user, locked, tool):
    openssl = tool("openssl")
    as_user([openssl, "genrsa", "-out", "key.pem", "2048"], check=True)
    as_user([openssl, "rsa", "-in", "key.pem", "-pubout", "-out", "public.pem"], check=True)
    build(as_user, "plain.sif", locked)
    build(as_user, "--pem-path", "public.pem", "rsa.sif", "plain.sif", env={})
    build(as_user, "--pem-path", "key.pem", "--sandbox", "box", "rsa.sif", env={})
    assert (as_user.tmp / "box/bin/sh").exists()
    said = build(as_user, "--sandbox", "box2", "rsa.sif", status=255).stderr
    assert "cannot be decrypted with this passphrase" in said


def test_wrong_key_leaves_nothing_behind(as_user, locked):
    before = sorted(os.listdir(as_user.tmp))
    build(as_user, "--sandbox", "box", locked, env={"SINGULARITY_ENCRYPTION_PASSPHRASE": "no"}, status=255)
    assert sorted(os.listdir(as_user.tmp)) == before


def test_same_passphrase_gives_different_bytes_every_time(as_user, base, locked):
    build(as_user, "--encrypt", "again.sif", base)
    assert (as_user.tmp / "again.sif").read_bytes() != locked.read_bytes()


@pytest.mark.peer
def test_outer_file_system_is_one_that_others_read(as_user, locked, tool):
    with open_image(str(locked)) as image:
        offset = image.offset
    result = as_user([tool("unsquashfs"), "-d", "outer", "-o", str(offset), locked], check=True)
    assert "squashfs-image" in os.listdir(as_user.tmp / "outer"), result.stdout
    program = tool("gocryptfs")
    checked = as_user([program, "-fsck", "outer"], input="a word\n")
    assert checked.returncode == 0, checked.stdout + checked.stderr
