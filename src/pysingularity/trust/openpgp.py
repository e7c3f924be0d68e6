# SPDX-License-Identifier: Apache-2.0
"""OpenPGP signatures: asked from gpgv, sqv or pysequoia, whichever is there first.

The verifier gets exactly the keys that may speak in a matter (for a mirror, for an image), and what counts afterwards
is the text that it says was signed, never the file around it: bytes before or behind a signed text are an old way to
smuggle.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from pysingularity.errors import HostError, UserError

_START, _MIDDLE, _END = (
    b"-----BEGIN PGP SIGNED MESSAGE-----",
    b"-----BEGIN PGP SIGNATURE-----",
    b"-----END PGP SIGNATURE-----",
)
_ARMOUR = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)


def armoured_keys(text: bytes) -> bytes:
    """Return the binary keys in armoured text (RFC 9580 section 6); binary keys are returned as they are.

    Raises:
        UserError: the armour is damaged.
    """
    blocks = _ARMOUR.findall(text)
    if not blocks:
        return text
    keys = b""
    for block in blocks:
        lines = [line.strip() for line in block.split(b"\n")]
        if b"" in lines:  # headers end with an empty line
            lines = lines[lines.index(b"") + 1 :]
        try:
            keys += base64.b64decode(b"".join(line for line in lines if line[:1] != b"="), validate=True)
        except ValueError:
            raise UserError("bad-keyring", "a block of public keys is damaged") from None
    return keys


def split(message: bytes, what: str) -> tuple[bytes, bytes]:
    """Return signed text and signature of a clear-signed message that has nothing around them (RFC 9580 section 7).

    Raises:
        UserError: it is no such message, or there is something before, behind or twice.
    """
    lines = message.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    bare = [line.rstrip() for line in lines]
    if bare[0] != _START or bare[-1] != _END or any(bare.count(mark) != 1 for mark in (_START, _MIDDLE, _END)):
        raise UserError("bad-signature", f"{what} is not one signed text with nothing around it")
    middle = bare.index(_MIDDLE)
    try:
        begin = bare.index(b"", 0, middle) + 1
    except ValueError:
        raise UserError("bad-signature", f"{what}: the signed text has no beginning") from None
    if any(not line.startswith(b"Hash:") for line in bare[1 : begin - 1]):
        raise UserError("bad-signature", f"{what}: unknown header before the signed text")
    # The signature covers lines without trailing blanks and without the last line break; signers escape leading dashes.
    text = [line.rstrip(b" \t\r") for line in lines[begin:middle]]
    text = [line.removeprefix(b"- ") for line in text]
    return b"\n".join(text), b"\n".join(lines[middle:]) + b"\n"


class Verifier:
    """Checks signatures with some keyrings.

    Arguments:
        keyrings: files with public keys, binary or armoured.
        tmp: folder for short-lived files.
        environ: where PATH is looked up.
        missing: what to do about missing keys, and instead: hint of the errors.
        otherwise: what to do without a program that verifies.

    Raises (from `inline` and `detached`):
        HostError: there are no keys, or nothing that can verify.
        UserError: the signature is bad, or by nobody we know.
    """

    def __init__(
        self,
        keyrings: Sequence[str],
        tmp: str,
        environ: Mapping[str, str] | None = None,
        *,
        missing: str = "",
        otherwise: str = "",
    ) -> None:
        self.keyrings = [path for path in keyrings if os.path.isfile(path)]
        self.tmp, self.missing, self.otherwise = tmp, missing, otherwise
        self._path = (environ or {}).get("PATH") or os.environ.get("PATH") or "/usr/bin:/bin"

    def inline(self, message: bytes, what: str) -> bytes:
        """Return the signed text of a clear-signed message."""
        text, signature = split(message, what)
        self.detached(text, signature, what)
        return text

    def detached(self, text: bytes, signature: bytes, what: str) -> list[str]:
        """Check a signature that stands beside its text; return the fingerprints of the keys that made it.

        These are the primary keys' fingerprints in upper-case hexadecimal digits.
        """
        if not self.keyrings:
            raise HostError("no-keyring", f"{what}: there is no keyring to check its signature with", hint=self.missing)
        program = shutil.which("gpgv", path=self._path) or shutil.which("sqv", path=self._path)
        folder = os.path.join(self.tmp, f"verify.{os.getpid()}")
        os.mkdir(folder, 0o700)
        try:
            if program is None:
                return self._sequoia(text, signature, what)
            files = []
            for name, data in (("text", text), ("signature", signature), ("keys.gpg", self._keys())):
                files.append(os.path.join(folder, name))
                with open(files[-1], "wb") as file:
                    file.write(data)
            if program.endswith("gpgv"):
                return self._gpgv(program, folder, files, what)
            return self._sqv(program, files, what)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _keys(self) -> bytes:
        keys = b""
        for path in self.keyrings:
            with open(path, "rb") as file:
                keys += armoured_keys(file.read(64 << 20))
        return keys

    def _gpgv(self, program: str, folder: str, files: list[str], what: str) -> list[str]:
        text, signature, keys = files
        argv = [program, "--homedir", folder, "--status-fd", "1", "--keyring", keys, signature, text]
        lines = _run(argv).stdout.decode("utf-8", "replace").splitlines()
        words = [line.split() for line in lines if line.startswith("[GNUPG:] ")]
        # Archives sign with the keys of several releases; one known key is enough, one wrong signature too much.
        states = {word[1]: word[2:] for word in words if len(word) > 1}
        if "BADSIG" in states:
            raise UserError("bad-signature", f"{what}: its signature is wrong; it was changed after it was signed")
        if "GOODSIG" in states and "VALIDSIG" in states:
            # The last word of VALIDSIG is the primary key's fingerprint (GnuPG, doc/DETAILS).
            return [word[-1].upper() for word in words if word[1] == "VALIDSIG"]
        for state, why in (("EXPKEYSIG", "its key has expired"), ("REVKEYSIG", "its key is revoked")):
            if state in states:
                raise UserError("bad-signature", f"{what}: {why} ({' '.join(states[state][1:])})")
        unknown = [word[2] for word in words if word[1] == "NO_PUBKEY"]
        raise self._nobody(what, unknown)

    def _sqv(self, program: str, files: list[str], what: str) -> list[str]:
        text, signature, keys = files
        done = _run([program, "--keyring", keys, signature, text])
        if done.returncode:
            message = " ".join(done.stderr.decode("utf-8", "replace").split())
            raise UserError("bad-signature", f"{what}: {os.path.basename(program)} does not accept it: {message}")
        return done.stdout.decode("ascii", "replace").upper().split()

    def _sequoia(self, text: bytes, signature: bytes, what: str) -> list[str]:
        try:
            import pysequoia  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise HostError(
                "no-verifier",
                f"{what}: nothing on this host can check its signature",
                hint="install gpgv or sqv, or pip install pysequoia" + self.otherwise,
            ) from None
        known = pysequoia.Cert.split_bytes(self._keys())
        why, by = "", []
        for packet in _packets(signature):
            try:
                result = pysequoia.verify(bytes=text, signature=pysequoia.Sig.from_bytes(packet), store=lambda _: known)
            except Exception as error:  # the extension raises nothing more special
                why = why or str(error).partition("\n")[0]
                continue
            by += [one.certificate.upper() for one in result.valid_sigs]
        if by:
            return by
        raise UserError("bad-signature", f"{what}: pysequoia does not accept it: {why or 'no signature'}")

    def _nobody(self, what: str, keys: list[str]) -> UserError:
        by = f" (signed by {', '.join(dict.fromkeys(keys))})" if keys else ""
        return UserError(
            "unknown-signer",
            f"{what}: not signed by a key of {', '.join(self.keyrings)}{by}",
            hint=self.missing,
        )


def _packets(signature: bytes) -> list[bytes]:
    """Cut an armoured or binary signature into its packets: one for each key (RFC 9580 section 4.2)."""
    if signature.lstrip().startswith(b"-----BEGIN"):
        lines = signature.replace(b"\r", b"").strip().split(b"\n")[1:-1]
        lines = lines[lines.index(b"") + 1 :] if b"" in lines else lines
        try:
            signature = base64.b64decode(b"".join(line for line in lines if line[:1] != b"="), validate=True)
        except ValueError:
            return []
    found, at = [], 0
    while at + 2 < len(signature):
        tag, first = signature[at], signature[at + 1]
        if tag & 0x40:
            if first < 192:
                head, length = 2, first
            elif first < 224:
                head, length = 3, (first - 192 << 8) + signature[at + 2] + 192
            else:
                head, length = 6, int.from_bytes(signature[at + 2 : at + 6], "big")
        else:
            head = 1 + (1 << (tag & 3))
            length = int.from_bytes(signature[at + 1 : at + head], "big")
        found.append(signature[at : at + head + length])
        at += head + length
    return found


def _run(argv: list[str]) -> subprocess.CompletedProcess[bytes]:
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}
    try:
        return subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError("no-verifier", f"{argv[0]} does not run: {error}") from None
