# SPDX-License-Identifier: Apache-2.0
"""LUKS2 volumes of cryptsetup read as what it encrypted; a hostile header is refused before anything is spent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.image.open import open_image
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.writer import SquashfsWriter
from pysingularity.trust.encryption import Key
from pysingularity.trust.gocryptfs import WrongKeyError
from pysingularity.trust.luks import CHECKSUM, UnreadableError, Volume, merge, open_volume

pytestmark = pytest.mark.peer

SECRET = b"open\nsesame"
ROOM = 32 << 20
DATA = random.Random(5).randbytes(300_000 // 4096 * 4096)


def encrypted(path: Path, *options: str, data: bytes = DATA) -> Path:
    """Let cryptsetup encrypt bytes in place; it does so in user space, without the device mapper."""
    program = shutil.which("cryptsetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        pytest.skip("needs the program cryptsetup")
    path.write_bytes(data + bytes(ROOM))
    words = f"{program} reencrypt --encrypt --batch-mode --type luks2 --key-file - --reduce-device-size 32M".split()
    words += ["--pbkdf-force-iterations", "4", *options, str(path)]
    result = subprocess.run(
        words,
        input=SECRET,
        capture_output=True,
        check=False,
    )
    if result.returncode:
        pytest.skip(f"cryptsetup cannot encrypt here: {result.stderr.decode()[:200]}")
    return path


ARGON = ("--pbkdf-memory", "1024", "--pbkdf-parallel", "1")


@pytest.fixture(scope="module")
def volume(tmp_path_factory) -> Path:
    return encrypted(tmp_path_factory.mktemp("luks") / "volume", *ARGON)


def opened(path: Path, password: bytes = SECRET) -> Volume:
    fd = os.open(path, os.O_RDONLY)
    return open_volume(fd, 0, os.fstat(fd).st_size, password, "volume")


@pytest.fixture(scope="module")
def plain(volume) -> Iterator[Volume]:
    found = opened(volume)
    yield found
    os.close(found.fd)


@pytest.mark.parametrize(
    "options",
    [
        ARGON,
        (*ARGON, "--sector-size", "4096"),
        (*ARGON, "--pbkdf", "argon2i", "--sector-size", "2048"),
        ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512", "--key-size", "256"),
        ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha1"),
    ],
)
def test_forms_that_cryptsetup_makes_are_read(tmp_path, options):
    found = opened(encrypted(tmp_path / "volume", *options))
    assert found.pread(len(DATA), 0) == DATA
    os.close(found.fd)


@given(position=st.integers(0, len(DATA)), size=st.integers(0, 20000))
def test_any_stretch_reads_as_it_was_written(plain, position, size):
    size = min(size, len(DATA) - position)
    assert plain.pread(size, position) == DATA[position : position + size]


def test_reading_ends_where_the_volume_does(plain):
    assert plain.pread(100, plain.size) == b""
    assert len(plain.pread(5000, plain.size - 100)) == 100


def test_another_passphrase_opens_nothing(volume):
    for password in (b"open", SECRET + b"\n", b""):
        with pytest.raises(WrongKeyError):
            opened(volume, password)


def test_stripes_of_zeros_give_the_key_that_the_specification_gives():
    # XOR of zeros is zeros; after one diffusion it is the hash of a counter and zeros.
    block = hashlib.sha256(bytes(4) + bytes(32)).digest()
    assert merge(bytes(64), 32, "sha256") == block


def changed(volume: Path, path: Path, change) -> Path:
    """Return a copy of a volume whose JSON text was changed, with the right checksum."""
    data = bytearray(volume.read_bytes())
    length = int.from_bytes(data[8:16], "big")
    value = json.loads(bytes(data[4096:length]).partition(b"\0")[0])
    value = change(value) or value
    data[4096:length] = json.dumps(value).encode().ljust(length - 4096, b"\0")
    data[CHECKSUM : CHECKSUM + 64] = bytes(64)
    data[CHECKSUM : CHECKSUM + 32] = hashlib.sha256(data[:length]).digest()
    path.write_bytes(data)
    return path


def put(*way: str, value: object):
    def change(document):
        *folders, last = way
        for name in folders:
            document = document[name]
        document[last] = value

    return change


SLOT, KDF = ("keyslots", "0"), ("keyslots", "0", "kdf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(*KDF, "memory", value=1 << 40), "out of all bounds"),
        (put(*KDF, "time", value=1 << 40), "out of all bounds"),
        (put(*KDF, "time", value=1 << 20), "out of all bounds"),
        (put(*KDF, "cpus", value=100000), "out of all bounds"),
        (put(*KDF, "type", value="rot13"), "rot13"),
        (put(*KDF, "salt", value=17), "damaged"),
        (put(*SLOT, "key_size", value=1 << 30), "out of all bounds"),
        (put(*SLOT, "key_size", value=-1), "out of all bounds"),
        (put(*SLOT, "af", "stripes", value=1 << 30), "another way"),
        (put(*SLOT, "area", "offset", value=str(1 << 60)), "outside"),
        (put(*SLOT, "area", "encryption", value="aes-cbc-essiv"), "another way"),
        (put(*SLOT, "area", "offset", value="x" * 10000), "damaged"),
        (put("digests", "0", "iterations", value=1 << 40), "out of all bounds"),
        (put("digests", "0", "hash", value="md5"), "md5"),
        (put("digests", value={}), "damaged"),
        (put("segments", value={}), "0 segments"),
        (put("segments", "0", "offset", value="999999999999"), "outside"),
        (put("segments", "0", "offset", value="-512"), "outside"),
        (put("segments", "0", "size", value=str(1 << 60)), "outside"),
        (put("segments", "0", "iv_tweak", value=str(1 << 70)), "outside"),
        (put("segments", "0", "sector_size", value=3), "another way"),
        (put("segments", "0", "encryption", value="aes-xts-random"), "another way"),
        (put("config", "requirements", value={"mandatory": ["offline-reencrypt"]}), "half encrypted"),
        (put("keyslots", value=[1, 2]), "damaged"),
        (put("config", value=None), "damaged"),
        (lambda document: [1], "damaged"),
    ],
)
def test_hostile_header_is_refused(volume, tmp_path, change, said):
    with pytest.raises(UnreadableError, match=said):
        opened(changed(volume, tmp_path / "bad", change))


@pytest.mark.parametrize("place", [0, 7, 9, 200, CHECKSUM, 4100, 5000])
def test_altered_header_is_damage(volume, tmp_path, place):
    data = bytearray(volume.read_bytes())
    data[place] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(UnreadableError):
        opened(tmp_path / "bad")


@pytest.mark.parametrize("size", [0, 100, 4096, 16384, 40000])
def test_volume_that_is_cut_short_is_damage(volume, tmp_path, size):
    (tmp_path / "bad").write_bytes(volume.read_bytes()[:size])
    with pytest.raises(UnreadableError):
        opened(tmp_path / "bad")


def sif(path: Path, volume: Path) -> Path:
    """Put a volume into a SIF file as root's builds do."""
    extra = layout.partition_extra(layout.ENCRYPTED_SQUASHFS, layout.PRIMARY, layout.host_arch())
    with open(path, "w+b") as file:
        create(file.fileno(), [SifObject(layout.PARTITION, volume.read_bytes(), extra=extra)], identity=bytes(16))
    path.chmod(0o644)
    return path


