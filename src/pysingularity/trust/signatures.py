# SPDX-License-Identifier: Apache-2.0
"""Signatures of SIF files: what they cover, who made them, and whether the file is still what was signed.

A signature is an object that is linked to a group of objects. Its text, a clear-signed OpenPGP message, is JSON with a
digest of the header's lasting fields and two for each object: of its descriptor (without place and times) and of its
content. So an image can be moved, and get further objects and signatures, without breaking a signature (format of
Singularity 3.6 and Apptainer; the older texts that begin with SIFHASH cover no descriptors and are not believed).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from pysingularity.errors import HostError, ImageError, UserError
from pysingularity.files import hash_stretch
from pysingularity.sif.file import SifFile
from pysingularity.sif.layout import SIGNATURE, Descriptor
from pysingularity.trust.openpgp import Verifier, split

#: Hashes that a signed text may use.
HASHES = ("sha256", "sha384", "sha512")
#: More than any signed text of a full table has.
_LIMIT = 4 << 20


def keyrings(environ: Mapping[str, str]) -> list[str]:
    """Return the files with the public keys that a user trusts: ours, Apptainer's, and those of the machine."""
    home = environ.get("HOME", "")
    own = [environ.get(f"{name}_KEYSDIR", "") for name in ("SINGULARITY", "APPTAINER")]
    config = environ.get("SINGULARITY_CONFIGDIR") or os.path.join(home, ".singularity")
    folders = [one for one in own if one] or [os.path.join(config, "keys"), os.path.join(home, ".apptainer/keys")]
    machine = [f"/etc/{name}/global-pgp-public" for name in ("singularity", "apptainer")]
    return [*(os.path.join(folder, "pgp-public") for folder in folders), *machine]


def fingerprints(text: str) -> list[str]:
    """Return the fingerprints in a comma-separated list, in upper case and without blanks.

    Raises:
        UserError: one is no fingerprint (40 hexadecimal digits, or 64 of a newer key).
    """
    found = []
    for word in text.split(","):
        one = "".join(word.split()).upper().removeprefix("0X")
        if not one:
            continue
        if len(one) not in (40, 64) or not set(one) <= set("0123456789ABCDEF"):
            raise UserError(
                "bad-fingerprint",
                f"{word.strip()}: is no fingerprint of a key",
                hint="a fingerprint has 40 hexadecimal digits: gpg --fingerprint NAME shows it",
            )
        found.append(one)
    return found


def signed_text(sif: SifFile, objects: Sequence[Descriptor]) -> bytes:
    """Return the text that a signature of some objects of one group signs."""
    first = _first(sif, objects[0].group_number)
    value = {
        "version": 1,
        "header": {"digest": _hash("sha256", sif.header.signed_bytes())},
        "objects": [
            {
                "relativeId": one.id - first,
                "descriptorDigest": _hash("sha256", one.signed_bytes(first)),
                "objectDigest": _content(sif, one, "sha256"),
            }
            for one in objects
        ],
    }
    return json.dumps(value, separators=(",", ":")).encode()


def require(path: str, wanted: Iterable[str], environ: Mapping[str, str], tmp: str) -> None:
    """Make sure that all of a SIF file was signed by each of some keys, and is unchanged since.

    Arguments:
        path: the file.
        wanted: fingerprints of primary keys, as `fingerprints` gives them.
        environ: where the keyrings are (`keyrings`), and PATH.
        tmp: folder for short-lived files.

    Raises:
        ImageError: a key has not signed it, or it was changed.
        HostError: there is no keyring, or nothing that can verify.
    """
    files = keyrings(environ)
    place = files[0]
    missing = f"put the public keys into {place}: gpg --export FINGERPRINT >> {place}"
    verifier = Verifier(files, tmp, environ, missing=missing)
    with SifFile.open(path) as sif:
        reasons: list[str] = []
        #: group → fingerprint of those who have signed all of it.
        signers: dict[int, set[str]] = {}
        for signature in sif.descriptors:
            group = signature.linked_group
            if signature.type != SIGNATURE or not group:
                continue
            try:
                by, covered = _check(sif, signature, group, verifier)
            except HostError:
                raise
            except (ImageError, UserError) as error:
                reasons.append(error.message)
                continue
            if covered >= {one.id for one in sif.descriptors if one.group_number == group}:
                signers.setdefault(group, set()).update(by)
            else:
                reasons.append(f"signature {signature.id} does not cover all objects of group {group}")
        groups = {one.group_number for one in sif.descriptors if one.group_number}
        primary = sif.primary()
        if primary is not None and not primary.group_number:
            raise ImageError(
                "not-signed", f"{path}: its root file system belongs to no group, so that nothing signs it"
            )
        for one in wanted:
            lacking = sorted(group for group in groups if one not in signers.get(group, set()))
            if lacking or not groups:
                why = f": {'; '.join(reasons)}" if reasons else ""
                raise ImageError(
                    "not-signed",
                    f"{path}: has no valid signature by {one}{why}",
                    hint=f"use the image that was signed by it; {missing}" if not reasons else missing,
                )


def _check(sif: SifFile, signature: Descriptor, group: int, verifier: Verifier) -> tuple[list[str], set[int]]:
    """Return who made a signature and the ids of the objects that it covers, all of them unchanged."""
    what = f"signature {signature.id}"
    message = sif.read(signature, _LIMIT)
    if not message.startswith(b"-----BEGIN PGP SIGNED MESSAGE-----"):
        raise ImageError("other-signature", f"{what} is not of OpenPGP")
    text, packets = split(message, what)
    by = verifier.detached(text, packets, what)
    first = _first(sif, group)
    members = {one.id - first: one for one in sif.descriptors if one.group_number == group}
    covered = set()
    try:
        value = json.loads(text)
        if value["version"] != 1:
            raise ValueError
        if value["header"]["digest"] != _hash(_algorithm(value["header"]["digest"]), sif.header.signed_bytes()):
            raise ImageError("changed", f"the header was changed after {what} was made")
        for entry in value["objects"]:
            one = members.get(entry["relativeId"])
            if one is None:
                raise ImageError("changed", f"an object was removed after {what} was made")
            digest = entry["descriptorDigest"]
            if digest != _hash(_algorithm(digest), one.signed_bytes(first)):
                raise ImageError("changed", f"the descriptor of object {one.id} was changed after {what} was made")
            digest = entry["objectDigest"]
            if digest != _content(sif, one, _algorithm(digest)):
                raise ImageError("changed", f"object {one.id} was changed after {what} was made")
            covered.add(one.id)
    except (ValueError, KeyError, TypeError, AttributeError):
        old = " (the way before Singularity 3.6)" if text.startswith(b"SIFHASH:") else ""
        raise ImageError("other-signature", f"{what} signs something else than objects{old}") from None
    return by, covered


def _first(sif: SifFile, group: int) -> int:
    return min((one.id for one in sif.descriptors if one.group_number == group), default=0)


def _algorithm(digest: str) -> str:
    name = digest.partition(":")[0]
    if name not in HASHES:
        raise ValueError(name)
    return name


def _hash(name: str, data: bytes) -> str:
    return f"{name}:{hashlib.new(name, data).hexdigest()}"


def _content(sif: SifFile, one: Descriptor, name: str) -> str:
    """Return the digest of an object's content."""
    return f"{name}:{hash_stretch(sif.fd, one.offset, one.size, name).hex()}"
