# SPDX-License-Identifier: Apache-2.0
"""Signed SIF files: believed when all of the image was signed by the keys that are asked for, and is unchanged."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import HostError, ImageError, SingularityError, UserError
from pysingularity.sif.file import SifFile, SifObject, create, random_identity
from pysingularity.sif.layout import DEFINITION, GROUP_MASK, JSON, PARTITION, PRIMARY, SIGNATURE, SQUASHFS
from pysingularity.trust.signatures import fingerprints, keyrings, require, signed_text

PARTITION_EXTRA = SQUASHFS.to_bytes(4, "little") + PRIMARY.to_bytes(4, "little") + b"02\0"


@pytest.fixture
def world(tmp_path, keys):
    """An unsigned image, and the home of somebody who knows the first key."""

    class World:
        path = str(tmp_path / "image.sif")
        keyring = tmp_path / ".singularity/keys/pgp-public"

        def __init__(self):
            self.environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

        def sign(self, key, *, group=1, text=None):
            with SifFile.open(self.path, writable=True) as sif:
                members = [one for one in sif.descriptors if one.group_number == group]
                message = key.clear(text if text is not None else signed_text(sif, members))
                extra = (1).to_bytes(4, "little") + bytes.fromhex(key.fingerprint)
                sif.add(SifObject(SIGNATURE, message, group=0, link=GROUP_MASK | group, extra=extra))

        def require(self, *wanted):
            require(self.path, wanted or [keys[0].fingerprint], self.environ, str(tmp_path))

        def refused(self, *wanted):
            with pytest.raises(ImageError) as caught:
                self.require(*wanted)
            return str(caught.value)

        def change(self, number, change):
            """Change the slot of an object."""
            with SifFile.open(self.path, writable=True) as sif:
                one = sif.get(number)
                at = sif.header.table_offset + sif.descriptors.index(one) * 585
                change(one)
                os.pwrite(sif.fd, one.pack(), at)

    made = World()
    made.keyring.parent.mkdir(parents=True)
    shutil.copy(keys[0].public, made.keyring)
    with open(made.path, "w+b") as file:
        objects = [
            SifObject(DEFINITION, b"Bootstrap: scratch\n"),
            SifObject(PARTITION, b"hsqs" + bytes(9000), name="root", extra=PARTITION_EXTRA),
        ]
        create(file.fileno(), objects, identity=random_identity(), when=1000)
    return made


def test_image_that_is_signed_by_the_key_is_accepted(world, keys):
    world.sign(keys[0])
    world.require()


def test_signatures_of_strangers_neither_help_nor_harm(world, keys):
    world.sign(keys[1])
    assert "has no valid signature by" in world.refused()
    world.sign(keys[0])
    world.require()
    assert keys[1].fingerprint in world.refused(keys[0].fingerprint, keys[1].fingerprint)


def test_all_of_several_keys_have_to_sign(world, keys):
    world.keyring.write_bytes(keys[0].public.read_bytes() + keys[1].public.read_bytes())
    both = [key.fingerprint for key in keys]
    world.sign(keys[0])
    assert both[1] in world.refused(*both)
    world.sign(keys[1])
    world.require(*both)


def test_unsigned_image_is_refused_with_a_hint(world, keys):
    text = world.refused()
    assert keys[0].fingerprint in text
    assert "gpg --export" in text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda world: world.change(2, lambda one: setattr(one, "name", b"other")), "descriptor of object 2"),
        (lambda world: world.change(2, lambda one: setattr(one, "uid", 5)), "descriptor of object 2"),
        (lambda world: world.change(2, lambda one: setattr(one, "group", GROUP_MASK | 2)), "was removed"),
    ],
)
def test_changed_descriptor_is_noticed(world, keys, change, why):
    world.sign(keys[0])
    change(world)
    assert why in world.refused()


@pytest.mark.parametrize(("number", "at"), [(1, 3), (2, 0), (2, 9003)])
def test_changed_content_is_noticed(world, keys, number, at):
    world.sign(keys[0])
    with SifFile.open(world.path, writable=True) as sif:
        os.pwrite(sif.fd, b"X", sif.get(number).offset + at)
    assert f"object {number} was changed" in world.refused()


def test_changed_header_is_noticed(world, keys):
    world.sign(keys[0])
    with open(world.path, "r+b") as file:
        file.write(b"#!/usr/bin/env rm -rf\n")
    assert "header was changed" in world.refused()


def test_object_that_came_into_the_group_later_breaks_the_signature(world, keys):
    world.sign(keys[0])
    with SifFile.open(world.path, writable=True) as sif:
        sif.add(SifObject(JSON, b"{}", name="oci-config.json"))
    assert "does not cover all objects of group 1" in world.refused()


def test_every_group_has_to_be_signed(world, keys):
    world.sign(keys[0])
    with SifFile.open(world.path, writable=True) as sif:
        sif.add(SifObject(JSON, b"{}", group=2))
    world.refused()
    world.sign(keys[0], group=2)
    world.require()


def test_root_file_system_outside_of_groups_is_never_signed(world, keys):
    world.change(2, lambda one: setattr(one, "group", GROUP_MASK))
    world.sign(keys[0])
    assert "belongs to no group" in world.refused()


def test_objects_may_move_and_times_change(world, keys):
    world.sign(keys[0])
    world.change(2, lambda one: setattr(one, "modified", 5))
    world.require()


@pytest.mark.parametrize(
    "text", [b"SIFHASH:\n00", b"", b"[]", b"{}", b'{"version":1,"header":{"digest":"md5:00"},"objects":[]}', b"\xff"]
)
def test_other_texts_are_no_signature_of_an_image(world, keys, text):
    world.sign(keys[0], text=text + b"\n")
    assert "signs something else" in world.refused()


@pytest.mark.parametrize("message", [b"", b'{"payloadType":"x"}', b"-----BEGIN PGP SIGNED MESSAGE-----\n"])
def test_damaged_signature_is_refused(world, message):
    with SifFile.open(world.path, writable=True) as sif:
        sif.add(SifObject(SIGNATURE, message, group=0, link=GROUP_MASK | 1, extra=(1).to_bytes(4, "little")))
    world.refused()


def test_without_a_keyring_the_hint_says_where_it_goes(world, keys):
    world.sign(keys[0])
    world.keyring.unlink()
    with pytest.raises(HostError) as caught:
        world.require()
    assert str(world.keyring) in caught.value.hint


def test_keyrings_of_both_programs_are_read():
    found = keyrings({"HOME": "/h"})
    assert found[:2] == ["/h/.singularity/keys/pgp-public", "/h/.apptainer/keys/pgp-public"]
    assert keyrings({"HOME": "/h", "APPTAINER_KEYSDIR": "/k"})[0] == "/k/pgp-public"


def test_fingerprints_are_read_as_people_write_them():
    one = "5B0D 1E2A 77F0 9A6C 1D3E  4F5A 6B7C 8D9E 0F1A 2B3C"
    assert fingerprints(f"{one}, 0x{'ab' * 20} ,") == [one.replace(" ", ""), "AB" * 20]
    for text in ("8D9E0F1A2B3C", "x" * 40, f"{one} {one}"):
        with pytest.raises(UserError):
            fingerprints(text)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["version", "header", "digest", "objects", "relativeId"]), inner)
        ),
    )
)
def test_no_signed_text_brings_more_than_an_error(tmp_path_factory, value):
    """What a known key signed may still be nonsense."""
    from pysingularity.trust import signatures

    class Anybody:
        def detached(self, text, signature, what):
            return ["A" * 40]

    path = tmp_path_factory.getbasetemp() / "nonsense.sif"
    text = json.dumps(value)
    message = (
        f"-----BEGIN PGP SIGNED MESSAGE-----\n\n{text}\n-----BEGIN PGP SIGNATURE-----\n-----END PGP SIGNATURE-----\n"
    )
    with open(path, "w+b") as file:
        objects = [
            SifObject(DEFINITION, b"x"),
            SifObject(SIGNATURE, message.encode(), group=0, link=GROUP_MASK | 1),
        ]
        create(file.fileno(), objects, identity=bytes(16))
    with SifFile.open(str(path)) as sif, pytest.raises(SingularityError):
        signatures._check(sif, sif.get(2), 1, Anybody())


# --- in recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(as_user, sing, box, keys):
    """An image that is signed by a known key, and the user who knows it."""
    path = as_user.tmp / "base.sif"
    assert sing("build", path, box).returncode == 0
    with SifFile.open(str(path), writable=True) as sif:
        message = keys[0].clear(signed_text(sif, [one for one in sif.descriptors if one.group_number == 1]))
        sif.add(SifObject(SIGNATURE, message, group=0, link=GROUP_MASK | 1, extra=(1).to_bytes(4, "little")))
    keyring = as_user.tmp / "keys/pgp-public"
    keyring.parent.mkdir()
    shutil.copy(keys[0].public, keyring)
    as_user.environ["SINGULARITY_KEYSDIR"] = str(keyring.parent)
    return path


def build(as_user, sing, base, text):
    recipe = as_user.tmp / "recipe.def"
    recipe.write_text(f"Bootstrap: localimage\nFrom: {base}\nFingerprints: {text}\n\n%post\n    true\n")
    return sing("build", "--force", as_user.tmp / "new.sif", recipe)


@pytest.mark.rootless
def test_recipe_starts_from_a_base_that_the_named_keys_signed(as_user, sing, base, keys):
    assert build(as_user, sing, base, keys[0].fingerprint).returncode == 0


@pytest.mark.rootless
def test_recipe_refuses_a_base_that_another_key_signed(as_user, sing, base, keys):
    result = build(as_user, sing, base, f"{keys[0].fingerprint}, {keys[1].fingerprint}")
    assert result.returncode == 255
    assert f"has no valid signature by {keys[1].fingerprint}" in result.stderr
    assert not (as_user.tmp / "new.sif").exists()


@pytest.mark.rootless
def test_recipe_without_post_is_no_way_around(as_user, sing, base, keys):
    """Such an image takes over the blocks of its base, without unpacking it."""
    recipe = as_user.tmp / "recipe.def"
    recipe.write_text(f"Bootstrap: localimage\nFrom: {base}\nFingerprints: {keys[1].fingerprint}\n%labels\n    A b\n")
    result = sing("build", as_user.tmp / "new.sif", recipe)
    assert result.returncode == 255
    assert f"has no valid signature by {keys[1].fingerprint}" in result.stderr


@pytest.mark.rootless
def test_recipe_refuses_a_base_that_was_changed(as_user, sing, base, keys):
    with SifFile.open(str(base)) as sif:
        at = sif.primary().offset + 200
    data = bytearray(base.read_bytes())
    data[at] ^= 1
    base.write_bytes(data)
    result = build(as_user, sing, base, keys[0].fingerprint)
    assert result.returncode == 255
    assert "was changed after signature" in result.stderr


@pytest.mark.rootless
def test_fingerprints_of_what_carries_none_are_refused(as_user, sing, box, keys):
    assert "box carries no signatures" in build(as_user, sing, box, keys[0].fingerprint).stderr
    recipe = as_user.tmp / "recipe.def"
    recipe.write_text(f"Bootstrap: docker\nFrom: debian:12\nFingerprints: {keys[0].fingerprint}\n")
    result = sing("build", as_user.tmp / "new.sif", recipe)
    assert result.returncode == 255
    assert "an image of docker carries no signatures" in result.stderr


@pytest.fixture
def shared():
    """A folder that Apptainer sees, with room for keys."""
    folder = Path(tempfile.mkdtemp(prefix="pysingularity-peer-", dir="/tmp"))
    (folder / "keys").mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.peer
def test_signature_of_the_real_apptainer_is_believed(world, apptainer, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("APPTAINER_KEYSDIR", str(shared / "keys"))
    words = ["--name", "x", "--email", "x@example.org", "--comment", "c", "--password", "", "--push=false"]
    assert apptainer("key", "newpair", *words).returncode == 0
    image = shutil.copy(world.path, shared / "image.sif")
    assert apptainer("sign", image).returncode == 0
    with SifFile.open(image) as sif:
        (fingerprint,) = (one.extra[4:24].hex().upper() for one in sif.descriptors if one.type == SIGNATURE)
    environ = {"APPTAINER_KEYSDIR": str(shared / "keys"), "PATH": os.environ["PATH"], "HOME": "/nowhere"}
    require(image, [fingerprint], environ, str(tmp_path))
    with SifFile.open(image, writable=True) as sif:
        os.pwrite(sif.fd, b"X", sif.primary().offset + 5000)
    with pytest.raises(ImageError, match="object 2 was changed"):
        require(image, [fingerprint], environ, str(tmp_path))


@pytest.mark.peer
def test_text_that_we_would_sign_is_what_the_real_apptainer_checks(world, keys, apptainer, shared, monkeypatch):
    monkeypatch.setenv("APPTAINER_KEYSDIR", str(shared / "keys"))
    world.sign(keys[0])
    image = shutil.copy(world.path, shared / "image.sif")
    (shared / "key.asc").write_bytes(keys[0].gpg("--armor", "--export"))
    assert apptainer("key", "import", shared / "key.asc").returncode == 0
    result = apptainer("verify", "--local", image)
    assert result.returncode == 0, result.stderr
    assert keys[0].fingerprint in (result.stdout + result.stderr).upper()