def test_image_in_a_volume_opens_with_its_passphrase(tmp_path):
    with open(tmp_path / "inner", "w+b") as file, SquashfsWriter(file.fileno()) as writer:
        root = Node("dir", 0o755)
        root.children[b"hello"] = Node("file", 0o644, data=writer.store_bytes(b"inside"))
        writer.finish(root)
    path = sif(tmp_path / "a.sif", encrypted(tmp_path / "v", *ARGON, data=(tmp_path / "inner").read_bytes()))
    from pysingularity.image.inside import source_of

    with open_image(str(path)) as image:
        image.unlock(Key(passphrase=SECRET))
        assert source_of(image).read("hello") == b"inside"
    with open_image(str(path)) as image, pytest.raises(Exception, match="cannot be decrypted with this passphrase"):
        image.unlock(Key(passphrase=b"other"))
    # XTS does not authenticate: what was altered is noise, and the squashfs in it is damaged.
    data = bytearray(path.read_bytes())
    data[32768 + (16 << 20) + 20] ^= 1
    path.write_bytes(data)
    with open_image(str(path)) as image:
        image.unlock(Key(passphrase=SECRET))
        with pytest.raises(ImageError, match="damaged"):
            source_of(image)


@pytest.mark.rootless
@pytest.mark.fuse
def test_ordinary_user_runs_an_image_that_root_encrypted(as_user, fuse, tmp_path, tool):
    """The rest of the way is that of any encrypted image: see tests/runtime/test_encrypted.py."""
    busybox = Path(tool("busybox"))
    (tmp_path / "root/bin").mkdir(parents=True)
    for name in ("dev", "proc", "sys", "tmp", "etc", "home", "root", "var/tmp"):
        (tmp_path / "root" / name).mkdir(parents=True)
    shutil.copy(busybox, tmp_path / "root/bin/busybox")
    (tmp_path / "root/bin/echo").symlink_to("busybox")
    subprocess.run(
        [tool("mksquashfs"), tmp_path / "root", tmp_path / "inner", "-quiet", "-no-progress", "-all-root"],
        check=True,
        capture_output=True,
    )
    volume = encrypted(tmp_path / "v", *ARGON, data=(tmp_path / "inner").read_bytes())
    path = sif(as_user.tmp / "root.sif", volume)
    env = {"SINGULARITY_ENCRYPTION_PASSPHRASE": os.fsdecode(SECRET)}
    for words in ((), ("--unsquash",)):
        result = as_user(["singularity", "exec", *words, path, "/bin/echo", "in"], env=env)
        assert (result.returncode, result.stdout) == (0, "in\n"), result.stderr
