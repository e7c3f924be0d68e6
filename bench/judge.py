# SPDX-License-Identifier: Apache-2.0
"""Is our merge of layers right? Compare every entry of a pulled image with what `umoci unpack` makes of the layout.

    python bench/judge.py /var/tmp/pysingularity-large large [--place DIR]

Compared are kind, mode, owner, time, link count, device, link target, content (SHA-256) and extended attributes of
every path. Left out are our own files in `/.singularity.d`, and times of folders that no layer names. Needs root (to
unpack owners and devices), umoci, and room for the unpacked tree. Prints a count, or what differs; ends with 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pysingularity import thirdparty
from pysingularity.image.entries import Entry
from pysingularity.image.metadata import base_entries
from pysingularity.image.open import open_image
from pysingularity.squashfs.reader import SquashfsImage

thirdparty.enable()
KINDS = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}
Facts = dict[str, object]


def from_folder(top: bytes) -> dict[bytes, Facts]:
    """Return what an unpacked tree holds, by path."""
    found: dict[bytes, Facts] = {}
    for folder, dirs, files in os.walk(top):
        for name in dirs + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            kind = KINDS[stat.S_IFMT(status.st_mode)]
            facts: Facts = {"kind": kind, "uid": status.st_uid, "gid": status.st_gid, "mtime": int(status.st_mtime)}
            if kind != "symlink":
                facts["mode"] = stat.S_IMODE(status.st_mode)
                facts["xattrs"] = {os.fsencode(one): os.getxattr(path, one) for one in os.listxattr(path)}
            if kind == "file":
                with open(path, "rb") as file:
                    facts["content"] = hashlib.file_digest(file, "sha256").hexdigest()
            elif kind == "symlink":
                facts["target"] = os.readlink(path)
            elif kind in ("char", "block"):
                facts["rdev"] = status.st_rdev
            if kind != "dir":
                facts["links"] = status.st_nlink
            found[os.path.relpath(path, top)] = facts
    return found


def from_image(path: str) -> dict[bytes, Facts]:
    """Return what an image holds, by path."""
    found: dict[bytes, Facts] = {}
    known: dict[int, str] = {}
    with open_image(path) as image:
        squashfs = SquashfsImage(image.fd, image.offset, image.size)
        for name, inode in squashfs.walk():
            if not name.strip(b"/"):
                continue
            facts: Facts = {"kind": inode.kind, "uid": inode.uid, "gid": inode.gid, "mtime": inode.mtime}
            if inode.kind != "symlink":
                facts["mode"] = inode.mode
                facts["xattrs"] = dict(squashfs.xattrs(inode))
            if inode.kind == "file":
                content = known.get(inode.number) if inode.nlink > 1 else None
                if content is None:
                    digest = hashlib.sha256()
                    for at in range(0, inode.size, 1 << 22):
                        digest.update(squashfs.read(inode, at, min(1 << 22, inode.size - at)))
                    content = known[inode.number] = digest.hexdigest()
                facts["content"] = content
            elif inode.kind == "symlink":
                facts["target"] = inode.target
            elif inode.kind in ("char", "block"):
                facts["rdev"] = inode.rdev
            if inode.kind != "dir":
                facts["links"] = inode.nlink
            found[name.strip(b"/")] = facts
    return found


def own_paths() -> set[bytes]:
    """Return the paths that every image of ours gets."""
    return {os.fsencode(entry.path) for entry in base_entries() if isinstance(entry, Entry)}


def main() -> int:
    """Unpack, pull, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has layout/, as largeimage.py makes it")
    parser.add_argument("tag")
    parser.add_argument("--place", default="/var/tmp")
    parser.add_argument("--user", default="pysing", help="who pulls: real owners must come out all the same")
    arguments = parser.parse_args()
    place = tempfile.mkdtemp(prefix="judge-", dir=arguments.place)
    try:
        started = time.time()
        layout = f"{arguments.folder}/layout:{arguments.tag}"
        subprocess.run(["umoci", "unpack", "--image", layout, f"{place}/bundle"], check=True, capture_output=True)
        os.chmod(place, 0o777)
        command = [str(Path(sys.executable).parent / "singularity"), "pull", f"{place}/image.sif", f"oci:{layout}"]
        environ = {**os.environ, "SINGULARITY_CACHEDIR": place, "SINGULARITY_TMPDIR": place, "HOME": place}
        subprocess.run(["setpriv", f"--reuid={arguments.user}", "--clear-groups", *command], env=environ, check=True)
        wanted = from_folder(os.fsencode(f"{place}/bundle/rootfs"))
        found = from_image(f"{place}/image.sif")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    own = own_paths()
    wrong = 0
    for path in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(path), found.get(path)
        if path.startswith(b".singularity.d") or (one is None and path in own):
            continue
        if one is not None and other is not None:
            unnamed = one["kind"] == "dir" and int(str(one["mtime"])) >= int(started)  # made by the unpacking
            names = [name for name in one if one[name] != other[name] and not (name == "mtime" and unnamed)]
            if not names:
                continue
            differs = ", ".join(f"{name} {one[name]!r} here {other[name]!r}" for name in names)
        else:
            differs = "only in umoci's" if other is None else "only in ours"
        wrong += 1
        if wrong <= 40:
            print(f"{os.fsdecode(path)!r}: {differs}")
    print(f"{len(wanted)} entries compared, {wrong} differ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
