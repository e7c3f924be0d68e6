# SPDX-License-Identifier: Apache-2.0
"""Against real programs: Debian's docker-registry as server, skopeo and umoci as judges, many processes at once."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from pysingularity.image.open import open_image
from pysingularity.squashfs.reader import SquashfsImage
from registries import digest, gz, send, tar_of

SINGULARITY = str(Path(sys.executable).parent / "singularity")


def run(*words, env, check=True, **options):
    result = subprocess.run(
        [SINGULARITY, *map(str, words)], env=env, capture_output=True, text=True, timeout=120, **options
    )
    if check and result.returncode:
        raise AssertionError(f"{words}: {result.returncode}\n{result.stderr}")
    return result


AWKWARD = [
    [
        ("etc", None),
        ("etc/passwd", b"root"),
        ("d", {"type": tarfile.DIRTYPE, "mode": 0o1777, "uid": 5, "gid": 6}),
        ("d/gone", b"x" * 300_000),
        ("d/stays", b"y" * 300_000),
        ("opaque", None),
        ("opaque/old", b"1"),
        ("file-then-folder", b"f"),
        ("folder-then-file", None),
        ("folder-then-file/x", b"1"),
        ("hard", b"linked"),
        ("lib", {"type": tarfile.SYMTYPE, "linkname": "usr/lib"}),
        ("usr", None),
        ("usr/lib", None),
        ("suid", {"mode": 0o6755, "uid": 1000, "gid": 2000, "data": b"s"}),
        ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
        ("attr", {"pax_headers": {"SCHILY.xattr.user.note": "value"}, "data": b"a"}),
        (b"n\xff".decode("utf-8", "surrogateescape"), b"bytes"),
        ("long/" + "p" * 200 + "/" + "q" * 200, b"deep"),
    ],
    [
        ("d/.wh.gone", b""),
        ("opaque", None),
        ("opaque/.wh..wh..opq", b""),
        ("opaque/new", b"2"),
        ("file-then-folder", None),
        ("file-then-folder/in", b"3"),
        ("folder-then-file", b"now"),
        ("again", {"type": tarfile.LNKTYPE, "linkname": "hard"}),
        ("lib/through-link", b"4"),
    ],
    [("etc/passwd", b"root and more"), (".wh.suid", b""), ("suid", {"mode": 0o755, "data": b"t"})],
]


def copies(layer):
    return [(name, dict(what) if isinstance(what, dict) else what) for name, what in layer]


@pytest.mark.peer
@pytest.mark.root
@pytest.mark.usefixtures("root_only")
def test_tree_equals_that_of_umoci_in_content_owners_modes_times_links_and_attributes(tmp_path, tool, environ):
    layers = []
    for number, layer in enumerate(AWKWARD):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(tar_of(copies(layer)))
        layers.append(path)
    umoci = tool("umoci")
    subprocess.run([umoci, "init", "--layout", "img"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([umoci, "new", "--image", "img:t"], cwd=tmp_path, check=True, capture_output=True)
    for path in layers:
        words = [umoci, "raw", "add-layer", "--image", "img:t", path]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([umoci, "unpack", "--image", "img:t", "bundle"], cwd=tmp_path, check=True, capture_output=True)
    run("pull", tmp_path / "x.sif", f"oci:{tmp_path}/img:t", env=environ)
    wanted = from_folder(os.fsencode(tmp_path / "bundle/rootfs"))
    found = from_image(str(tmp_path / "x.sif"))
    ours = {path for path in found if path.split(b"/")[0] in (b".singularity.d", b"singularity", b"environment")}
    ours |= {path for path in found if path not in wanted and path.split(b"/")[0] in TOP}
    assert {path: value for path, value in found.items() if path not in ours} == wanted


TOP = {b"dev", b"proc", b"root", b"var", b"tmp", b"etc", b"sys", b"home", b".run", b".exec", b".test", b".shell"}


def fact(kind, mode, uid, gid, mtime, nlink, extra, xattrs):
    named = mtime == 1_600_000_000  # folders that no layer names have the time of extraction there
    return kind, mode if kind != "symlink" else 0, uid, gid, named, nlink if kind != "dir" else 0, extra, xattrs


def from_folder(top):
    found = {}
    for folder, dirs, files in os.walk(top):
        for name in dirs + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            mode = stat.S_IFMT(status.st_mode)
            kind = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink", stat.S_IFCHR: "char"}.get(
                mode, "fifo"
            )
            extra = b""
            if kind == "file":
                with open(path, "rb") as file:
                    extra = file.read()
            elif kind == "symlink":
                extra = os.readlink(path)
            elif kind == "char":
                extra = status.st_rdev
            xattrs = {}
            if kind == "file":
                xattrs = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
            facts = (kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, int(status.st_mtime))
            found[os.path.relpath(path, top)] = fact(*facts, status.st_nlink, extra, xattrs)
    return found


def from_image(path):
    found = {}
    with open_image(path) as image:
        squashfs = SquashfsImage(image.fd, image.offset, image.size)
        for name, inode in squashfs.walk():
            if not name:
                continue
            extra = b""
            if inode.kind == "file":
                extra = squashfs.read(inode)
            elif inode.kind == "symlink":
                extra = inode.target
            elif inode.kind == "char":
                extra = inode.rdev
            xattrs = squashfs.xattrs(inode) if inode.kind == "file" else {}
            facts = (inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime)
            found[name.strip(b"/")] = fact(*facts, inode.nlink, extra, xattrs)
    return found


def test_32_pulls_at_once_download_once_and_all_are_right(fake, environ, tmp_path):
    layers = [gz(("big", os.urandom(4_000_000))), gz(("more", os.urandom(100_000)))]
    reference = fake.add(layers)
    environ["SINGULARITY_NOHTTPS"] = "1"
    processes = [
        subprocess.Popen([SINGULARITY, "-q", "pull", str(tmp_path / f"{number}.sif"), reference], env=environ)
        for number in range(32)
    ]
    assert [process.wait() for process in processes] == [0] * 32
    contents = {(tmp_path / f"{number}.sif").read_bytes() for number in range(32)}
    assert len(contents) == 1
    blobs = [path for method, path, _ in fake.log if "/blobs/" in path]
    assert len(blobs) == 3 and all(sum(digest(layer) in path for path in blobs) == 1 for layer in layers)
    listed = run("cache", "list", "--json", env=environ).stdout
    assert listed.count('"type": "image"') == 1
    assert listed.count('"type": "partial"') == 0
    assert (
        digest(fake.manifests["1"][0]) in run("pull", "--json", "-F", tmp_path / "0.sif", reference, env=environ).stdout
    )


@pytest.mark.registry
def test_cleaning_and_pulling_at_once_disturb_nobody(docker_registry, environ, tmp_path):
    host, _ = docker_registry()
    send(host, [gz(("big", os.urandom(500_000)))])
    environ["SINGULARITY_NOHTTPS"] = "1"
    for _ in range(4):
        cleaners = [subprocess.Popen([SINGULARITY, "-q", "cache", "clean", "--force"], env=environ) for _ in range(2)]
        run("pull", "-F", tmp_path / "x.sif", f"docker://{host}/a/b:1", env=environ)
        assert [cleaner.wait() for cleaner in cleaners] == [0, 0]


@pytest.mark.registry
@pytest.mark.peer
def test_index_and_zstd_layers_as_skopeo_sees_them(docker_registry, environ, tmp_path, tool):
    """An index of two machines, one of them with zstd layers; skopeo tells which manifest is whose."""
    host, _ = docker_registry()
    skopeo, zstd = tool("skopeo"), tool("zstd")
    tar = tar_of([("arch", b"arm64"), ("data", b"d" * 100_000)])
    packed = subprocess.run([zstd, "-q", "-c"], input=tar, check=True, capture_output=True).stdout
    images = {
        "amd64": send(host, [gz(("arch", b"amd64"))], tag="amd"),
        "arm64": send(host, [packed, gz((".wh.data", b""))], tag="arm", architecture="arm64"),
    }
    entries = [
        {"digest": mark, "size": size, "platform": {"os": "linux", "architecture": arch}}
        for arch, (mark, size) in images.items()
    ]
    media = "application/vnd.oci.image.index.v1+json"
    for entry in entries:
        entry["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": media, "manifests": entries}).encode()
    request = urllib.request.Request(
        f"http://{host}/v2/a/b/manifests/multi", data=data, method="PUT", headers={"Content-Type": media}
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
    for arch, other in (("amd64", "x86_64"), ("arm64", "aarch64")):
        found = json.loads(
            run(
                "pull",
                "--json",
                "--no-https",
                "--arch",
                arch,
                tmp_path / f"{arch}.sif",
                f"docker://{host}/a/b:multi",
                env=environ,
            ).stdout
        )
        words = [skopeo, f"--override-arch={arch}", "--insecure-policy", "inspect", "--tls-verify=false"]
        one = subprocess.run(
            [*words, "--config", f"docker://{host}/a/b:multi"], check=True, capture_output=True, text=True
        )
        assert json.loads(one.stdout)["architecture"] == arch
        assert found["manifest"] == images[arch][0]
        run(
            "pull",
            "--offline",
            "--no-https",
            "--arch",
            other,
            tmp_path / f"{other}.sif",
            f"docker://{host}/a/b:multi",
            env=environ,
        )
        with open_image(str(tmp_path / f"{arch}.sif")) as image:
            squashfs = SquashfsImage(image.fd, image.offset, image.size)
            assert image.arch == arch and squashfs.read(squashfs.lookup(b"arch")) == arch.encode()
            assert squashfs.lookup(b"data") is None
    failed = run(
        "pull",
        "--no-https",
        "--arch",
        "s390x",
        tmp_path / "x.sif",
        f"docker://{host}/a/b:multi",
        env=environ,
        check=False,
    )
    assert failed.returncode == 255 and "linux/amd64, linux/arm64" in failed.stderr


def test_killed_pull_leaves_no_file_and_the_next_one_goes_on(fake, environ, tmp_path):
    layer = gz(("big", os.urandom(3_000_000)))
    reference = fake.add([layer])
    environ["SINGULARITY_NOHTTPS"] = "1"
    over = threading.Event()

    def half(handler):
        if digest(layer) not in handler.path or handler.headers.get("Range"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(layer)))
        handler.end_headers()
        handler.wfile.write(layer[:1_500_000])
        handler.wfile.flush()
        over.wait(30)
        return True

    fake.spoil = half
    process = subprocess.Popen([SINGULARITY, "-q", "pull", str(tmp_path / "x.sif"), reference], env=environ)
    partial = tmp_path / "cachedir/cache/partial" / digest(layer).replace(":", "-")
    until = time.monotonic() + 30
    while time.monotonic() < until and not (partial.exists() and partial.stat().st_size > 1_000_000):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    over.set()
    assert not (tmp_path / "x.sif").exists()
    run("pull", tmp_path / "x.sif", reference, env=environ)
    assert (tmp_path / "x.sif").stat().st_size > 3_000_000
    assert [headers.get("Range") for _, path, headers in fake.log if digest(layer) in path][-1].startswith("bytes=1")


@pytest.mark.registry
def test_login_is_checked_kept_used_and_forgotten(docker_registry, environ, tmp_path):
    plain, _ = docker_registry(auth=True)
    refused = run("registry", "login", "-u", "me", "-p", "wrong", "--no-https", plain, env=environ, check=False)
    assert refused.returncode == 255 and "refuses me" in refused.stderr
    run("registry", "login", "-u", "me", "--password-stdin", "--no-https", plain, env=environ, input="secret\n")
    assert plain in run("registry", "list", env=environ).stdout
    send_sif(environ, plain, tmp_path)
    run("registry", "logout", plain, env=environ)
    failed = run("pull", "--no-https", "-F", tmp_path / "y.sif", f"oras://{plain}/x/y:1", env=environ, check=False)
    assert failed.returncode == 255 and "login" in failed.stderr


def send_sif(environ, host, tmp_path):
    """Make a small SIF, push it as oras and fetch it again."""
    (tmp_path / "box/bin").mkdir(parents=True)
    run("convert", "-F", tmp_path / "box", tmp_path / "x.sif", env=environ)
    run("push", "--no-https", tmp_path / "x.sif", f"oras://{host}/x/y:1", env=environ)
    run("pull", "--no-https", tmp_path / "z.sif", f"oras://{host}/x/y:1", env=environ)
    assert (tmp_path / "z.sif").read_bytes() == (tmp_path / "x.sif").read_bytes()


@pytest.mark.registry
def test_certificate_of_an_own_ca_is_believed_only_when_given(docker_registry, environ, tmp_path):
    host, folder = docker_registry(tls=True)
    failed = run("pull", tmp_path / "y.sif", f"docker://{host}/x/y:1", env=environ, check=False)
    assert failed.returncode == 255 and "certificate" in failed.stderr.lower()
    environ["SSL_CERT_FILE"] = str(folder / "ca.pem")
    failed = run("pull", tmp_path / "y.sif", f"docker://{host}/x/y:1", env=environ, check=False)
    assert "not found" in failed.stderr


@pytest.mark.registry
@pytest.mark.root
@pytest.mark.usefixtures("root_only")
def test_full_disk_is_one_clear_line_and_leaves_nothing(docker_registry, environ, tmp_path, tool):
    host, _ = docker_registry()
    send(host, [gz(("big", os.urandom(6_000_000)))])
    environ["SINGULARITY_NOHTTPS"] = "1"
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=4m none {small} && export SINGULARITY_CACHEDIR={small} && "
        f"{SINGULARITY} pull {small}/x.sif docker://{host}/a/b:1; code=$?; ls {small}; exit $code"
    )
    result = subprocess.run(
        [tool("unshare"), "-m", "sh", "-c", script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 255
    assert "no space left" in result.stderr
    assert "x.sif" not in result.stdout


@pytest.mark.registry
@pytest.mark.root
@pytest.mark.usefixtures("root_only")
def test_full_disk_of_the_target_is_named_and_the_cache_keeps_the_image(docker_registry, environ, tmp_path, tool):
    host, _ = docker_registry()
    send(host, [gz(("big", os.urandom(6_000_000)))])
    environ["SINGULARITY_NOHTTPS"] = "1"
    small = tmp_path / "small"
    small.mkdir()
    reference = f"docker://{host}/a/b:1"
    script = (
        f"mount -t tmpfs -o size=4m none {small}; {SINGULARITY} -q pull {small}/x.sif {reference}; code=$?; "
        f"ls -A {small}; exit $code"
    )
    words = [tool("unshare"), "-m", "sh", "-c", script]
    result = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 255 and result.stdout == ""
    assert result.stderr == f"FATAL:   {small}/x.sif: no space left in {small}\n"
    assert "from the cache" in run("pull", tmp_path / "x.sif", reference, env=environ).stderr
