# SPDX-License-Identifier: Apache-2.0
"""LaunchSpec: everything that is decided about a container before anything is done, as plain printable values.

`runtime.prepare` fills it in from options and an image; `runtime.enter` acts on it. `describe()` says in words what
will happen, in order. Start ring: imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pysingularity.runtime.environment import EnvironmentPlan
    from pysingularity.runtime.network import Connection
    from pysingularity.runtime.security import Security
    from pysingularity.trust.encryption import Plain

#: Kinds of Mount. BIND: files of the host; FILE: a generated file; TMPFS: an empty folder in memory; PROC, DEVPTS,
#: MQUEUE: kernel file systems; DEV: a minimal /dev; LINK: a symbolic link, made only where we own the folder.
BIND, FILE, TMPFS, PROC, DEVPTS, MQUEUE, DEV, LINK = (
    "bind",
    "file",
    "tmpfs",
    "proc",
    "devpts",
    "mqueue",
    "dev",
    "link",
)

#: Kinds of Layer.
SANDBOX, SQUASHFS, EXT = "sandbox", "squashfs", "ext"

#: Ways to be somebody. KEEP: no new user namespace (real root, or root of a namespace made before by
#: `runtime.rootless`); SELF: new user namespace, the caller stays who they are; ROOT: new user namespace, uid 0.
KEEP, SELF, ROOT = "keep", "self", "root"


class Mount:
    """One thing put into the container's file tree.

    Arguments:
        kind: BIND, FILE, TMPFS, PROC, DEVPTS, MQUEUE, DEV or LINK.
        target: absolute path in the container; symbolic links in it are resolved inside the container.
        source: path on the host (BIND), text of a link (LINK), or "".
        content: what a FILE holds; complete: makes that from what the image has at the target (b"" for nothing).
        readonly: refuse writing below it.
        required: a failure ends the start with an error; otherwise the mount is left out and said with --verbose.
        trusted: keep device nodes and set-user-id bits of the source usable (the host's /dev).
        mode: permission bits of a FILE or TMPFS.
        size: bound of a TMPFS in MiB, 0 for the session's own.
        part: path inside `source` when that is an image (image-src); what a DEV does not get ("devpts"); or "".
        image: the layer to take `part` from, when `source` is an image.
    """

    __slots__ = (
        "complete",
        "content",
        "image",
        "kind",
        "mode",
        "part",
        "readonly",
        "required",
        "size",
        "source",
        "target",
        "trusted",
    )

    def __init__(
        self,
        kind: str,
        target: str,
        *,
        source: str = "",
        content: bytes = b"",
        complete: Callable[[bytes], bytes] | None = None,
        readonly: bool = False,
        required: bool = False,
        trusted: bool = False,
        mode: int = 0o755,
        size: int = 0,
        part: str = "",
        image: Layer | None = None,
    ) -> None:
        self.kind, self.target, self.source, self.content = kind, target, source, content
        self.readonly, self.required, self.trusted = readonly, required, trusted
        self.mode, self.size, self.part, self.image, self.complete = mode, size, part, image, complete

    def describe(self) -> str:
        """Say in a few words what is put where."""
        what = {BIND: self.source, FILE: "a generated file", LINK: f"a link to {self.source}"}.get(self.kind, self.kind)
        return f"{self.target} ← {what}{' (read-only)' if self.readonly else ''}"

    def __repr__(self) -> str:
        return f"Mount({self.describe()})"


class Layer:
    """One file tree under the container's root.

    Arguments:
        kind: SANDBOX (a folder), SQUASHFS or EXT (in a file).
        path: the folder or file on the host.
        offset, size: where the file system lies in the file, in bytes; size 0 means up to the end.
        writable: it is mounted for writing (EXT).
        plain: the decrypted file system, where that in the file is encrypted (SQUASHFS).
        fill: puts the files into an empty folder, where nothing here can mount an encrypted image.
    """

    __slots__ = ("fill", "kind", "offset", "path", "plain", "size", "writable")

    def __init__(
        self,
        kind: str,
        path: str,
        offset: int = 0,
        size: int = 0,
        *,
        writable: bool = False,
        plain: Plain | None = None,
    ) -> None:
        self.kind, self.path, self.offset, self.size, self.writable = kind, path, offset, size, writable
        self.plain = plain
        self.fill: Callable[[str], None] | None = None

    def __repr__(self) -> str:
        return f"Layer({self.kind} {self.path}{f' at {self.offset}' if self.offset else ''})"


class LaunchSpec:
    """What is started, in which root, as whom, with what around it.

    Arguments:
        image: the root file system.
        argv: program and arguments; a program without a slash is looked up on the container's PATH.
        env: the environment, complete; or an EnvironmentPlan that the image's own scripts take part in.
        action: "exec", "run", "shell", "test" or "start"; what that means is looked up in the image (`actions`).
        app: name of a SCIF app; shell: the shell that `shell` opens; "" for the image's own.
        writable: the image itself may be written (sandboxes).
        overlays: layers over the image, lowest first; all read-only.
        upper: where changes go instead of the image: "" nowhere, "tmpfs" memory, or a folder with `upper` and `work`.
        upper_layer: `upper` is no folder but this file system in a file.
        underlay: provide missing mount points by binds of everything around them, even where an overlay could be made.
        programs: name → path of programs that mount what neither the kernel nor we can (`helpers`).
        mounts: in the order of wishes; `enter` sorts them by depth.
        create: make missing mount points in a writable image itself.
        cwd: folders to start in; the first that exists is taken.
        cwd_required: the first one of `cwd` has to exist.
        identity: KEEP, SELF or ROOT.
        inside: with SELF, the uid and gid that the caller has in the container; None for the own ones.
        namespaces: flags of further namespaces (`linux.namespaces`), besides user and mount.
        pid_namespace: own pid namespace; the program and all its descendants end together.
        init: a small process 1 that reaps orphans and forwards signals; otherwise the program is process 1.
        hostname: name of the machine in the container, or "".
        umask: file creation mask of the program.
        no_new_privs: set-user-id programs and file capabilities have no effect.
        capabilities: mask of capabilities that are kept (real root); None keeps all.
        ambient: mask of capabilities that a program gets though its user is not root: those of the own user namespace.
        session_size: bound of everything written into memory, in MiB.
        squash_owners: show all files of a squashfs image as belonging to the user (an n→n map has no other ids).
        driver: how squashfs images are mounted: "auto", "python", "kernel", "squashfuse".
        security: confines the program right before it starts (`security`); None for nothing.
        netns: descriptor of a network namespace to join; -1 for none.
        emulate_root: called in the program's process, inside the container, right before it starts (it may install a
            system call filter and fork a supervisor); None for no emulation. Import what it needs beforehand: the
            host's file system is out of sight then.
        before_start: called once in the host's view, before any namespace is made (cgroups); or None.
        started: called outside with the pid of process 1 (host's view) once that exists (instances); or None.
        failure: descriptor that is written to when the program cannot be started, and that execve closes; -1 for none.
        lingers: process 1 goes on when the program has ended well (instances).
        keep_descriptors: descriptors ≥ 3 that the program inherits; None for all that the caller passed.
        loopback: bring the loopback interface of a new network namespace up.
        connection: what connects a new network namespace to the host's; or None.
        explain: print the environment and where it comes from instead of starting anything.
        warm: seconds for which the mounted image is kept for the user's next container of it; 0 for not at all.
        name: name of the image for SINGULARITY_NAME and messages.
    """

    __slots__ = (
        "action",
        "ambient",
        "app",
        "argv",
        "before_start",
        "capabilities",
        "connection",
        "create",
        "cwd",
        "cwd_required",
        "driver",
        "emulate_root",
        "env",
        "explain",
        "failure",
        "hostname",
        "identity",
        "image",
        "init",
        "inside",
        "keep_descriptors",
        "lingers",
        "loopback",
        "mounts",
        "name",
        "namespaces",
        "netns",
        "no_new_privs",
        "overlays",
        "pid_namespace",
        "programs",
        "security",
        "session_size",
        "shell",
        "squash_owners",
        "started",
        "umask",
        "underlay",
        "upper",
        "upper_layer",
        "warm",
        "writable",
    )

    def __init__(
        self,
        *,
        image: Layer,
        argv: Sequence[str],
        env: dict[str, str] | EnvironmentPlan,
        action: str = "exec",
        app: str = "",
        shell: str = "",
        writable: bool = False,
        overlays: Sequence[Layer] = (),
        upper: str = "",
        upper_layer: Layer | None = None,
        underlay: bool = False,
        programs: dict[str, str] | None = None,
        mounts: Sequence[Mount] = (),
        create: bool = False,
        cwd: Sequence[str] = ("/",),
        cwd_required: bool = False,
        identity: str = SELF,
        inside: tuple[int, int] | None = None,
        namespaces: int = 0,
        pid_namespace: bool = False,
        init: bool = True,
        hostname: str = "",
        umask: int = 0o022,
        no_new_privs: bool = True,
        capabilities: int | None = None,
        ambient: int = 0,
        session_size: int = 64,
        squash_owners: bool = True,
        driver: str = "auto",
        security: Security | None = None,
        netns: int = -1,
        emulate_root: Callable[[], None] | None = None,
        before_start: Callable[[], None] | None = None,
        started: Callable[[int], None] | None = None,
        lingers: bool = False,
        failure: int = -1,
        keep_descriptors: Sequence[int] | None = None,
        loopback: bool = False,
        connection: Connection | None = None,
        explain: bool = False,
        warm: int = 0,
        name: str = "",
    ) -> None:
        self.image, self.argv, self.env, self.action = image, list(argv), env, action
        self.writable, self.overlays, self.upper = writable, list(overlays), upper
        self.mounts, self.create, self.cwd, self.cwd_required = list(mounts), create, list(cwd), cwd_required
        self.identity, self.namespaces, self.pid_namespace, self.init = identity, namespaces, pid_namespace, init
        self.hostname, self.umask, self.no_new_privs, self.capabilities = hostname, umask, no_new_privs, capabilities
        self.session_size, self.squash_owners, self.driver = session_size, squash_owners, driver
        self.emulate_root, self.before_start, self.keep_descriptors = emulate_root, before_start, keep_descriptors
        self.app, self.shell, self.connection, self.explain = app, shell, connection, explain
        self.loopback, self.warm, self.name, self.started, self.lingers = loopback, warm, name, started, lingers
        self.failure, self.ambient, self.inside = failure, ambient, inside
        self.upper_layer, self.programs, self.underlay = upper_layer, programs or {}, underlay
        self.security, self.netns = security, netns

    def layers(self) -> list[Layer]:
        """Return all file trees that take part, also those of which binds take a part."""
        found = [self.image, *self.overlays]
        found += [one.image for one in self.mounts if one.image is not None]
        return found if self.upper_layer is None else [*found, self.upper_layer]

    def helped(self) -> bool:
        """Say whether programs of `helpers` have to stay beside the container."""
        return "fuse-overlayfs" in self.programs or any(layer.kind == EXT for layer in self.layers())

    def describe(self) -> list[str]:
        """Say line by line what will be done."""
        lines = [f"root: {self.image!r}{' writable' if self.writable else ' read-only'}"]
        lines += [f"over it: {layer!r}" for layer in self.overlays]
        if self.upper:
            lines.append(f"changes go to: {'memory' if self.upper == 'tmpfs' else self.upper}")
        lines.append(f"identity: {self.identity}, namespaces: {self.namespaces:#x}, own pids: {self.pid_namespace}")
        lines += [mount.describe() for mount in self.mounts]
        lines.append(f"start in {' or '.join(self.cwd)}: {' '.join(self.argv)}")
        return lines

    def __repr__(self) -> str:
        return f"LaunchSpec({'; '.join(self.describe())})"
