# SPDX-License-Identifier: Apache-2.0
"""What a path is: content decides, and errors say what is wrong."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.image.open import open_image
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create

LAUNCH = b"#!/usr/bin/env run-singularity\n"
SQUASHFS = b"hsqs" + bytes(5000)


def ext(*, journal=True, incompatible=2, read_only=1) -> bytes:
    data = bytearray(8192)
    struct.pack_into("<H", data, 1024 + 56, 0xEF53)
    struct.pack_into("<3I", data, 1024 + 92, 4 if journal else 0, incompatible, read_only)
    return bytes(data)


def sif(path, *objects):
    with open(path, "w+b") as file:
        create(file.fileno(), objects, identity=bytes(16))


def partition(file_system=layout.SQUASHFS, role=layout.PRIMARY, arch="amd64", data=SQUASHFS):
    return SifObject(layout.PARTITION, data, extra=layout.partition_extra(file_system, role, arch))


def test_sif_is_recognized_with_its_partitions(tmp_path):
    path = tmp_path / "image.txt"
    sif(path, SifObject(layout.DEFINITION, b"x"), partition(arch="arm64"), partition(2, layout.OVERLAY, data=b"e" * 9))
    with open_image(str(path)) as image:
        assert (image.kind, image.filesystem, image.arch) == ("sif", "squashfs", "arm64")
        assert os.pread(image.fd, 4, image.offset) == b"hsqs"
        assert image.size == len(SQUASHFS)
        assert [(one.filesystem, one.size) for one in image.overlays] == [("ext3", 9)]


@pytest.mark.parametrize(("number", "name"), [(5, "encrypted"), (6, "gocryptfs"), (2, "ext3")])
def test_file_system_of_the_partition_is_told(tmp_path, number, name):
    path = tmp_path / "a.sif"
    sif(path, partition(number))
    with open_image(str(path)) as image:
        assert (image.kind, image.filesystem) == ("sif", name)


@pytest.mark.parametrize("launch", [b"", LAUNCH, b"#!/bin/env run-singularity\n"])
def test_bare_squashfs_may_start_with_a_launch_line(tmp_path, launch):
    path = tmp_path / "old.simg"
    path.write_bytes(launch + SQUASHFS)
    with open_image(str(path)) as image:
        assert (image.kind, image.offset, image.size) == ("squashfs", len(launch), len(SQUASHFS))


@pytest.mark.parametrize("launch", [b"", LAUNCH])
def test_ext3_is_recognized(tmp_path, launch):
    path = tmp_path / "old.img"
    path.write_bytes(launch + ext())
    with open_image(str(path)) as image:
        assert (image.kind, image.filesystem, image.offset) == ("ext3", "ext3", len(launch))


@pytest.mark.parametrize("broken", [{"journal": False}, {"incompatible": 0x42}, {"read_only": 0x100}])
def test_other_ext_file_systems_are_refused(tmp_path, broken):
    path = tmp_path / "old.img"
    path.write_bytes(ext(**broken))
    with pytest.raises(ImageError, match="is no image") as caught:
        open_image(str(path))
    assert caught.value.id == "unknown-format"


def test_any_folder_is_a_sandbox(tmp_path):
    with open_image(str(tmp_path)) as image:
        assert (image.kind, image.filesystem) == ("sandbox", "directory")
        assert os.fstat(image.fd).st_ino == tmp_path.stat().st_ino


def test_missing_image_is_named(tmp_path):
    for path in (tmp_path / "nosuch.sif", tmp_path / "a" / "b"):
        with pytest.raises(ImageError, match="no such image") as caught:
            open_image(str(path))
        assert caught.value.id == "no-such-image"


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"root:x:0:0::/root:/bin/sh\n", ""),
        (b"Bootstrap: docker\nFrom: alpine\n", "definition file"),
        (b"\x7fELF" + bytes(100), "program"),
        (b"sqsh" + bytes(100), "byte order"),
    ],
)
def test_what_is_no_image_gets_a_hint(tmp_path, content, hint):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="image format not recognized") as caught:
        open_image(str(path))
    assert caught.value.id == "unknown-format"
    assert hint in caught.value.hint


def test_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="neither a file nor a folder"):
        open_image(str(tmp_path / "pipe"))


def test_sif_without_root_file_system_is_explained(tmp_path):
    path = tmp_path / "a.sif"
    sif(path, SifObject(layout.DEFINITION, b"x"), partition(role=layout.DATA))
    with pytest.raises(ImageError, match="without a root file system") as caught:
        open_image(str(path))
    assert caught.value.id == "no-partition"
    assert "sif list" in caught.value.hint
    sif(path, SifObject(layout.OCI_ROOT_INDEX, b"{}"))
    with pytest.raises(ImageError, match="OCI layers"):
        open_image(str(path))


def test_unusable_file_system_is_named(tmp_path):
    path = tmp_path / "a.sif"
    sif(path, partition(layout.ARCHIVE))
    with pytest.raises(ImageError, match="archive"):
        open_image(str(path))


def test_descriptors_are_closed_after_errors(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"nothing")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ImageError):
            open_image(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=6000), st.sampled_from([b"", LAUNCH, bytes(32) + b"SIF_MAGIC\x0001\x00", b"hsqs"]))
def test_any_file_is_an_image_or_an_image_error(tmp_path, data, head):
    path = tmp_path / "file"
    path.write_bytes(head + data)
    try:
        with open_image(str(path)) as image:
            assert image.offset + image.size <= len(head + data)
    except ImageError as error:
        assert "\n" not in error.message


def test_real_ext3_is_recognized(tmp_path, tool):
    path = tmp_path / "real.img"
    subprocess.run([tool("mkfs.ext3"), "-q", path, "4M"], check=True, capture_output=True)
    with open_image(str(path)) as image:
        assert image.kind == "ext3"
