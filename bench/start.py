# SPDX-License-Identifier: Apache-2.0
"""How long `exec true` takes, against Apptainer and bubblewrap in the same minute, as an ordinary user.

    bench/start.py SANDBOX IMAGE.sif [--tree ROOT] [--runs 40] [--singularity PROGRAM]

SANDBOX and IMAGE must lie below /tmp, which the tree of the peer (a root folder with Apptainer in it, entered once by
root) shares. Without --tree, Apptainer is left out. Warm images are switched off for the cold figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from common import Series, drop_privileges, interleave, table


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sandbox")
    parser.add_argument("image")
    parser.add_argument("--tree", help="root folder of a system with Apptainer and a user of uid 1000")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--singularity", default=shutil.which("singularity"))
    parser.add_argument("--user", default="pysing")
    options = parser.parse_args()
    tree = None
    if options.tree:
        if os.getuid() != 0:
            sys.exit("--tree needs root, to enter the tree; everything measured runs as ordinary users")
        from peer import Tree

        tree = Tree(options.tree)
    drop_privileges(options.user)
    ours = options.singularity
    python = os.path.join(os.path.dirname(os.path.realpath(ours)), "python3")
    series = [
        Series("python3 -I -S -c pass", [python, "-I", "-S", "-c", "pass"]),
        Series("sandbox: singularity", [ours, "exec", options.sandbox, "true"]),
        Series(
            "SIF cold: singularity",
            ["env", "SINGULARITY_IMAGE_KEEP=0", ours, "exec", options.image, "true"],
        ),
        Series("SIF warm: singularity", [ours, "exec", options.image, "true"]),
        Series("sandbox, --pid: singularity", [ours, "exec", "--pid", options.sandbox, "true"]),
    ]
    if shutil.which("bwrap"):
        series.append(
            Series(
                "sandbox: bubblewrap",
                [
                    "bwrap",
                    "--ro-bind",
                    options.sandbox,
                    "/",
                    "--dev-bind",
                    "/dev",
                    "/dev",
                    "--proc",
                    "/proc",
                    "--bind",
                    "/tmp",
                    "/tmp",
                    "true",
                ],
            )
        )
    if tree:
        from peer import PeerSeries

        series.append(PeerSeries("sandbox: apptainer", tree, ["apptainer", "exec", options.sandbox, "true"]))
        series.append(PeerSeries("SIF: apptainer", tree, ["apptainer", "exec", options.image, "true"]))
    interleave(series, options.runs, dict(os.environ), warmup=2)
    table(series, base="sandbox: apptainer" if tree else "sandbox: singularity", unit=1000)
    if tree:
        print()
        table([one for one in series if one.name.startswith("SIF")], base="SIF: apptainer", unit=1000)


if __name__ == "__main__":
    main()
