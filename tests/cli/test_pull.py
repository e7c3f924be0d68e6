# SPDX-License-Identifier: Apache-2.0
"""The commands pull, push, cache and registry as a person types them."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from containers import busybox, make_tree
from registries import FakeRegistry, gz

__all__ = ["busybox"]

SINGULARITY = str(Path(sys.executable).parent / "singularity")


@pytest.fixture
def registry():
    found = FakeRegistry()
    yield found
    found.close()


@pytest.fixture
def cli(tmp_path):
    environ = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "SINGULARITY_CACHEDIR": str(tmp_path / "c"),
        "SINGULARITY_NOHTTPS": "1",
    }

    def run(*words, code=0, text="", **more):
        result = subprocess.run(
            [SINGULARITY, *map(str, words)],
            env={**environ, **more},
            cwd=tmp_path,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == code, result.stderr
        return result

    return run


def test_pull_names_the_file_and_will_not_overwrite(cli, registry, tmp_path):
    reference = registry.add([gz(("a", b"1"))], tag="v1")
    assert "100 %" in cli("pull", reference).stderr
    assert (tmp_path / "b_v1.sif").exists()
    again = cli("pull", reference, code=255)
    assert "will not overwrite" in again.stderr and len(again.stderr.splitlines()) == 2
    cli("pull", "-F", reference)
    cli("pull", "--dir", "c", "--name", "x.sif", reference)
    cli("pull", "y.sif", reference, code=0)
    assert (tmp_path / "c/x.sif").read_bytes() == (tmp_path / "y.sif").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_quiet_pull_says_nothing_and_json_gives_digests(cli, registry):
    reference = registry.add([gz(("a", b"1"))])
    assert cli("-q", "pull", "q.sif", reference).stderr == ""
    found = json.loads(cli("pull", "--json", "j.sif", reference).stdout)
    assert found["cached"] is True
    assert found["image"].startswith("sha256:") and found["manifest"].startswith("sha256:")


def test_pull_into_a_sandbox(cli, registry, tmp_path):
    cli("pull", "--sandbox", "box", registry.add([gz(("a", b"1"))]))
    assert (tmp_path / "box/a").read_bytes() == b"1"


def test_errors_are_one_line_and_a_hint_with_status_255(cli, registry):
    for words, word in (
        (["pull", "nosuch://x"], "no transport"),
        (["pull", "debian.sif"], "no reference"),
        (["pull", "nofolder/x.sif", "docker://x"], "folder"),
        (["pull", f"docker://{registry.host}/a/b:nosuch"], "not found"),
        (["push", "x.sif", "docker://x/y"], "cannot be sent"),
        (["pull", "--offline", "docker://x/y"], "not in the cache"),
    ):
        lines = cli(*words, code=255).stderr.splitlines()
        assert word in lines[0] and len(lines) <= 2, lines


def test_cache_is_listed_and_cleaned_by_reference(cli, registry):
    one = registry.add([gz(("shared", b"s")), gz(("a", b"1"))], tag="one")
    two = registry.add([gz(("shared", b"s")), gz(("b", b"2"))], tag="two")
    cli("pull", one)
    cli("pull", two)
    entries = json.loads(cli("cache", "list", "--json").stdout)["entries"]
    assert sum(entry["type"] == "image" for entry in entries) == 2
    assert sum(entry["type"] == "blob" for entry in entries) == 4
    assert "would be removed" in cli("cache", "clean", "--dry-run", one).stderr
    cli("cache", "clean", "--force", one)
    left = json.loads(cli("cache", "list", "--json", "--type", "image,blob").stdout)["entries"]
    assert [entry["type"] for entry in left].count("image") == 1
    cli("pull", "--offline", "-F", two)
    assert "nothing was removed" in cli("cache", "clean", text="n\n").stderr
    cli("cache", "clean", text="y\n")
    assert json.loads(cli("cache", "list", "--json").stdout)["entries"] == []
    cli("cache", "clean", "docker://never/seen", code=255)


def test_unwritable_cache_is_a_warning(cli, registry, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli("pull", "x.sif", registry.add([gz(("a", b"1"))]), SINGULARITY_CACHEDIR=str(tmp_path / "file"))
    assert "Cache disabled" in result.stderr
    assert (tmp_path / "x.sif").exists()


def on_terminal(words, environ, cwd):
    """Run a command whose standard error is a terminal; return what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = subprocess.Popen(
        [SINGULARITY, *words], env={**environ, "TERM": "xterm"}, cwd=cwd, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        found += data
    os.close(ours)
    assert process.wait() == 0, found
    return found.decode()


def test_terminal_has_a_line_a_layer_a_total_and_the_image(registry, tmp_path):
    layers = [gz((f"f{number}", os.urandom(200_000))) for number in range(3)]
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SINGULARITY_NOHTTPS": "1"}
    shown = on_terminal(["--nocolor", "pull", "x.sif", registry.add(layers)], environ, tmp_path)
    last = shown.rpartition("\x1b[J")[2].replace("\r", "").splitlines()
    assert [line.split()[0] for line in last] == ["layer", "layer", "layer", "total", "image", "INFO:"]
    assert all("100 %" in line and len(line) < 60 for line in last[:5])
    assert len({line.index("=") for line in last[:5]}) == 1
    assert "\x1b" not in on_terminal(["-q", "pull", "y.sif", registry.add(layers)], environ, tmp_path)


@pytest.mark.rootless
@pytest.mark.usefixtures("fuse")
def test_exec_shows_what_it_fetches_and_nothing_when_it_is_there(registry, as_user, busybox, tmp_path):
    tree = make_tree(tmp_path / "tree", busybox)
    words = ["tar", "-c", "--owner=0", "--group=0", "-C", tree, "."]
    layer = gzip.compress(subprocess.run(words, check=True, capture_output=True).stdout)
    command = ["singularity", "exec", "--no-https", registry.add([layer]), "echo", "here"]
    first, second = as_user(command, check=True), as_user(command, check=True)
    assert first.stdout == second.stdout == "here\n"
    assert "layer 1/1" in first.stderr and second.stderr == ""
