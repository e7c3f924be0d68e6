# SPDX-License-Identifier: Apache-2.0
"""Make the large Python image of the benchmarks: a Debian base, NumPy and SciPy, PyTorch, tools, and an awkward layer.

    python bench/largeimage.py FOLDER          makes FOLDER/layout (OCI) with the tags below; ten minutes, 5 GB, root
    python bench/largeimage.py FOLDER --serve  also serves it with docker-registry on a free port until interrupted

Tags: `debian` (1 layer), `numpy` (2), `torch` (3), `first` (4), `large` (5), `second` (4: three of `first` and one of
its own), `zstd` (as `large`, compressed with zstd). The last layer of `large` has what breaks mergers: whiteouts,
opaque and replaced folders, hard links to lower layers, devices, capabilities, set-uid programs, sparse files, odd
names.
Needs mmdebstrap, umoci, skopeo, docker-registry, and pip with an index in reach. Nothing here belongs to the product.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

LIBRARIES = ["numpy", "scipy"]
TORCH = ["torch==2.13.0"]
TOOLS = ["pandas", "scikit-learn", "matplotlib"]
OTHER = ["statsmodels", "jinja2", "requests"]
SITE = "usr/local/lib/python3.11/dist-packages"
#: Layers of each tag, from the lowest.
TAGS = {
    "debian": ("base",),
    "numpy": ("base", "libraries"),
    "torch": ("base", "libraries", "torch"),
    "first": ("base", "libraries", "torch", "tools"),
    "large": ("base", "libraries", "torch", "tools", "awkward"),
    "second": ("base", "libraries", "torch", "other"),
}


def call(*words: object) -> None:
    """Run a program; its errors end us."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def installed(packages: list[str], below: Path, known: set[str]) -> list[str]:
    """Install wheels below a folder, without what a lower layer has (`known`); return the names that are new."""
    call(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--root-user-action=ignore"),
        *("--ignore-installed", "--prefix=/usr/local", "--root", below, *packages),
    )
    packed = below / "usr/local/lib/python3.11/site-packages"
    if packed.exists():
        packed.rename(packed.with_name("dist-packages"))
    site = below / SITE
    for name in os.listdir(site):
        if name in known:
            path = site / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    # Some files are for later versions of Python only: their errors do not matter.
    words = [sys.executable, "-m", "compileall", "-q", "-s", str(below), "-p", "/", str(site)]
    subprocess.run(words, check=False, capture_output=True)
    return os.listdir(site)


def packed(tree: Path, output: Path) -> None:
    """Make a layer of a tree."""
    call(
        *("tar", "--sort=name", "--numeric-owner", "--owner=0", "--group=0", "--format=posix"),
        "-cf",
        output,
        "-C",
        tree,
        ".",
    )


