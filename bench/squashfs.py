# SPDX-License-Identifier: Apache-2.0
"""`singularity build` from a folder and into one, against mksquashfs and unsquashfs in the same minutes.

    python bench/squashfs.py                    makes a Debian tree and a Python tree first (some minutes, 5 GB)
    python bench/squashfs.py FOLDER...          uses folders that are there
    python bench/squashfs.py --only debian --runs 5 --level 15

Started by root it works as an ordinary user. Everything starts from a warm cache; ours ends with an fsync, the peers
do not. Needs squashfs-tools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Series, drop_privileges, interleave, table
from trees import TREES


def main() -> None:
    """Parse, make trees, measure each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="*", type=Path)
    options.add_argument("--only", choices=TREES, help="make and measure one of the trees")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--level", default="3", help="of zstd, for both")
    options.add_argument("--scratch", default="/var/tmp", help="where trees and images are made")
    options.add_argument("--singularity", default=shutil.which("singularity"))
    options.add_argument("--user", default="pysing")
    given = options.parse_args()
    for program in ("mksquashfs", "unsquashfs"):
        if not shutil.which(program):
            sys.exit(f"needs {program} (squashfs-tools)")
    if not given.singularity:
        sys.exit("no singularity on PATH; name it with --singularity")
    drop_privileges(given.user)
    scratch = Path(tempfile.mkdtemp(prefix="bench-squashfs-", dir=given.scratch))
    try:
        for name in [given.only] if given.only else [] if given.folders else TREES:
            TREES[name](scratch / name, given.singularity)
            given.folders.append(scratch / name)
        for folder in given.folders:
            measure(folder, scratch, given.runs, given.level, given.singularity)
    finally:
        subprocess.run([given.singularity, "rm", "--force", scratch / "ours"], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", scratch], check=True)


def measure(folder: Path, scratch: Path, runs: int, level: str, singularity: str) -> None:
    """Print the tables of one folder."""
    count = sum(len(names) + len(files) for _, names, files in os.walk(folder))
    size = int(subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"\n{folder.name}: {count} entries, {size} MiB")
    images = {name: scratch / name for name in ("mk-gzip", "our-gzip.sif", "mk-zstd", "our-zstd.sif")}
    common = ["-no-progress", "-quiet", "-noappend", "-all-root"]
    zstd = ["-comp", "zstd", "-Xcompression-level", level]
    build = [singularity, "-q", "build", "--force"]
    ours_zstd = [*build, "--mksquashfs-args", " ".join(zstd), images["our-zstd.sif"], folder]
    writing = [
        Series("mksquashfs (gzip 9)", ["mksquashfs", folder, images["mk-gzip"], *common]),
        Series("build x.sif", [*build, images["our-gzip.sif"], folder]),
        Series(f"mksquashfs, zstd {level}", ["mksquashfs", folder, images["mk-zstd"], *common, *zstd]),
        Series(f"build x.sif, zstd {level}", ours_zstd),
    ]
    interleave(writing, runs, warmup=0)
    table(writing[:2], base=writing[0].name)
    table(writing[2:], base=writing[2].name)
    for kind in ("gzip", "zstd"):
        theirs, ours = images[f"mk-{kind}"].stat().st_size, images[f"our-{kind}.sif"].stat().st_size
        print(f"size, {kind}: {ours / 1e6:.1f} MB, {ours / theirs:.4f} of mksquashfs ({theirs / 1e6:.1f} MB)")
    ours, other = scratch / "ours", scratch / "theirs"

    def clear() -> None:
        subprocess.run([singularity, "-q", "rm", "--force", ours], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", ours, other], check=True)
        os.sync()  # or one would wait for the other's data to reach the disk

    unsquash = ["unsquashfs", "-no-progress", "-quiet", "-no-exit-code", "-d", other, images["mk-gzip"]]
    reading = [
        Series("unsquashfs", unsquash, before=clear),
        Series("build --sandbox", [*build, "--sandbox", ours, images["our-gzip.sif"]], before=clear),
    ]
    interleave(reading, runs)
    table(reading, base="unsquashfs")
    clear()


if __name__ == "__main__":
    main()
