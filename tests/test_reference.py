# SPDX-License-Identifier: Apache-2.0
"""References: every scheme with its defaults, the split between paths and schemes, names of files, round trips."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ReferenceError_
from pysingularity.reference import SCHEMES, Reference, has_scheme, parse_reference

SHA = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full", "file"),
    [
        ("docker://debian", "docker://docker.io/library/debian:latest", "debian_latest.sif"),
        ("docker:debian:12", "docker://docker.io/library/debian:12", "debian_12.sif"),
        ("docker://user/tool:1.0", "docker://docker.io/user/tool:1.0", "tool_1.0.sif"),
        ("docker://docker.io/debian", "docker://docker.io/library/debian:latest", "debian_latest.sif"),
        ("docker://index.docker.io/a/b", "docker://docker.io/a/b:latest", "b_latest.sif"),
        ("docker://localhost/a/b/c:t", "docker://localhost/a/b/c:t", "c_t.sif"),
        ("docker://reg.test:5000/a", "docker://reg.test:5000/a:latest", "a_latest.sif"),
        ("docker://[::1]:5000/a", "docker://[::1]:5000/a:latest", "a_latest.sif"),
        (f"docker://reg.test/a@{SHA}", f"docker://reg.test/a@{SHA}", f"a@{SHA.replace(':', '_')}.sif"),
        (f"docker://reg.test/a:3@{SHA}", f"docker://reg.test/a:3@{SHA}", "a_3.sif"),
        ("docker-archive:x.tar", "docker-archive:x.tar", "x.tar_latest.sif"),
        ("docker-archive://dir/x.tar", "docker-archive:dir/x.tar", "x.tar_latest.sif"),
        ("docker-archive:/d/x.tar:busybox:1", "docker-archive:/d/x.tar:busybox:1", "busybox_1.sif"),
        ("docker-archive:x.tar:@1", "docker-archive:x.tar:@1", "x.tar_latest.sif"),
        ("docker-daemon:a:b", "docker-daemon:a:b", "a_b.sif"),
        ("docker-daemon://reg.test:5000/a/b", "docker-daemon:reg.test:5000/a/b:latest", "b_latest.sif"),
        ("oci:oci_cmd", "oci:oci_cmd", "oci_cmd_latest.sif"),
        ("oci:d/oci_cmd:t", "oci:d/oci_cmd:t", "oci_cmd_t.sif"),
        ("oci:/tmp/a:b/c", "oci:/tmp/a:b/c", "c_latest.sif"),
        ("oci-archive:x.tar", "oci-archive:x.tar", "x.tar_latest.sif"),
        ("oras://reg.test/x/y", "oras://reg.test/x/y:latest", "y_latest.sif"),
        ("library://debian", "library://library/default/debian:latest", "debian_latest.sif"),
        ("library://lab/debian:1", "library://lab/default/debian:1", "debian_1.sif"),
        ("library://lab/tools/deb:12,latest", "library://lab/tools/deb:12,latest", "deb_12.sif"),
        ("library://127.0.0.1:80/e/c/i:t", "library://127.0.0.1:80/e/c/i:t", "i_t.sif"),
        (f"library://e/c/i:sha256.{'0' * 64}", f"library://e/c/i@sha256.{'0' * 64}", f"i@sha256.{'0' * 64}.sif"),
        ("shub://user/repo", "shub://user/repo:latest", "repo_latest.sif"),
        ("shub://hub.lab:8080/p/q/User/repo:gpu", "shub://hub.lab:8080/p/q/User/repo:gpu", "repo_gpu.sif"),
        (f"shub://u/r@{'0' * 40}", f"shub://u/r@{'0' * 40}", f"r@{'0' * 40}_latest.sif"),
        ("https://h.test/d/x.sif?a=b", "https://h.test/d/x.sif?a=b", "x.sif"),
        ("instance://job", "instance://job", "job_latest.sif"),
        ("ubuntu:18.04.img", "ubuntu:18.04.img", "image_latest.sif"),
        ("./docker:x", "./docker:x", "image_latest.sif"),
        ("/a/b.sif", "/a/b.sif", "image_latest.sif"),
    ],
)
def test_text_is_understood_with_the_defaults_of_its_scheme(text, full, file):
    reference = parse_reference(text)
    assert str(reference) == full
    assert reference.file_name() == file
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize("text", ["ubuntu:18.04.img", "a/b:c", "x", "/docker://x", "my file:y", "é://x"])
def test_text_without_a_known_scheme_is_a_path(text):
    assert not has_scheme(text)
    assert parse_reference(text) == Reference("localimage", path=text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("nosuch://x", "no transport"),
        ("docker://", "nothing"),
        ("docker://Debian", "capital"),
        ("docker://a/../b", "repository"),
        ("docker://a:b c", "tag"),
        ("docker://a@sha256:12", "digest"),
        ("oras://tool:1", "registry"),
        ("library://a/b/c:x y", "tag"),
        ("library://a//c", "part"),
        ("library://a/b/c@sha256.12", "hash"),
        ("shub://repo", "user"),
        ("shub://u/r@123", "hash"),
        ("http://", "host"),
        ("oci:", "nothing"),
        ("oci::tag", "path"),
        ("instance://", "name"),
    ],
)
def test_nonsense_is_refused_by_name(text, word):
    with pytest.raises(ReferenceError_) as caught:
        parse_reference(text)
    assert word in str(caught.value)


NAME = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,8}){0,2}", fullmatch=True)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
HOST = st.one_of(
    st.just("localhost"), st.builds("{}.test".format, NAME), st.builds("{}.test:{}".format, NAME, st.integers(1, 65535))
)
DIGEST = st.one_of(st.just(""), st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True))


@given(st.sampled_from(["docker", "oras"]), HOST, st.lists(NAME, min_size=1, max_size=3), TAG, DIGEST)
def test_registry_references_read_back_equal(scheme, host, names, tag, digest):
    reference = Reference(scheme, host=host, name="/".join(names), tag=tag, digest=digest)
    assert parse_reference(str(reference)) == reference


@given(st.one_of(st.just(""), HOST), NAME, NAME, NAME, TAG)
def test_library_references_read_back_equal(host, entity, collection, name, tag):
    reference = Reference("library", host=host, name=f"{entity}/{collection}/{name}", tag=tag)
    parsed = parse_reference(str(reference))
    assert str(parsed) == str(reference)


@given(st.sampled_from(sorted(SCHEMES)), st.text(max_size=40))
def test_any_text_behind_a_scheme_is_understood_or_refused(scheme, rest):
    try:
        reference = parse_reference(f"{scheme}://{rest}")
    except ReferenceError_:
        return
    assert parse_reference(str(reference)) == reference
    assert "/" not in reference.file_name()


def test_reading_a_reference_loads_nothing_heavy():
    code = "import sys; old = set(sys.modules); import pysingularity.reference; print(sorted(set(sys.modules) - old))"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(eval(found)) <= {
        "__future__",
        "pysingularity",
        "pysingularity.version",
        "pysingularity.errors",
        "pysingularity.reference",
    }
