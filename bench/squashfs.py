# SPDX-License-Identifier: Apache-2.0
"""Write and unpack squashfs images of a folder, against mksquashfs and unsquashfs in the same minutes.

    python bench/squashfs.py FOLDER [--runs N] [--scratch FOLDER]

A Debian root file system and a large Python environment are the folders that the figures in the documentation are of.
Every program starts from a warm cache and ends with the data handed to the kernel (no fsync), so that disks do not
count. Needs squashfs-tools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Series, interleave, table

from pysingularity.image.tree import scan_directory, store_tree
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
from pysingularity.squashfs.writer import SquashfsWriter


def write(folder: str, target: str, compression: str, level: str) -> None:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    root = scan_directory(folder)
    with SquashfsWriter(fd, compression=compression, level=int(level) if level else None) as writer:
        store_tree(writer, root)
        writer.finish(root)


def extract(source: str, target: str) -> None:
    unpack(SquashfsImage(os.open(source, os.O_RDONLY)), target)


def listing(source: str) -> None:
    print(sum(1 for _ in SquashfsImage(os.open(source, os.O_RDONLY)).walk()))


def fresh(path: Path):
    return lambda: (shutil.rmtree(path, ignore_errors=True), path.unlink(missing_ok=True) if path.is_file() else None)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--scratch", type=Path, help="where images and folders are made")
    options.add_argument("--level", default="15", help="of zstd, for both")
    given = options.parse_args()
    for program in ("mksquashfs", "unsquashfs"):
        if not shutil.which(program):
            sys.exit(f"needs {program} (squashfs-tools)")
    scratch = Path(tempfile.mkdtemp(prefix="bench-squashfs-", dir=given.scratch))
    try:
        measure(given.folder, scratch, given.runs, given.level)
    finally:
        subprocess.run(["rm", "-rf", scratch], check=True)


def measure(folder: Path, scratch: Path, runs: int, level: str) -> None:
    us = [sys.executable, __file__]
    images = {name: scratch / name for name in ("mk-gzip", "our-gzip", "mk-zstd", "our-zstd")}
    common = ["-no-progress", "-quiet", "-noappend"]
    zstd = ["-comp", "zstd", "-Xcompression-level", level]
    writing = [
        Series("mksquashfs (gzip 9)", ["mksquashfs", folder, images["mk-gzip"], *common]),
        Series("ours, gzip", [*us, "--write", folder, images["our-gzip"], "gzip", ""]),
        Series(f"mksquashfs, zstd {level}", ["mksquashfs", folder, images["mk-zstd"], *common, *zstd]),
        Series(f"ours, zstd {level}", [*us, "--write", folder, images["our-zstd"], "zstd", level]),
    ]
    interleave(writing, runs, warmup=0)
    print(f"writing {folder}")
    table(writing[:2], base=writing[0].name)
    table(writing[2:], base=writing[2].name)
    for kind in ("gzip", "zstd"):
        theirs, ours = images[f"mk-{kind}"].stat().st_size, images[f"our-{kind}"].stat().st_size
        print(f"size, {kind}: {ours / 1e6:.1f} MB, {ours / theirs:.4f} of mksquashfs ({theirs / 1e6:.1f} MB)")
    out, other = scratch / "out", scratch / "other"
    image = images["our-gzip"]
    reading = [
        Series("unsquashfs", ["unsquashfs", "-no-progress", "-quiet", "-d", other, image], before=fresh(other)),
        Series("ours", [*us, "--extract", image, out], before=fresh(out)),
    ]
    interleave(reading, runs)
    print(f"\nunpacking {image.name}")
    table(reading, base="unsquashfs")
    walking = [Series("list all inodes", [*us, "--list", image])]
    interleave(walking, runs)
    table(walking, unit=1000)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(*sys.argv[2:])
    elif sys.argv[1:2] == ["--extract"]:
        extract(*sys.argv[2:])
    elif sys.argv[1:2] == ["--list"]:
        listing(*sys.argv[2:])
    else:
        main()
