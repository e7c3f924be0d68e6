# SPDX-License-Identifier: Apache-2.0
"""What works on this machine: each check looks or tries for itself and answers with a value and a remedy.

Trying beats reading settings: a check that concerns the kernel makes the very call in a child process, because the
reasons for a refusal (limits, AppArmor, an outer container's filter) are more than any list of files. Used by `doctor`.
"""

from __future__ import annotations

import os
import posix
import shutil

from pysingularity.linux import mounts, namespaces
from pysingularity.runtime import gpu, helpers

OK, WARNING, FAILED = "ok", "warning", "failed"


class Check:
    """One answer.

    Attributes:
        id: stable name for scripts ("user-namespaces").
        title: the question in a few words.
        state: OK, WARNING (something is slower or missing) or FAILED (containers cannot run).
        detail: what was found.
        remedy: what the user or the administrator can do; empty when nothing needs doing.
    """

    __slots__ = ("detail", "id", "remedy", "state", "title")

    def __init__(self, id: str, title: str, state: str, detail: str, remedy: str = "") -> None:  # noqa: A002
        self.id, self.title, self.state, self.detail, self.remedy = id, title, state, detail, remedy

    def __repr__(self) -> str:
        return f"Check({self.id}: {self.state}, {self.detail})"

    def json(self) -> dict[str, str]:
        """Return the check as a value for --json."""
        return {name: getattr(self, name) for name in ("id", "title", "state", "detail", "remedy")}


def all_checks(environ: dict[str, str], folders: dict[str, str]) -> list[Check]:
    """Return every check, the most important first.

    Arguments:
        folders: what a folder is for → its path; their free space is reported.
    """
    return [
        kernel(),
        user_namespaces(),
        fuse(),
        overlay(),
        ext3(),
        subordinate_ids(),
        system_call_notification(),
        cgroups(),
        network(),
        *gpus(),
        packages(),
        *(space(use, path) for use, path in folders.items()),
        start_up(environ),
    ]


def attempt(work: object) -> OSError | None:
    """Run a function in a child process and return the error it met, if any; nothing it does outlives it."""
    reader, writer = posix.pipe()
    pid = posix.fork()
    if pid == 0:
        number = 0
        try:
            posix.close(reader)
            work()  # type: ignore[operator]
        except OSError as error:
            number = error.errno or 255
            posix.write(writer, str(error).encode()[:1000])
        except BaseException:
            number = 255
        finally:
            posix._exit(number & 0xFF)
    posix.close(writer)
    text = b""
    while chunk := posix.read(reader, 4096):
        text += chunk
    posix.close(reader)
    status = os.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
    return OSError(status, text.decode("utf-8", "replace") or "the attempt ended early") if status else None


def kernel() -> Check:
    """Is the kernel new enough?"""
    release = posix.uname().release
    numbers = [int(part) for part in release.replace("-", ".").split(".")[:2] if part.isdigit()]
    new = numbers >= [5, 11]
    return Check(
        "kernel",
        "Linux",
        OK if new else WARNING,
        release,
        "" if new else "overlays for ordinary users need Linux 5.11; bind targets that an image lacks cost more below",
    )


def _namespace() -> None:
    uid, gid = posix.getuid(), posix.getgid()
    namespaces.unshare(namespaces.NEWUSER | namespaces.NEWNS)
    if uid:
        namespaces.map_self(0, 0, uid, gid)
    else:
        namespaces.map_self(0, 0, 0, 0)


def _mount() -> None:
    _namespace()
    mounts.mount("tmpfs", "/tmp", "tmpfs")


def _overlay() -> None:
    _mount()
    for name in ("low", "up", "work", "root"):
        posix.mkdir(f"/tmp/{name}")
    mounts.mount("overlay", "/tmp/root", "overlay", 0, "lowerdir=/tmp/low,upperdir=/tmp/up,workdir=/tmp/work,userxattr")