def awkward(output: Path) -> None:
    """Make the layer that speaks of lower ones in every way."""

    def add(name: str, data: bytes = b"", **values: object) -> None:
        info = tarfile.TarInfo(name)
        info.mtime, info.size = 1_600_000_000, len(data)
        for key, value in values.items():
            setattr(info, key, value)
        tar.addfile(info, BytesIO(data))

    folder = {"type": tarfile.DIRTYPE, "mode": 0o755}
    with tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as tar:
        add("usr/share/.wh.doc")
        add(f"{SITE}/scipy/.wh.LICENSE.txt")
        add(f"{SITE}/matplotlib/tests", **folder)
        add(f"{SITE}/matplotlib/tests/.wh..wh..opq")
        add(f"{SITE}/matplotlib/tests/README", b"tests are left out\n")
        add("opt/same-torch", type=tarfile.LNKTYPE, linkname=f"{SITE}/torch/__init__.py")
        add("opt/same-numpy", type=tarfile.LNKTYPE, linkname=f"{SITE}/numpy/__init__.py")
        add("opt/secret", b"x", mode=0o600, uid=1234, gid=5678)
        add("opt/suid", b"#!/bin/sh\n", mode=0o6755)
        add("opt/capable", b"\x7fELF", mode=0o755, pax_headers=capability())
        add("opt/noted", b"n", pax_headers={"SCHILY.xattr.user.note": "value"})
        add("opt/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("opt/disk", type=tarfile.BLKTYPE, devmajor=7, devminor=0, mode=0o660)
        add("opt/pipe", type=tarfile.FIFOTYPE, mode=0o644)
        add(b"opt/latin-\xe9\xff".decode("utf-8", "surrogateescape"), b"bytes")
        add("opt/" + "d" * 180 + "/" + "e" * 200, b"deep")
        add("usr/games", b"now a file")
        add("etc/issue", **folder)
        add("etc/issue/inside", b"now in a folder")
        add("var/tmp", type=tarfile.DIRTYPE, mode=0o1777, uid=7, gid=8)
        add("lib/through-link", b"through the link of merged /usr")
    sparse = output.with_suffix(".sparse")
    sparse.mkdir()
    with open(sparse / "holes", "wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(b"end")
    call("tar", "-S", "--format=posix", "--owner=0", "--group=0", "-cf", sparse / "a.tar", "-C", sparse, "holes")
    call("tar", "--concatenate", "-f", output, sparse / "a.tar")


def capability() -> dict[str, str]:
    """Return PAX headers with CAP_NET_RAW+ep, version 2 of the attribute."""
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    return {"SCHILY.xattr.security.capability": value.decode("latin-1")}


def make(folder: Path, parts: tuple[str, ...] = ("base", "libraries", "torch", "tools", "other", "awkward")) -> None:
    """Make layers and layout, those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = {"libraries": LIBRARIES, "torch": TORCH, "tools": TOOLS, "other": OTHER}
    for name in parts:
        layer = folder / f"{name}.tar"
        if layer.exists():
            continue
        print(f"making layer {name}", file=sys.stderr, flush=True)
        new = folder / f"{name}.new"
        if name == "base":
            call(
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                "--include=python3,libgomp1,libpam-modules",
                "bookworm",
                folder / "base.new.tar",
            )
            (folder / "base.new.tar").rename(layer)
            continue
        if name == "awkward":
            awkward(new)
            shutil.rmtree(new.with_suffix(".sparse"))
        else:
            tree = folder / f"{name}.tree"
            shutil.rmtree(tree, ignore_errors=True)
            below = next(layers[: layers.index(name)] for layers in TAGS.values() if name in layers)
            lists = [folder / f"{one}.names" for one in below if one != "base"]
            names = installed(packages[name], tree, {line for one in lists for line in one.read_text().splitlines()})
            packed(tree, new)
            (folder / f"{name}.names").write_text("\n".join(names))
            shutil.rmtree(tree)
        new.rename(layer)
    layout = folder / "layout"
    if layout.exists():
        return
    call("umoci", "init", "--layout", folder / "layout.new")
    done: dict[tuple[str, ...], str] = {}
    for tag, layers in TAGS.items():
        start = max((known for known in done if layers[: len(known)] == known), key=len, default=())
        if start:
            call("umoci", "tag", "--image", f"{folder}/layout.new:{done[start]}", tag)
        else:
            call("umoci", "new", "--image", f"{folder}/layout.new:{tag}")
            call(
                "umoci",
                "config",
                "--image",
                f"{folder}/layout.new:{tag}",
                "--config.env",
                "PATH=/usr/local/bin:/usr/bin:/bin",
                "--config.cmd",
                "python3",
            )
        for name in layers[len(start) :]:
            print(f"adding layer {name} to {tag}", file=sys.stderr, flush=True)
            call("umoci", "raw", "add-layer", "--image", f"{folder}/layout.new:{tag}", folder / f"{name}.tar")
        done[layers] = tag
    with_zstd(folder / "layout.new")
    call("chmod", "-R", "a+rX", folder / "layout.new")
    (folder / "layout.new").rename(layout)


def with_zstd(layout: Path) -> None:
    """Add the tag `zstd` to a layout: the layers of `large`, compressed by zstd(1)."""

    def put(path: Path) -> dict[str, object]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        path.rename(blobs / digest)
        return {"digest": f"sha256:{digest}", "size": size}

    blobs, new = layout / "blobs/sha256", layout / "new"
    index = json.loads((layout / "index.json").read_text())
    name = "org.opencontainers.image.ref.name"
    entry = next(one for one in index["manifests"] if one["annotations"][name] == "large")
    manifest = json.loads((blobs / entry["digest"][7:]).read_text())
    for number, layer in enumerate(manifest["layers"]):
        with (blobs / layer["digest"][7:]).open("rb") as source, new.open("wb") as target:
            gunzip = subprocess.Popen(["gzip", "-dc"], stdin=source, stdout=subprocess.PIPE)
            subprocess.run(["zstd", "-q", "-3", "-c"], stdin=gunzip.stdout, stdout=target, check=True)
            gunzip.wait()
        media = "application/vnd.oci.image.layer.v1.tar+zstd"
        manifest["layers"][number] = {"mediaType": media, **put(new)}
    new.write_text(json.dumps(manifest))
    media = "application/vnd.oci.image.manifest.v1+json"
    index["manifests"].append({"mediaType": media, **put(new), "annotations": {name: "zstd"}})
    (layout / "index.json").write_text(json.dumps(index))


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Serve a layout's images as HOST:PORT/bench/python:TAG; return the registry's process and that name."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{one.getsockname()[1]}"
    text = "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
    text += f"storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\nhttp: {{addr: '{host}'}}\n"
    (folder / "registry.yml").write_text(text)
    process = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "registry.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", int(host.split(":")[1])), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    for tag in (*TAGS, "zstd"):
        call(
            *("skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"),
            *(f"oci:{folder}/layout:{tag}", f"docker://{host}/bench/python:{tag}"),
        )
    return process, f"{host}/bench/python"


def main() -> None:
    """Make the image, and serve it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    make(arguments.folder)
    if arguments.serve:
        process, name = serve(arguments.folder)
        print(f"{name}:large (and {', '.join(TAGS)}, zstd)", flush=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()


if __name__ == "__main__":
    main()
