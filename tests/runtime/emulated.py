# SPDX-License-Identifier: Apache-2.0
"""Run a program as (emulated) root in a tree, as the ordinary user who calls this: emulated.py ROOT PROGRAM...

Afterwards every path of the tree is printed as it would go into an image, when SCAN names a file for it.
"""

from __future__ import annotations

import json
import os
import sys

from pysingularity.linux.ownership import strip
from pysingularity.runtime import emulate
from pysingularity.runtime import spec as launch
from pysingularity.runtime.enter import run
from pysingularity.runtime.rootless import Way, become_root

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def scan(root: str, way: Way) -> dict[str, object]:
    """Return path → what an image gets of it."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            uid, gid, mode, rdev = way.owners.get(path, os.lstat(path))
            names = os.listxattr(path, follow_symlinks=False)
            values = {one.encode(): os.getxattr(path, one, follow_symlinks=False) for one in names}
            kept = {key.decode(): value.hex() for key, value in strip(values).items()}
            found[path[len(root) :]] = [f"{mode:o}", uid, gid, rdev, kept]
    return found


def unpack(archive: str, folder: str, way: Way) -> None:
    """Unpack a tar file with its owners."""
    import tarfile

    later = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = os.path.join(folder, member.name)
            if member.isdir():
                os.makedirs(path, exist_ok=True)
                later.append((path, member.mode))
            elif member.isdev() and not member.isfifo():
                kind = 0o020000 if member.ischr() else 0o060000
                way.owners.mknod(path, kind | member.mode, os.makedev(member.devmajor, member.devminor))
            elif member.islnk():
                os.link(os.path.join(folder, member.linkname), path)
                continue
            else:
                tar.extract(member, folder, set_attrs=False)
            way.owners.set(path, member.uid, member.gid)
            if member.isfile():
                os.chmod(path, member.mode)
            for key, value in member.pax_headers.items():
                if key.startswith("SCHILY.xattr."):
                    os.setxattr(path, key[13:], value.encode("utf-8", "surrogateescape"))
    for path, mode in reversed(later):
        os.chmod(path, mode)


def main() -> int:
    """Do as the arguments say."""
    root, *argv = sys.argv[1:]
    way = become_root()
    if "UNPACK" in os.environ:
        unpack(os.environ["UNPACK"], root, way)
    mounts = [
        launch.Mount(launch.PROC, "/proc"),
        launch.Mount(launch.BIND, "/sys", source="/sys"),
        launch.Mount(launch.BIND, "/dev", source="/dev", trusted=True),
    ]
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        if os.path.exists(name):
            with open(name, "rb") as file:
                mounts.append(launch.Mount(launch.FILE, name, content=file.read(), mode=0o644))
    env = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C", "DEBIAN_FRONTEND": "noninteractive"}
    env |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    apt = emulate.apt_workaround(way)
    if apt:
        mounts.append(launch.Mount(launch.FILE, "/tmp/apt.conf", content=apt.encode(), mode=0o644))
        env["APT_CONFIG"] = "/tmp/apt.conf"
    emulation = emulate.prepare(way)
    status = run(
        launch.LaunchSpec(
            image=launch.Layer(launch.SANDBOX, root),
            argv=argv,
            env=env,
            writable=True,
            create=True,
            mounts=mounts,
            identity=launch.KEEP,
            pid_namespace=True,
            no_new_privs=False,
            squash_owners=False,
            emulate_root=emulation,
            keep_descriptors=(),
            name="test",
        )
    )
    if emulation:
        emulation.finish()
    if "SCAN" in os.environ:
        with open(os.environ["SCAN"], "w") as file:
            json.dump(scan(root, way), file)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
