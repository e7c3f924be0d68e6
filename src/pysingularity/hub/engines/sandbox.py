# SPDX-License-Identifier: Apache-2.0
"""A throw-away room for what strangers wrote: run as `python -m pysingularity.hub.engines.sandbox SPEC PROGRAM…`.

User, mount, pid, ipc, uts, cgroup and network namespaces; a root made of the system's own programs (read-only), the
clone (read-only) and a scratch folder. Nothing else of the machine has a name in it: no data folder, no home, no other
process, no network but loopback, where a forwarder leads to the job's filtering proxy. Its root is not the hub's
account wherever subordinate ids (or real root) allow another one. Ends when its first program ends, and kills what is
left.

Order matters: host folders are cloned as detached mounts while we may still walk to them, then we become the sandbox's
own root, then the new root is put together and the old one is dropped. Sources: user_namespaces(7), open_tree(2).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

from pysingularity.linux import mounts, namespaces, process, seccomp

#: Ids of a sandbox.
IDS = 65536
#: Where the hub's account appears when the sandbox has ids of its own; nobody inside can become it.
SELF = IDS
#: First host id of sandboxes of a hub that runs as real root, which may use any ids.
ROOT_BASE = 1_879_048_192
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    *("ssl", "ca-certificates", "ca-certificates.conf", "pki", "alternatives", "ld.so.cache", "ld.so.conf"),
    *("ld.so.conf.d", "apt", "localtime", "nsswitch.conf", "protocols", "services", "mime.types", "os-release"),
    *("debian_version", "python3", "python3.11", "singularity", "apptainer", "login.defs", "yum.repos.d", "dnf"),
)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
PROXY_PORT = 3128
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
#: Calls that no build needs and in which the kernel's holes were found, or that reach beyond namespaces (keyrings).
FORBIDDEN = (
    *("keyctl", "add_key", "request_key", "perf_event_open", "bpf", "userfaultfd", "io_uring_setup", "io_uring_enter"),
    *("io_uring_register", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    *("open_by_handle_at", "fanotify_init", "acct", "swapon", "swapoff", "reboot", "syslog", "quotactl"),
)
#: Kinds of sockets that builds have: UNIX, INET, INET6, NETLINK, PACKET. Others lead past the network namespace (VSOCK
#: to the machine below this one) or to seldom used parts of the kernel.
FAMILIES = (1, 2, 10, 16, 17)


def main(words: list[str]) -> int:
    """Make the room that the file of words[0] describes, and run the rest of the words in it.

    The specification: `source`, `scratch`, `readable`, `egress_folder`, `network`, `limits`, `environment`, `folder`
    (where the program starts, a path inside), `links` (pairs: path inside the clone, what it points to), `seed`.
    """
    with open(words[0], encoding="utf-8") as file:
        spec: dict[str, Any] = json.load(file)
    flags = namespaces.NEWUSER | namespaces.NEWNS | namespaces.NEWPID | namespaces.NEWIPC | namespaces.NEWUTS
    flags |= namespaces.NEWCGROUP
    if spec["network"] != "host":
        flags |= namespaces.NEWNET
    own = _unshare(flags, spec)
    mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
    trees = _clone(spec)
    if own:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    process.set_dumpable(True)
    process.die_with_parent(parent=int(spec.get("parent") or 0))
    child = os.fork()
    if child == 0:
        try:
            process.die_with_parent()
            status = _first(spec, trees, words[1:])
        except BaseException as error:
            _complain(error)
            status = 254
        os._exit(status)
    for tree in trees.values():
        os.close(tree)
    _, status = os.waitpid(child, 0)
    return process.leave_like(status)


def _complain(error: BaseException) -> None:
    text = f"sandbox: {type(error).__name__}: {error}\n"
    os.write(2, text.encode("utf-8", "replace"))


def enter_ids() -> None:
    """Enter a user namespace with the ids that sandboxes of this account have (to remove what they left)."""
    _unshare(namespaces.NEWUSER, {"owned": []})


# --- ids -------------------------------------------------------------------------------------------------------------


def _unshare(flags: int, spec: dict[str, Any]) -> bool:
    """Enter the namespaces and map ids; return whether there is a whole range of them.

    A child that stays outside writes the maps: the kernel wants somebody with rights over the ids, or a helper.
    """
    uid, gid = os.geteuid(), os.getegid()
    ready_read, ready = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(ready)
            os.read(ready_read, 1)
            os._exit(0 if _map_range(me, uid, gid, int(spec.get("seed", 0)), spec) else 1)
        except BaseException as error:
            _complain(error)
            os._exit(1)
    os.close(ready_read)
    namespaces.unshare(flags)
    os.write(ready, b"x")
    os.close(ready)
    _, status = os.waitpid(helper, 0)
    if status == 0:
        if uid != 0:
            for path in spec["owned"]:
                os.chown(path, 0, 0)
        return True
    namespaces.map_self(0, 0, uid, gid)
    return False


def _map_range(pid: int, uid: int, gid: int, seed: int, spec: dict[str, Any]) -> bool:
    if uid == 0:
        base = ROOT_BASE + (seed % 4096) * IDS
        for path in spec["owned"]:
            os.chown(path, base, base)
        for name in ("gid_map", "uid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {base} {IDS}\n")
        return True
    ranges = [_subordinate(path, uid) for path in ("/etc/subuid", "/etc/subgid")]
    if None in ranges:
        return False
    for program, own, first in (("newuidmap", uid, ranges[0]), ("newgidmap", gid, ranges[1])):
        argv = [program, str(pid), "0", str(first), str(IDS), str(SELF), str(own), "1"]
        try:
            if subprocess.run(argv, check=False, capture_output=True).returncode:
                return False
        except FileNotFoundError:
            return False
    return True


def _subordinate(path: str, uid: int) -> int | None:
    import pwd

    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
        with open(path, encoding="utf-8") as file:
            rows = [line.strip().split(":") for line in file]
    except (OSError, KeyError):
        return None
    for row in rows:
        if len(row) == 3 and row[0] in names and int(row[2]) >= IDS:
            return int(row[1])
    return None


# --- the new root ----------------------------------------------------------------------------------------------------


def _clone(spec: dict[str, Any]) -> dict[str, int]:
    """Return detached copies of every host path that the room will show, by their place inside."""
    system = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV
    trees: dict[str, int] = {}

    def add(source: str, target: str, attributes: int) -> None:
        tree = mounts.open_tree(source)
        if attributes:
            mounts.set_attributes(tree, attributes)
        trees[target] = tree

    for path in (*SYSTEM, *(f"/etc/{name}" for name in ETC), *spec["readable"]):
        if os.path.exists(path) and not (os.path.islink(path) and path in SYSTEM) and not _inside(path, trees):
            add(os.path.realpath(path) if path.startswith("/etc/") else path, path, system)
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            add(f"/dev/{name}", f"/dev/{name}", mounts.ATTR_NOSUID)
    add(spec["source"], "/source", 0)  # made read-only after the links are in it
    add(spec["scratch"], "/scratch", mounts.ATTR_NOSUID | mounts.ATTR_NODEV)
    if spec["network"] == "proxy":
        add(spec["egress_folder"], "/run/egress", mounts.ATTR_NOSUID)
    if spec["network"] == "host" and os.path.exists("/etc/resolv.conf"):
        add(os.path.realpath("/etc/resolv.conf"), "/etc/resolv.conf", system)
    return trees


def _inside(path: str, trees: dict[str, int]) -> bool:
    return any(path == other or path.startswith(other + "/") for other in trees)


def _first(spec: dict[str, Any], trees: dict[str, int], words: list[str]) -> int:
    """Be the room's first process: finish the root, start the program, reap, and end with its status."""
    root = "/tmp"
    mounts.mount("tmpfs", root, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=0755,uid=0,gid=0,size=64m")
    for folder in ("proc", "sys", "dev", "dev/pts", "dev/shm", "etc", "run", "tmp", "var", "root", "home", "old"):
        os.mkdir(f"{root}/{folder}")
    os.symlink("../tmp", f"{root}/var/tmp")
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
    for name, text in _etc(spec).items():
        with open(f"{root}/etc/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    # The room's own /tmp first: something readable may lie below the host's.
    _attach(trees.pop("/scratch"), f"{root}/scratch")
    mounts.mount(f"{root}/scratch/tmp", f"{root}/tmp", None, mounts.MS_BIND)
    for target, tree in trees.items():
        _attach(tree, root + target)
    mounts.mount("proc", f"{root}/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    _sysfs(f"{root}/sys")
    mounts.mount("devpts", f"{root}/dev/pts", "devpts", mounts.MS_NOSUID, "newinstance,ptmxmode=0666,mode=0620")
    mounts.mount("tmpfs", f"{root}/dev/shm", "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=1777,size=512m")
    for name, to in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ):
        os.symlink(to, f"{root}/dev/{name}")
    os.chdir(root)
    mounts.pivot_root(".", "old")
    os.chdir("/")
    mounts.unmount("/old")
    os.rmdir("/old")
    _links(spec)
    source = mounts.open_tree("/source")
    mounts.set_attributes(source, mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV)
    _attach(source, "/source")
    mounts.mount(
        None, "/", None, mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
    )
    namespaces.sethostname("build")
    if spec["network"] != "host":
        _loopback_up()
    listener = _listen() if spec["network"] == "proxy" else None
    process.no_new_privs()
    _limit(spec["limits"])
    os.chdir(spec["folder"])
    child = os.fork()
    if child == 0:
        try:
            process.restore_signals()
            process.close_range(3)
            _expendable()
            seccomp.install(_filter())
            os.execve(words[0], words, spec["environment"])
        except OSError as error:
            _complain(error)
        os._exit(127)
    if listener is not None:
        threading.Thread(target=_forward, args=(listener,), daemon=True).start()
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _etc(spec: dict[str, Any]) -> dict[str, str]:
    files = {
        "passwd": "root:x:0:0:root:/scratch/home:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost build\n::1 localhost\n",
        "hostname": "build\n",
    }
    if spec["network"] != "host":
        files["resolv.conf"] = "# names are resolved by the proxy\n"
    return files


def _attach(tree: int, target: str) -> None:
    """Put a detached mount on a place that is made for it."""
    status = os.fstat(tree)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if status.st_mode & 0o170000 == 0o040000:
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    place = os.open(target, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        mounts.move_mount(tree, place)
    finally:
        os.close(place)
        os.close(tree)


def _sysfs(target: str) -> None:
    try:
        mounts.mount("sysfs", target, "sysfs", mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    except OSError as error:
        # A container around the hub may have covered parts of /sys; builds live without it.
        if error.errno not in (errno.EPERM, errno.EBUSY):
            raise


def _links(spec: dict[str, Any]) -> None:
    """Make the second choice of %files: links in the recipe's folder to files of the repository's root.

    The clone is a copy for this build, still writable here; a hostile clone can only mislead itself.
    """
    for name, to in spec["links"]:
        path = os.path.join("/source", name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(to, path)
        except OSError:  # it is in the way of itself; the build says what is missing
            continue


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _limit(limits: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The job looks at what all processes use together, now and then; one alone cannot grow beyond it meanwhile.
    kinds = {"file": resource.RLIMIT_FSIZE, "processes": resource.RLIMIT_NPROC, "memory": resource.RLIMIT_DATA}
    for name, which in kinds.items():
        if limits.get(name):
            hard = resource.getrlimit(which)[1]
            value = limits[name] if hard == resource.RLIM_INFINITY else min(hard, limits[name])
            resource.setrlimit(which, (value, value))


def _filter() -> bytes:
    """Return the filter of system calls that every program of the room is under.

    They are said not to exist, so that programs with another way take it.
    """
    refuse = seccomp.ERRNO | errno.ENOSYS
    rules = [seccomp.Rule(name, refuse) for name in FORBIDDEN]
    rules += [
        seccomp.Rule("socket", seccomp.ALLOW, argument=0, values=FAMILIES),
        seccomp.Rule("socket", seccomp.ERRNO | errno.EAFNOSUPPORT),
    ]
    return seccomp.assemble(rules, seccomp.architectures())


def _expendable() -> None:
    """Ask the kernel to end builds before anything else when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:  # a choice of the site
        pass


# --- the way out -----------------------------------------------------------------------------------------------------


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PROXY_PORT))
    listener.listen(128)
    return listener


def _forward(listener: socket.socket) -> None:
    """Lead connections to loopback's proxy port over the socket that the job gave us."""
    while True:
        inner, _ = listener.accept()
        outer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            outer.connect("/run/egress/proxy")
        except OSError:
            inner.close()
            outer.close()
            continue
        for one, other in ((inner, outer), (outer, inner)):
            threading.Thread(target=pump, args=(one, other), daemon=True).start()


def pump(one: socket.socket, other: socket.socket) -> None:
    """Copy bytes from one socket to another until the first says that there are no more."""
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
    except OSError:  # either side went away
        pass
    try:
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as failure:
        _complain(failure)
        sys.exit(254)
