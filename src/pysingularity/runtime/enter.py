# SPDX-License-Identifier: Apache-2.0
"""LaunchSpec to process: the hot end. Everything was decided before; here it is done, in one fixed order.

Without a pid namespace nothing is forked: the process that the user started becomes the container's program, so exit
status, signals, job control and the controlling terminal are exact by construction. The order of the calls is forced by
the kernel; where that is surprising a comment says why. Start ring: what only image files, pid namespaces or networks
need is imported when they are asked for, but always before `pivot_root`: after it the interpreter's own library is out
of sight.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import HostError, SingularityError, UserError
from pysingularity.linux import capabilities
from pysingularity.linux.mounts import MNT_DETACH, MS_REC, MS_SLAVE, mount, move_mount, pivot_root, unmount
from pysingularity.linux.namespaces import NEWNET, NEWNS, NEWPID, NEWUSER, map_self, sethostname, setns, unshare
from pysingularity.linux.process import (
    SIGKILL,
    close_others,
    die_with_parent,
    forget_variables,
    leave_like,
    no_new_privs,
    restore_signals,
)
from pysingularity.runtime.actions import program
from pysingularity.runtime.binds import attach, ordered
from pysingularity.runtime.environment import EnvironmentPlan, compose, find_program, origins
from pysingularity.runtime.overlay import Session
from pysingularity.runtime.spec import EXT, KEEP, ROOT, SELF, SQUASHFS, LaunchSpec, Layer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from pysingularity.image.mount import Pending
    from pysingularity.runtime.helpers import Helpers
    from pysingularity.runtime.warm import Warm

_ENOENT, _EACCES, _EPERM, _ENOSPC, _ENOEXEC, _EINVAL, _EIO = 2, 13, 1, 28, 8, 22, 5


def enter(spec: LaunchSpec) -> NoReturn:
    """Become the program that `spec` describes, in its container. Returns only by raising.

    Raises:
        SingularityError: the container could not be made, or the program is not there.
    """
    if spec.before_start is not None:
        spec.before_start()
    if spec.connection is not None:
        spec.connection.outside()
    warm = _warm(spec)
    if spec.helped() and not spec.pid_namespace:
        _beside(spec, warm)
    if not spec.pid_namespace:
        _build(spec, _leave_host(spec, warm), warm)
        become(spec)
    from pysingularity.runtime.supervise import attend, block_signals, restore_mask

    mask = block_signals()
    pending = _leave_host(spec, warm)
    report, tell = posix.pipe()
    wait, go = posix.pipe()
    first = posix.fork()
    if first == 0:
        posix.close(report)
        posix.close(go)
        # pivot_root moves every process of the mount namespace: our parent has to be done with the host's files first.
        posix.read(wait, 1)
        posix.close(wait)
        _first_process(spec, pending, warm, mask, tell)
    posix.close(tell)
    for server in pending.values():
        server.close()
    posix.close(wait)
    if spec.started is not None:
        spec.started(first)
    posix.close(go)
    status = attend(first)
    # Process 1 cannot die by a signal of its own: it tells the program's true status through the pipe.
    told = posix.read(report, 4)
    restore_mask(mask)
    posix._exit(leave_like(int.from_bytes(told, "little") if len(told) == 4 else status))


def _beside(spec: LaunchSpec, warm: Warm | None) -> NoReturn:
    """Build the root with helper programs, run the program in a child, and end the helpers when that has ended."""
    from pysingularity.runtime.helpers import Helpers
    from pysingularity.runtime.supervise import attend, block_signals, restore_mask

    mask = block_signals()
    helpers = Helpers()
    try:
        _build(spec, _leave_host(spec, warm), warm, helpers)
        parent = posix.getpid()
        child = posix.fork()
        if child == 0:
            try:
                restore_mask(mask)
                die_with_parent(SIGKILL, parent)
                become(spec)
            except SingularityError as error:
                messages.fatal(str(error))
            except KeyboardInterrupt:
                pass
            posix._exit(255)
        _lose_rights(spec)
        close_others((2, *helpers.locks))
        status = attend(child)
    finally:
        helpers.stop()
    restore_mask(mask)
    posix._exit(leave_like(status))


def run(
    spec: LaunchSpec,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> int:
    """Run the program that `spec` describes in a child and return its wait status (`os.WIFEXITED` and so on).

    The child and, with `pid_namespace`, all it started end with this process or when the call is interrupted. A failure
    to start is printed by the child, which then ends with status 255.

    Arguments:
        stdin, stdout, stderr: descriptors the program gets as 0, 1 and 2; None leaves this process's own.
    """
    parent = posix.getpid()
    child = posix.fork()
    if child == 0:
        status = 255
        try:
            die_with_parent(SIGKILL, parent)
            _redirect(stdin, stdout, stderr)
            enter(spec)
        except SingularityError as error:
            messages.fatal(str(error))
        except KeyboardInterrupt:
            status = 130
        except BaseException as error:
            messages.fatal(f"cannot start {spec.argv[0]}: {error}")
        posix._exit(status)
    try:
        while True:
            try:
                return posix.waitpid(child, 0)[1]
            except InterruptedError:
                continue
    except BaseException:
        posix.kill(child, SIGKILL)
        posix.waitpid(child, 0)
        raise


def _redirect(*wanted: int | None) -> None:
    """Put descriptors on 0, 1 and 2, whatever order they have."""
    copies = [None if one is None else posix.dup(one) for one in wanted]
    for number, copy in enumerate(copies):
        if copy is not None:
            while copy <= 2:  # a copy that lies on a standard descriptor would be overwritten by its neighbour
                copy = posix.dup(copy)
            posix.dup2(copy, number)
            posix.close(copy)


def _warm(spec: LaunchSpec) -> Warm | None:
    """Return the warm image of this start, where that makes sense."""
    usual = spec.identity == SELF and spec.inside is None
    if spec.warm > 0 and usual and spec.image.kind == SQUASHFS and not spec.image.fill and spec.squash_owners:
        from pysingularity.runtime.warm import Warm

        return Warm(spec.image, spec.warm)
    return None


def _leave_host(spec: LaunchSpec, warm: Warm | None) -> dict[int, Pending]:
    """Make the namespaces; start a server for every image in a file, at the only moment that suits it.

    A server has to open /dev/fuse inside the new user namespace, but must stay outside the new mount namespace: inside
    it would keep the container's mounts alive for ever.
    """
    uid, gid = posix.getuid(), posix.getgid()
    rest = NEWNS | spec.namespaces | (NEWPID if spec.pid_namespace else 0)
    files = [layer for layer in spec.layers() if layer.kind == SQUASHFS and layer.fill is None]
    pending: dict[int, Pending] = {}
    try:
        if spec.netns >= 0 and spec.identity == KEEP:
            setns(spec.netns, NEWNET)
        if warm is not None and len(files) == 1 and warm.join(rest):
            return pending
        if spec.identity == KEEP or (warm is not None and warm.joined):
            inside = (uid, gid)
        else:
            unshare(NEWUSER | (0 if files else rest))
            inside = (0, 0) if spec.identity == ROOT else spec.inside or (uid, gid)
            map_self(*inside, uid, gid)
        if files:
            from pysingularity.image.mount import serve

            program = spec.programs.get("squashfuse_ll", "")
            for layer in files:
                if id(layer) not in pending and (layer.plain is not None or not _by_kernel(spec)):
                    where = (layer.path, layer.offset, layer.size, inside)
                    pending[id(layer)] = serve(*where, squash=spec.squash_owners, program=program, plain=layer.plain)
        if files or spec.identity == KEEP:
            unshare(rest)
    except OSError as error:
        raise no_namespaces(error) from None
    if spec.connection is not None:
        spec.connection.inside()
    return pending


def _by_kernel(spec: LaunchSpec) -> bool:
    """Say whether the kernel itself may mount images here: real root, loop devices present."""
    return spec.driver not in ("python", "squashfuse") and _real_root(spec)


def _real_root(spec: LaunchSpec) -> bool:
    """Say whether we are root of the machine itself, and may use its loop devices."""
    if spec.identity != KEEP or posix.getuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map", "rb") as file:
            real = file.read().split() == [b"0", b"0", b"4294967295"]
    except OSError:
        return False
    return real and posix.access("/dev/loop-control", posix.R_OK | posix.W_OK)


def no_namespaces(error: OSError) -> SingularityError:
    """Return the error for a machine that does not let this user make namespaces, with what to do about it."""

    def value(name: str) -> bytes:
        try:
            with open("/proc/sys/" + name, "rb") as file:
                return file.read().strip()
        except OSError:
            return b""

    if error.errno not in (_EPERM, _EACCES, _ENOSPC, _EINVAL):
        return HostError("no-namespaces", f"cannot make namespaces: {error.strerror}")
    why, hint = error.strerror or "", "let the administrator allow user namespaces; see: singularity doctor"
    if value("user/max_user_namespaces") == b"0" or error.errno == _ENOSPC:
        why, hint = "too few user namespaces are allowed", "administrator: sysctl user.max_user_namespaces=10000"
    elif value("kernel/unprivileged_userns_clone") == b"0":
        why, hint = "user namespaces are switched off", "administrator: sysctl kernel.unprivileged_userns_clone=1"
    elif value("kernel/apparmor_restrict_unprivileged_userns") == b"1":
        why = "AppArmor restricts user namespaces"
        hint = "administrator: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a profile for singularity"
    return HostError("no-user-namespaces", f"this machine does not let you make containers: {why}", hint=hint)


def _build(spec: LaunchSpec, pending: dict[int, Pending], warm: Warm | None, helpers: Helpers | None = None) -> None:
    """Put the file tree together and make it the root."""
    posix.umask(0)
    try:
        # Slave rather than private: automounts and network mounts of the host still appear, nothing of ours goes out.
        mount(None, "/", None, MS_REC | MS_SLAVE)
        session = Session(spec)
        session.open_sources()
    except OSError as error:
        if error.errno in (_EPERM, _EACCES) and spec.identity != KEEP:
            # AppArmor's restriction lets unshare succeed and refuses the first mount.
            raise no_namespaces(error) from None
        raise
    placed = ordered(spec.mounts)
    if helpers is not None:
        for layer in spec.layers():
            if layer.kind == EXT:
                helpers.hold(layer)
        if "fuse-overlayfs" in spec.programs:
            session.merge = _merger(spec, helpers)
    session.cover()

    def attach_layer(layer: Layer, target: str) -> None:
        if layer.kind == EXT:
            from pysingularity.runtime.helpers import mount_ext

            assert helpers is not None
            mount_ext(helpers, layer, target, program=spec.programs.get("fuse2fs", ""), kernel=_real_root(spec))
            return
        if layer.fill is not None:
            layer.fill(target)
            return
        server = pending.get(id(layer))
        if server is not None:
            server.mount(target)
            # A keeper holds every namespace it is born into: only where those are the host's.
            if warm is not None and layer is spec.image and not spec.namespaces and not spec.pid_namespace:
                warm.keep(target)
        elif warm is not None and layer is spec.image and warm.tree >= 0:
            folder = posix.open(target, posix.O_PATH | posix.O_CLOEXEC)
            move_mount(warm.tree, folder)
            posix.close(folder)
            posix.close(warm.tree)
        else:
            from pysingularity.image.mount import kernel_squashfs

            if kernel_squashfs(layer.path, layer.offset, layer.size, target):
                return
            raise HostError("no-loop", f"{layer.path}: the kernel cannot mount it", hint="set: image driver = python")

    root = session.root(attach_layer, placed)
    attach(spec, session, root, placed)
    if warm is not None:
        warm.close()
    for server in pending.values():
        server.close()
    if spec.loopback and spec.namespaces & NEWNET:
        from pysingularity.runtime.network import loopback_up

        loopback_up()
    posix.fchdir(root)
    pivot_root(".", ".")
    unmount(".", MNT_DETACH)
    posix.chdir("/")
    posix.close(root)
    session.close()
    if spec.hostname:
        sethostname(spec.hostname)


def _merger(spec: LaunchSpec, helpers: Helpers) -> Callable[[list[str], str, str, str], None]:
    """Return what makes an overlay by fuse-overlayfs."""

    def merge(lower: list[str], upper: str, work: str, target: str) -> None:
        options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
        if spec.squash_owners and spec.identity != KEEP:
            options += f",squash_to_uid={posix.getuid()},squash_to_gid={posix.getgid()}"
        helpers.start([spec.programs["fuse-overlayfs"], "-f", "-o", options, target], target)

    return merge


def _first_process(
    spec: LaunchSpec, pending: dict[int, Pending], warm: Warm | None, mask: object, tell: int
) -> NoReturn:
    """Be process 1 of the pid namespace: build the root, start the program, reap until it has ended."""
    from pysingularity.runtime.supervise import attend, restore_mask

    status = 255 << 8
    helpers = None
    try:
        # Before the tree is built: whoever started us may be killed at any moment.
        die_with_parent(SIGKILL)
        try:
            forget_variables()  # the program sees this process in its /proc, and the caller's variables are not for it
        except OSError as error:
            messages.debug(f"process 1 shows its variables: {error}")
        if spec.helped():
            from pysingularity.runtime.helpers import Helpers

            helpers = Helpers()
        _build(spec, pending, warm, helpers)
        if not spec.init and helpers is None:
            restore_mask(mask)
            become(spec)
        child = posix.fork()
        if spec.lingers:
            try:  # both do it, so that it is done for whoever goes on first
                posix.setpgid(child, child)
            except PermissionError:  # the child has done it, and is the program already
                pass
        if child == 0:
            posix.close(tell)
            restore_mask(mask)
            try:
                become(spec)
            except SingularityError as error:
                messages.fatal(str(error))
            except KeyboardInterrupt:
                pass
            if spec.failure >= 0:
                posix.write(spec.failure, b"!")
            posix._exit(255)
        _lose_rights(spec)
        # The program must be able to see the end of its own pipes: process 1 lets go of everything.
        close_others((2, tell, *(helpers.locks if helpers else ())))
        status = attend(child, reap=True, lingers=spec.lingers)
    except SingularityError as error:
        messages.fatal(str(error))
    except BaseException as error:
        messages.fatal(f"cannot make the container: {error}")
    if helpers is not None:
        helpers.stop()
    posix.write(tell, status.to_bytes(4, "little"))
    posix._exit(255)


def _lose_rights(spec: LaunchSpec) -> None:
    """Give up what the waiting process does not need: it runs beside foreign code."""
    if spec.no_new_privs:
        no_new_privs()
    if spec.identity != KEEP:
        try:
            capabilities.set_all(0)
        except OSError as error:
            messages.debug(f"capset: {error}")


def become(spec: LaunchSpec) -> NoReturn:
    """Turn into the program: folder, environment, rights, execve."""
    environment = spec.env
    words = program(spec.action, spec.argv, spec.app, spec.shell)
    if not words:
        posix._exit(0)  # an instance without a startscript has nothing to do but be there
    if isinstance(environment, EnvironmentPlan):
        if spec.explain:
            _explain(environment)
        argv, env = compose(environment, words)
    else:
        argv, env = words, dict(environment)
    folder = _change_folder(spec)
    if isinstance(environment, EnvironmentPlan):
        env["PWD"] = folder
    path = find_program(argv[0], env.get("PATH", ""))
    if path is None:
        raise UserError(
            "program-not-found",
            f'"{argv[0]}": executable file not found in $PATH of the container'
            if "/" not in argv[0]
            else f"{argv[0]}: no such file in the container",
            hint=f"PATH is {env.get('PATH', '')}" if "/" not in argv[0] else "",
        )
    posix.umask(spec.umask)
    restore_signals()
    if spec.capabilities is not None:
        capabilities.drop_bounding(spec.capabilities)
    if spec.security is not None:
        spec.security.become_user()
    if spec.ambient:
        _grant(spec.ambient)
    if spec.no_new_privs:
        no_new_privs()
    if spec.emulate_root is not None:
        spec.emulate_root()
    # Afterwards, because emulation talks to its supervisor through a descriptor of its own.
    if spec.keep_descriptors is not None:
        close_others((0, 1, 2, *spec.keep_descriptors))
    if spec.security is not None:
        spec.security.confine()
    _execute(path, argv, env)


def _grant(mask: int) -> None:
    """Let the program of an ordinary user have capabilities of the user namespace that was made for it."""
    try:
        own = capabilities.effective()
        capabilities.set_all(own)
        capabilities.raise_ambient(mask & own)
    except OSError as error:
        raise HostError("no-capability", f"--add-caps: {error.strerror}") from None


def _explain(environment: EnvironmentPlan) -> NoReturn:
    """Print the environment with the origin of every variable, and end."""
    lines = [f"{name}={value}\n    {origin}\n" for name, value, origin in origins(environment)]
    data = "".join(lines).encode("utf-8", "surrogateescape")
    while data:
        data = data[posix.write(1, data) :]
    posix._exit(0)


def _execute(path: str, argv: list[str], env: dict[str, str]) -> NoReturn:
    try:
        posix.execve(path, argv, env)
    except OSError as error:
        if error.errno == _ENOEXEC:
            # What execvp does for a script without a #! line.
            try:
                posix.execve("/bin/sh", ["/bin/sh", path, *argv[1:]], env)
            except OSError as second:
                error = second
        reason = error.strerror
        if error.errno == _ENOENT:
            # The file is there: the kernel misses what it needs to start.
            reason = "its interpreter or dynamic linker is not in the container"
        if error.errno == 7:
            reason = "arguments and environment are too long"
        hint = "the image is damaged there, or its disk is: fetch or build it again" if error.errno == _EIO else ""
        raise UserError("cannot-execute", f"cannot execute {path}: {reason}", hint=hint) from None


def _change_folder(spec: LaunchSpec) -> str:
    """Go to the first folder of `cwd` that exists, and return it."""
    for number, folder in enumerate(spec.cwd):
        try:
            posix.chdir(folder)
        except OSError as error:
            if number == 0 and spec.cwd_required:
                raise UserError(
                    "no-directory",
                    f"cannot start in {folder}: {error.strerror}",
                    hint="give a folder that exists in the container, or bind one with --bind",
                ) from None
            if number == 0 and spec.action:
                messages.verbose(f"{folder} is not in the container ({error.strerror})")
            continue
        return folder
    posix.chdir("/")
    return "/"
