# SPDX-License-Identifier: Apache-2.0
"""Read a squashfs through our FUSE server and through squashfuse_ll, each freshly mounted for every run, in turn.

    bench/serve.py IMAGE [--runs 5] [--large PATH-IN-IMAGE]

Metadata is `find` asking for the size of everything; the small files are those of the largest folder tree below
usr/lib, read by one and by four readers at once; the large file is read from end to end. Everything runs as an ordinary
user inside a user namespace of its own; the image's own blocks are in the page cache for both. The last table is the
image mounted once and read twice: then the kernel answers.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from common import Series, drop_privileges, interleave, table

from pysingularity.image.mount import serve
from pysingularity.image.open import open_image
from pysingularity.linux import mounts, namespaces
from pysingularity.linux.process import become_subreaper, set_dumpable


def mounted(kind: str, image: str, command: str) -> tuple[float, float]:
    """Mount an image, run a shell command in its root; return the command's seconds, and the processors' of all."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            wall = _inside(kind, image, command)
            while True:  # the server too is a child of this process, and counted once it has been collected
                try:
                    os.wait()
                except ChildProcessError:
                    break
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            os.write(writer, f"{wall} {used.ru_utime + used.ru_stime}".encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    text = os.read(reader, 64)
    os.close(reader)
    if os.waitpid(child, 0)[1] or not text:
        sys.exit(f"{kind}: {command} failed")
    wall, cpu = text.split()
    return float(wall), float(cpu)


def _inside(kind: str, image: str, command: str) -> float:
    with open_image(image) as found:
        path, offset, size = os.path.abspath(image), found.offset, found.size
    uid, gid = os.getuid(), os.getgid()
    become_subreaper()
    namespaces.unshare(namespaces.NEWUSER)
    namespaces.map_self(0, 0, uid, gid)
    pending = serve(path, offset, size, (0, 0)) if kind == "ours" else None
    namespaces.unshare(namespaces.NEWNS)
    mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_SLAVE)
    place = tempfile.mkdtemp(prefix="bench-serve-")
    server = None
    if pending:
        pending.mount(place)
    else:
        server = subprocess.Popen(
            ["squashfuse_ll", "-f", "-o", f"offset={offset}", path, place], stderr=subprocess.DEVNULL
        )
        while not os.path.ismount(place):
            time.sleep(0.005)
    try:
        started = time.perf_counter()
        # Folders of owners that the namespace does not know are closed to both: find's complaint is no failure.
        null = subprocess.DEVNULL
        subprocess.run(["sh", "-c", f"{command} || true"], cwd=place, check=True, stdout=null, stderr=null)
        return time.perf_counter() - started
    finally:
        mounts.unmount(place, mounts.MNT_DETACH)
        if server:
            server.send_signal(signal.SIGTERM)
            server.wait()
        if pending:
            pending.close()
        os.rmdir(place)


class Mounted(Series):
    """A series that counts only what is done in the mounted image."""

    def __init__(self, name: str, kind: str, image: str, command: str) -> None:
        super().__init__(name, [])
        self.kind, self.image, self.text = kind, image, command

    def once(self, environ: dict[str, str] | None = None, count: bool = True) -> None:  # noqa: ARG002
        """Mount, run, unmount; note the seconds between, and the processor seconds of reader and server."""
        wall, cpu = mounted(self.kind, self.image, self.text)
        if count:
            self.wall.append(wall)
            self.cpu.append(cpu)
            self.peak.append(0)


def largest(image: str) -> str:
    """Return the path of the image's largest file."""
    from pysingularity.image.inside import squashfs_of
    from pysingularity.squashfs import layout

    with open_image(image) as found:
        best = max((inode.size, path) for path, inode in squashfs_of(found).walk() if inode.type == layout.FILE)
    return os.fsdecode(best[1]).lstrip("/")


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", help="a large file in the image; its largest one by default")
    parser.add_argument("--user", default="pysing")
    options = parser.parse_args()
    if not shutil.which("squashfuse_ll"):
        sys.exit("needs squashfuse_ll (squashfuse)")
    large = options.large or largest(options.image)
    drop_privileges(options.user)
    set_dumpable(True)  # who has changed its user may not write its own id maps otherwise
    os.environ["TMPDIR"] = "/tmp"
    small = "find usr/lib usr/share -type f -size -64k -print0"
    works = {
        "metadata (find, sizes)": "find . -printf %s",
        "small files, 1 reader": f"{small} | xargs -0 cat",
        "small files, 4 readers": f"{small} | xargs -0 -P 4 -n 200 cat",
        "large file, from end to end": f"dd if='{large}' bs=1M",
        "large file, twice": f"cat '{large}'; cat '{large}'",
        "metadata, twice": "find . -printf %s; find . -printf %s",
    }
    print(f"{options.image}, large file: {large}")
    for name, command in works.items():
        series = [Mounted(f"{name}: {kind}", kind, options.image, command) for kind in ("squashfuse_ll", "ours")]
        interleave(series, options.runs)
        table(series, base=series[0].name, unit=1000)


if __name__ == "__main__":
    main()