def _setting(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def user_namespaces() -> Check:
    """May this user make a user namespace and mount in it?"""
    title = "user namespaces"
    error = attempt(_mount)
    if error is None:
        limit = _setting("/proc/sys/user/max_user_namespaces")
        return Check("user-namespaces", title, OK, f"may be made and mounted in (limit {limit or 'unknown'})")
    remedy = "ask the administrator why unshare(CLONE_NEWUSER) is refused; inside a container its runtime decides"
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        remedy = "administrator: sysctl kernel.unprivileged_userns_clone=1"
    elif _setting("/proc/sys/user/max_user_namespaces") == "0":
        remedy = "administrator: sysctl user.max_user_namespaces=15000"
    elif _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        remedy = (
            "administrator: sysctl kernel.apparmor_restrict_unprivileged_userns=0, "
            "or an AppArmor profile with `userns,` for the Python interpreter"
        )
    return Check("user-namespaces", title, FAILED, error.strerror or str(error), remedy)


def fuse() -> Check:
    """May this user open /dev/fuse?"""
    title = "FUSE (images without unpacking)"
    try:
        posix.close(posix.open("/dev/fuse", posix.O_RDWR))
    except OSError as error:
        remedy = "administrator: modprobe fuse && chmod 666 /dev/fuse; until then images are unpacked before they run"
        return Check("fuse", title, WARNING, f"/dev/fuse: {error.strerror}", remedy)
    return Check("fuse", title, OK, "/dev/fuse opens")


def overlay() -> Check:
    """Does the kernel make overlays for this user?"""
    title = "overlays"
    error = attempt(_overlay)
    if error is None:
        return Check("overlay", title, OK, "may be made in a user namespace")
    remedy = "needs Linux 5.11 and the overlay module; --writable-tmpfs and --overlay do not work without"
    return Check("overlay", title, WARNING, error.strerror or str(error), remedy)


def ext3() -> Check:
    """Are the programs there that mount ext3 overlays for this user?"""
    title = "ext3 overlays and images"
    if posix.getuid() == 0 and os.path.exists("/dev/loop-control"):
        return Check("ext3", title, OK, "the kernel mounts them for root")
    missing = [name for name in ("fuse2fs", "fuse-overlayfs") if not helpers.find(name, os.environ.get("PATH", ""))]
    if missing:
        remedy = "folders for --overlay need none; administrator: install fuse2fs and fuse-overlayfs"
        return Check("ext3", title, WARNING, f"{' and '.join(missing)} not installed", remedy)
    return Check("ext3", title, OK, "fuse2fs and fuse-overlayfs are installed")


def subordinate_ids() -> Check:
    """Does this user have ranges in /etc/subuid and /etc/subgid, and the programs to use them?"""
    import pwd

    title = "subordinate ids (builds with real owners)"
    uid = posix.getuid()
    if uid == 0:
        return Check("subordinate-ids", title, OK, "root needs none")
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    counts = {}
    for path in ("/etc/subuid", "/etc/subgid"):
        parts = [line.split(":") for line in _setting(path).splitlines()]
        counts[path] = sum(
            int(line[2]) for line in parts if len(line) == 3 and line[0] in (name, str(uid)) and line[2].isdigit()
        )
    missing = [program for program in ("newuidmap", "newgidmap") if shutil.which(program) is None]
    fallback = "builds emulate root by system-call notification instead"
    if not all(counts.values()):
        lacking = ", ".join(path for path, count in counts.items() if not count)
        remedy = f"{fallback}; administrator: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
        return Check("subordinate-ids", title, WARNING, f"no range for {name} in {lacking}", remedy)
    if missing:
        detail = f"{' and '.join(missing)} not installed"
        return Check("subordinate-ids", title, WARNING, detail, f"{fallback}; administrator: install uidmap")
    least = min(counts.values())
    if least < 65536:
        remedy = f"image owners above {least} cannot be kept; administrator: give {name} at least 65536 ids"
        return Check("subordinate-ids", title, WARNING, f"only {least} ids", remedy)
    return Check("subordinate-ids", title, OK, f"{least} ids for {name}")


def system_call_notification() -> Check:
    """Can root be emulated in builds of users without subordinate ids?"""
    title = "system-call notification (root without root)"
    available = _setting("/proc/sys/kernel/seccomp/actions_avail").split()
    if "user_notif" in available:
        return Check("system-call-notification", title, OK, "the kernel offers it")
    detail = "the kernel does not offer it" if available else "this kernel has no seccomp filters"
    remedy = "needs Linux 5.6 with CONFIG_SECCOMP_FILTER; owners in images of one-id builds become root"
    return Check("system-call-notification", title, WARNING, detail, remedy)


def cgroups() -> Check:
    """Has this user a cgroup v2 subtree to set limits in?"""
    title = "cgroups (limits)"
    own = ""
    for line in _setting("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = line[3:]
    for base in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.path.exists(f"{base}/cgroup.controllers"):
            path = base + own.rstrip("/")
            controllers = _setting(f"{path}/cgroup.controllers")
            if os.access(f"{path}/cgroup.procs", os.W_OK) and os.access(path, os.W_OK) and controllers:
                return Check("cgroups", title, OK, f"{path} is ours: {controllers}")
            detail = f"{path} is not ours" if controllers else f"{path} has no controllers"
            remedy = (
                "limits (--memory, --cpus ...) need a delegated subtree: systemd-run --user --scope -p Delegate=yes"
            )
            return Check("cgroups", title, WARNING, detail, remedy)
    remedy = "limits (--memory, --cpus ...) need cgroup v2; inside a batch job the scheduler's limits hold anyway"
    return Check("cgroups", title, WARNING, "no cgroup v2 here", remedy)


def network() -> Check:
    """Is there a program that connects a network namespace without root?"""
    title = "private networks"
    found = [program for program in ("pasta", "slirp4netns") if shutil.which(program)]
    if found and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        remedy = "--net works with --network none only; administrator: modprobe tun; chmod 666 /dev/net/tun"
        return Check("network", title, WARNING, f"{found[0]} is installed, and /dev/net/tun may not be opened", remedy)
    if found:
        return Check("network", title, OK, f"{found[0]} is installed")
    remedy = "--net works with --network none only; administrator: install passt or slirp4netns"
    return Check("network", title, WARNING, "neither pasta nor slirp4netns", remedy)


def gpus() -> list[Check]:
    """What would --nv and --rocm bind?"""
    checks = []
    for name, option, found in (("nvidia", "--nv", gpu.nvidia()), ("rocm", "--rocm", gpu.rocm())):
        title = f"GPU ({option})"
        if found.missing:
            checks.append(Check(name, title, WARNING, "; ".join(found.missing), f"{option} binds nothing here"))
            continue
        what = [name for name, _ in found.libraries] + [path for path, _ in found.files] + found.devices
        checks.append(Check(name, title, OK, f"would bind {len(what)}: {' '.join(what)}"))
    return checks


def packages() -> Check:
    """Which of the optional Python packages can be imported?"""
    import importlib.util

    uses = {
        "deflate": "reading and writing images fast",
        "isal": "reading layers fast",
        "urllib3": "pull and push",
    }
    missing = [f"{name} ({use})" for name, use in uses.items() if importlib.util.find_spec(name) is None]
    title = "Python packages"
    if missing:
        return Check("packages", title, WARNING, "missing: " + ", ".join(missing), "pip install pysingularity again")
    return Check("packages", title, OK, ", ".join(uses))


def space(use: str, path: str) -> Check:
    """How much room is in a folder (or where it would be made), and on what kind of file system?"""
    name = "space-" + use.replace(" ", "-")
    found = os.path.abspath(path)
    while not os.path.isdir(found) and found != "/":
        found = os.path.dirname(found)
    kind, point = _file_system(found)
    state = os.statvfs(found)
    free = state.f_bavail * state.f_frsize
    detail = f"{path}: {free / 2**30:.1f} GiB free on {kind}"
    title = f"space for {use}"
    variable = "SINGULARITY_CACHEDIR" if use == "the cache" else "SINGULARITY_TMPDIR"
    if not os.access(found, os.W_OK):
        return Check(name, title, WARNING, f"{path} cannot be written", f"set {variable} to a folder of yours")
    if kind == "tmpfs":
        remedy = f"{point} is memory: large builds fill it; set {variable} to a disk"
        return Check(name, title, WARNING, detail, remedy)
    if free < 4 << 30:
        return Check(name, title, WARNING, detail, f"less than 4 GiB; set {variable} to a larger disk")
    return Check(name, title, OK, detail)


def _file_system(path: str) -> tuple[str, str]:
    """Return (type, mount point) of the file system that holds a path (proc_pid_mountinfo(5))."""
    best = ("unknown", "/")
    length = 0
    for line in _setting("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= length:
            length, best = len(point), (right.split()[0], point)
    return best


def start_up(environ: dict[str, str]) -> Check:
    """Do .pth files slow every start of the interpreter that does not go through our launcher?"""
    import sys
    import sysconfig

    title = "start-up"
    slow = []
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        try:
            names = [name for name in os.listdir(folder) if name.endswith(".pth")]
        except OSError:
            continue
        slow += [
            f"{folder}/{name}"
            for name in names
            if any(line.startswith(("import ", "import\t")) for line in _setting(f"{folder}/{name}").splitlines())
        ]
    detail = f"Python {sys.version.split()[0]}, {sys.executable or environ.get('_', 'unknown')}"
    if slow:
        remedy = "they run at every start of `python -m pysingularity`; the installed launcher skips them"
        return Check("start-up", title, WARNING, f"{detail}; .pth files with code: {' '.join(sorted(slow))}", remedy)
    return Check("start-up", title, OK, detail)
