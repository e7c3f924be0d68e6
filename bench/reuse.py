# SPDX-License-Identifier: Apache-2.0
"""How long does it take to add a label or a file to a large image? Its compressed blocks are copied, not made again.

    python bench/reuse.py                      makes an image of about 475 MiB in --tmp first (half a minute)
    python bench/reuse.py --image big.sif      uses one that is there

Compared with a plain copy of the file and with compressing everything anew. `--recipe` goes the whole way of a user:
`singularity build` of a recipe with `Bootstrap: localimage` and no %post.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from common import Series, interleave, table

FILES, SIZE = 17_200, 45_000


def make_tree(folder: Path) -> None:
    """Make a tree of 17,200 files, 740 MiB, that compresses to about 475 MiB: half of every file is noise."""
    noise = random.Random(475)
    words = [noise.randbytes(4).hex().encode() for _ in range(500)]
    for number in range(FILES):
        below = folder / f"opt/{number // 100:03}"
        below.mkdir(parents=True, exist_ok=True)
        text = b" ".join(noise.choices(words, k=SIZE // 18))
        (below / f"{number}.dat").write_bytes(noise.randbytes(SIZE // 2) + text)


def once(image_path: str, output: str, what: str) -> None:
    """Write a changed copy of an image: the work that is measured."""
    from pysingularity.image import metadata
    from pysingularity.image.convert import to_file, with_changes
    from pysingularity.image.entries import Entry
    from pysingularity.image.open import open_image

    if what == "anew":
        to_file(image_path, output, compression="zstd", level=3, force=True)
        return
    entry = (
        Entry.file(metadata.LABELS, metadata.labels_file({"Version": "2"}))
        if what == "label"
        else Entry.file("opt/added", os.urandom(1 << 20))
    )
    with open_image(image_path) as image:
        with_changes(image, output, entries=[entry], force=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="a large SIF file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tmp", default="/var/tmp", help="folder for about 2 GiB of files")
    parser.add_argument("--recipe", action="store_true", help="measure `singularity build` as well")
    parser.add_argument("--anew", action="store_true", help="measure compressing everything (zstd 3) as well")
    parser.add_argument("--once", nargs=3, metavar=("IMAGE", "OUT", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        once(*options.once)
        return
    with tempfile.TemporaryDirectory(prefix="reuse-", dir=options.tmp) as folder:
        image = options.image
        if not image:
            from pysingularity.image.convert import assemble_sif

            make_tree(Path(folder, "tree"))
            image = os.path.join(folder, "base.sif")
            assemble_sif(os.path.join(folder, "tree"), image)
            shutil.rmtree(os.path.join(folder, "tree"))
        out = os.path.join(folder, "new.sif")
        print(f"{image}: {os.path.getsize(image) / (1 << 20):.0f} MiB\n")

        def changed(what: str) -> list[str]:
            return [sys.executable, __file__, "--once", image, out, what]

        series = [
            Series("cp", ["cp", "--reflink=auto", image, os.path.join(folder, "copy.sif")]),
            Series("one label changed", changed("label")),
            Series("one file of 1 MiB added", changed("file")),
        ]
        if options.recipe:
            recipe = Path(folder, "recipe.def")
            recipe.write_text(f"Bootstrap: localimage\nFrom: {image}\n\n%labels\n    Version 2\n")
            command = [sys.executable, "-m", "pysingularity", "build", "--force", out, str(recipe)]
            series.append(Series("singularity build, one label", command))
        if options.anew:
            series.append(Series("everything compressed anew (zstd 3)", changed("anew")))
        interleave(series, options.runs)
        table(series, base="cp")


if __name__ == "__main__":
    main()
