# SPDX-License-Identifier: Apache-2.0
"""What encryption costs: starts and reading, against the same image in the clear and against Apptainer with gocryptfs.

    bench/encrypted.py FOLDER [--tree ROOT] [--runs 10] [--megabytes 400]

FOLDER is a sandbox below /tmp whose /bin/cat and /bin/true run, and is not changed; images are made of a copy with a
file of noise and a file of text. With --tree (see bench/runtime.py) the peer runs the encrypted image that we made.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile

from common import Series, drop_privileges, enter_tree, interleave, table

KEY = "ENCRYPTION_PASSPHRASE=correct horse"
COLD, WARM = "SINGULARITY_IMAGE_KEEP=0", "SINGULARITY_IMAGE_KEEP=30"


def make(ours: str, folder: str, place: str, megabytes: int) -> tuple[str, str]:
    """Make an image and its encrypted twin."""
    box, plain, locked = (os.path.join(place, name) for name in ("box", "plain.sif", "locked.sif"))
    shutil.copytree(folder, box, symlinks=True)
    with open(f"{box}/noise", "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(megabytes))
    words = [random.Random(number).randbytes(6).hex().encode() + b"\n" for number in range(4000)]
    with open(f"{box}/text", "wb") as file:
        file.writelines(b"".join(random.Random(number).choices(words, k=80660)) for number in range(megabytes))
    subprocess.run([ours, "-q", "build", plain, box], check=True)
    subprocess.run(["env", f"SINGULARITY_{KEY}", ours, "-q", "build", "--encrypt", locked, box], check=True)
    shutil.rmtree(box)
    return plain, locked


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tree", help="root folder of a system with Apptainer, gocryptfs and a user of uid 1000")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--singularity", default=shutil.which("singularity"))
    parser.add_argument("--user", default="pysing")
    options = parser.parse_args()
    tree = enter_tree(options.tree)
    drop_privileges(options.user)
    ours = options.singularity
    with tempfile.TemporaryDirectory(prefix="bench-encrypted-", dir="/tmp") as place:
        os.chmod(place, 0o755)
        plain, locked = make(ours, options.folder, place, options.megabytes)
        print(f"plain {os.path.getsize(plain) >> 20} MiB, encrypted {os.path.getsize(locked) >> 20} MiB")
        for what, runs in ((["true"], options.runs), (["cat", "/noise"], 3), (["cat", "/text"], 3)):
            series = [
                Series("plain, cold", ["env", COLD, ours, "exec", plain, *what]),
                Series("plain, warm", ["env", WARM, ours, "exec", plain, *what]),
                Series("encrypted, cold", ["env", COLD, f"SINGULARITY_{KEY}", ours, "exec", locked, *what]),
                Series("encrypted, warm", ["env", WARM, f"SINGULARITY_{KEY}", ours, "exec", locked, *what]),
            ]
            if what != ["true"]:  # warm: out of the page cache
                series = [series[0], series[2]]
            if tree:
                from peer import PeerSeries

                words = ["env", f"APPTAINER_{KEY}", "apptainer", "exec", locked, *what]
                series.append(PeerSeries("encrypted: apptainer", tree, words))
            interleave(series, runs, dict(os.environ))
            print(f"\nexec {' '.join(what)} (processor time is without the servers')")
            table(series, base="plain, cold", unit=1000)


if __name__ == "__main__":
    main()
