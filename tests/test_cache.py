# SPDX-License-Identifier: Apache-2.0
"""The cache: places, locks between processes, whole files only, limits, and files handed to the user."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from pysingularity import cache as module
from pysingularity import files, locks
from pysingularity.cache import Cache
from pysingularity.errors import UserError
from pysingularity.files import hand_out
from pysingularity.folders import cache_folder, size_of, temporary_folder
from pysingularity.locks import Lock


@pytest.fixture
def cache(tmp_path):
    found = Cache.open({"SINGULARITY_CACHEDIR": str(tmp_path / "c")})
    assert found is not None
    return found


def image(cache, key: str, data: bytes = b"x" * 5000) -> str:
    new = cache.new_file("image", key + ".sif")
    with open(new, "wb") as file:
        file.write(data)
    return cache.publish_image(key, new, files.hash_file(new), {"from": f"docker://{key}"})


def test_folder_comes_from_the_environment_or_the_home():
    assert cache_folder({"SINGULARITY_CACHEDIR": "/a", "APPTAINER_CACHEDIR": "/b"}) == "/a/cache"
    assert cache_folder({"APPTAINER_CACHEDIR": "/b"}) == "/b/cache"
    assert cache_folder({"HOME": "/h"}) == "/h/.singularity/cache"


def test_temporary_folder_is_the_one_asked_for_or_the_schedulers(tmp_path):
    assert temporary_folder({"SINGULARITY_TMPDIR": str(tmp_path), "TMPDIR": "/nosuch"}) == str(tmp_path)
    with pytest.raises(UserError, match="SINGULARITY_TMPDIR=/nosuch"):
        temporary_folder({"SINGULARITY_TMPDIR": "/nosuch", "TMPDIR": str(tmp_path)})
    assert temporary_folder({"SLURM_TMPDIR": str(tmp_path), "TMPDIR": "/var"}) == str(tmp_path)
    assert temporary_folder({"SLURM_TMPDIR": "/nosuch", "TMPDIR": str(tmp_path)}) == str(tmp_path)
    assert temporary_folder({"TMPDIR": "/nosuch"}) in ("/tmp", "/var/tmp")


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("512", 512), ("1.5K", 1536), ("20GiB", 20 << 30), ("2 tb", 2 << 40)]
)
def test_sizes_for_people(text, value):
    assert size_of(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1P", "nan"])
def test_nonsense_is_no_size(text):
    with pytest.raises(UserError):
        size_of(text)


def test_disabled_by_a_variable(tmp_path):
    environ = {"SINGULARITY_CACHEDIR": str(tmp_path), "SINGULARITY_DISABLE_CACHE": "yes"}
    assert Cache.open(environ) is None
    assert Cache.open({**environ, "SINGULARITY_DISABLE_CACHE": "no"}) is not None


def test_image_that_is_not_whole_is_never_used(cache):
    path = image(cache, "k")
    assert cache.image("k") == path
    os.chmod(path, 0o644)
    os.truncate(path, 100)
    assert cache.image("k") is None
    assert not os.path.exists(path)


def test_image_that_was_only_touched_is_hashed_once_and_kept(cache):
    path = image(cache, "k")
    os.utime(path, (1, 1))
    assert cache.image("k") == path
    assert files.read_lines(path[:-4] + ".record")["identity"].endswith("-1000000000")


def test_image_without_its_record_is_dropped(cache):
    path = image(cache, "k")
    os.unlink(path[:-4] + ".record")
    assert cache.image("k") is None


def test_half_written_record_is_none(tmp_path):
    path = str(tmp_path / "r")
    files.write_lines(path, {"a": "b=c", "d": "two\nlines"})
    assert files.read_lines(path) == {"a": "b=c", "d": "two lines"}
    with open(path, "r+b") as file:
        file.truncate(3)
    assert files.read_lines(path) is None


def test_tags_are_remembered_for_a_while(cache, monkeypatch):
    cache.remember("docker://x amd64", {"image": "k"})
    assert cache.recall("docker://x amd64", 60)["image"] == "k"
    assert cache.recall("docker://y amd64", 60) is None
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 61)
    assert cache.recall("docker://x amd64", 60) is None
    assert cache.recall("docker://x amd64")["image"] == "k"


HOLD = """
import sys, time
sys.path.insert(0, {src!r})
from pysingularity.locks import Lock
lock = Lock({path!r})
print("held", flush=True)
sys.stdin.readline()
lock.close()
"""


def held_elsewhere(path):
    src = os.path.dirname(os.path.dirname(module.__file__))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLD.format(src=src, path=path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_waits_for_another_process_and_survives_its_death(tmp_path):
    path = str(tmp_path / "lock")
    process = held_elsewhere(path)
    told = []
    threading.Timer(0.3, process.kill).start()
    start = time.monotonic()
    with Lock(path, lambda: told.append(1)):
        assert time.monotonic() - start > 0.2
        assert told == [1]
    process.communicate()
    assert not os.path.exists(path)


def test_hard_link_is_the_lock_where_there_are_no_others(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    path = str(tmp_path / "lock")
    order = []

    def work(number):
        with Lock(path):
            order.append(("in", number))
            time.sleep(0.15)
            order.append(("out", number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [what for what, _ in order] == ["in", "out"] * 3
    assert [one for one, _ in zip(order[::2], order[1::2], strict=True)] == [("in", n) for _, n in order[1::2]]


def test_link_lock_of_a_dead_process_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 0.5)
    (tmp_path / "l").write_text("")
    lock = locks._LinkLock(str(tmp_path / "l"), None)
    lock.close()
    assert os.listdir(tmp_path) == []


def test_limit_removes_what_was_not_used_for_longest(cache):
    for number in range(4):
        path = image(cache, f"k{number}", os.urandom(100_000))
        os.utime(path, (1_000_000 + number, os.stat(path).st_mtime))
        old = time.time() - 10_000 + number
        os.utime(path, (old, old))
    cache.limit = 250_000
    assert cache.shrink() > 0
    assert sorted(entry.key for entry in cache.entries(("image",))) == ["k2", "k3"]


def test_sizes_are_those_of_the_disk_and_names_are_known(cache):
    path = image(cache, "k")
    cache.remember("docker://k:1 amd64 https 1", {"image": "k", "blobs": "sha256:" + "0" * 64})
    (entry,) = cache.entries(("image",))
    record = path[:-4] + ".record"
    assert entry.size == (os.stat(path).st_blocks + os.stat(record).st_blocks) * 512
    assert entry.names == ["docker://k:1 amd64 https 1"]
    assert cache.remove(entry) > 0
    assert list(cache.entries(("image",))) == []


def test_file_is_handed_out_without_copying_where_possible(cache, tmp_path):
    path = image(cache, "k")
    way = hand_out(path, str(tmp_path / "out.sif"))
    assert way in ("clone", "link")
    assert (tmp_path / "out.sif").read_bytes() == b"x" * 5000


def test_file_is_copied_to_another_file_system(cache, tmp_path, monkeypatch):
    def other(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    path = image(cache, "k", os.urandom(3_000_000))
    monkeypatch.setattr(files.os, "link", other)
    monkeypatch.setattr(files.fcntl, "ioctl", other)
    assert hand_out(path, str(tmp_path / "a")) == "copy"
    monkeypatch.setattr(files.os, "copy_file_range", other)
    assert hand_out(path, str(tmp_path / "b")) == "copy"
    with open(path, "rb") as file:
        data = file.read()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == data
