# SPDX-License-Identifier: Apache-2.0
"""The agents of a definition file's header, one per file: each fills an empty folder with a root file system.

An agent is a module of this package with one function, `bootstrap(request) -> BootstrapResult`. It decides nothing
of the rest of the build: it reads its own keywords from `request.header`, writes into `request.root`, runs commands
inside that root with `request.run`, and reports what it knows of the base image. Agents run inside the build's worker
process, which already is root in its (emulated or mapped) namespace; owners and device nodes go through
`request.way.owners`.
"""

from __future__ import annotations

from pysingularity.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    from pysingularity.linux.ownership import RealOwners, RecordedOwners
    from pysingularity.runtime.rootless import Way

    class Run(Protocol):
        """Run a command inside the root; see `BootstrapRequest.run`."""

        def __call__(  # noqa: D102
            self,
            argv: Sequence[str],
            *,
            env: Mapping[str, str] | None = None,
            binds: Sequence[str] = (),
            cwd: str = "/",
        ) -> int: ...

    Owners = RealOwners | RecordedOwners

#: Word behind `Bootstrap:` → module of this package. Several words may share an agent.
AGENTS: dict[str, str] = {
    "localimage": "localimage",
    "scratch": "scratch",
    "debootstrap": "debootstrap",
    "docker": "remote",
    "docker-archive": "remote",
    "docker-daemon": "remote",
    "oci": "remote",
    "oci-archive": "remote",
    "library": "remote",
    "shub": "remote",
    "oras": "remote",
    "yum": "yum",
    "dnf": "yum",
    "zypper": "zypper",
    "arch": "arch",
    "busybox": "busybox",
    "http": "tarball",
    "https": "tarball",
    "tarball": "tarball",
}
#: Agents that start no program of the new root.
RUN_NOTHING = frozenset(
    (
        *(word for word, module in AGENTS.items() if module == "remote"),
        "localimage",
        "scratch",
        "http",
        "https",
        "tarball",
    )
)
#: Agents that other implementations have and this one has not.
MISSING: dict[str, str] = {
    "buildkit": "buildkit",
}


class BootstrapRequest:
    """What an agent is asked to do.

    Arguments:
        header: the stage's header, keywords in lower case, values as written.
        root: absolute path of an existing empty folder that becomes the root file system.
        way: how this process is root: `.name` ("root", "subuid", "single"), `.needs_emulation`, `.owners` with
            `set(path, uid, gid)` and `mknod(path, mode, rdev)`.
        cache: folder whose content may outlive the build (downloaded packages); exists.
        tmp: folder on the same file system as `root`, removed with the build; exists.
        progress: `progress(text, done=0, total=0)` says what is going on, in bytes or pieces when `total` is given;
            cheap enough to be called for every file.
        run: `run(argv, env=None, binds=(), cwd="/") -> status` runs a command inside `root` as (emulated) root, with a
            clean environment plus proxy variables plus `env`; `binds` are SRC[:DST[:OPTS]]. Output goes to the
            step's log. The status is the exit status, or 128 + signal.
        arch: architecture wanted, in Debian's words ("amd64", "arm64").
        options: flags of the build that agents understand: "no-verify" (signatures of a mirror), "no-https",
            "disable-cache", "force"; a flag that was not given is absent. "key" opens an encrypted base.
        environ: the caller's environment variables (proxies, credentials, CA bundle).
        directory: folder relative paths of the header start from (the caller's working directory).
    """

    __slots__ = (
        "arch",
        "cache",
        "directory",
        "environ",
        "header",
        "options",
        "progress",
        "root",
        "run",
        "tmp",
        "way",
    )

    def __init__(
        self,
        *,
        header: dict[str, str],
        root: str,
        way: Way,
        cache: str,
        tmp: str,
        progress: Callable[..., None],
        run: Run,
        arch: str = "amd64",
        options: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        directory: str = ".",
    ) -> None:
        self.header, self.root, self.way, self.cache, self.tmp = header, root, way, cache, tmp
        self.progress, self.run, self.arch, self.directory = progress, run, arch, directory
        self.options = dict(options or {})
        self.environ = dict(environ or {})

    def need(self, keyword: str, *, example: str = "") -> str:
        """Return the value of a header keyword.

        Raises:
            UserError: the definition file does not give it.
        """
        value = self.header.get(keyword.lower(), "").strip()
        if not value:
            agent = self.header.get("bootstrap", "")
            raise UserError(
                "keyword-missing",
                f"Bootstrap: {agent} needs the keyword {keyword}",
                hint=f"add a line to the header: {keyword}: {example or 'VALUE'}",
            )
        return value

    def check(self, digest: str, what: str) -> bool:
        """Compare the SHA-256 of something fetched with the keyword Checksum; return whether there was one.

        Raises:
            UserError: they differ, or the keyword holds no SHA-256.
        """
        wanted = self.header.get("checksum", "").strip().lower().removeprefix("sha256:")
        if not wanted:
            return False
        if len(wanted) != 64 or wanted.strip("0123456789abcdef"):
            raise UserError("bad-keyword", f"Checksum: {wanted}: it is sha256: and 64 hexadecimal digits")
        if digest != wanted:
            raise UserError("wrong-content", f"{what}: has the checksum {digest}, not {wanted}: refused")
        return True


class BootstrapResult:
    """What an agent knows of the base it unpacked.

    Arguments:
        digest: identity of the base, equal for equal content ("sha256:…"), or "" when it is not known.
        environment: variables that the base sets for programs of later sections (ENV of an OCI image).
        labels: labels of the base that are not in its own /.singularity.d.
        oci_config: the base's OCI image configuration as JSON bytes, kept in the new image.
        source: one line for people and labels: where the base came from.
    """

    __slots__ = ("digest", "environment", "labels", "oci_config", "source")

    def __init__(
        self,
        *,
        digest: str = "",
        environment: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        oci_config: bytes | None = None,
        source: str = "",
    ) -> None:
        self.digest, self.oci_config, self.source = digest, oci_config, source
        self.environment = dict(environment or {})
        self.labels = dict(labels or {})


def known(name: str) -> str:
    """Return the module of the agent called `name` in a header.

    Raises:
        UserError: there is no such agent.
    """
    word = name.strip().lower()
    if word in AGENTS:
        return AGENTS[word]
    if word in MISSING:
        raise UserError(
            "agent-missing",
            f"Bootstrap: {word} is not available in this version",
            hint="start from an image of that distribution instead, for example with Bootstrap: docker",
        )
    from pysingularity.build.bootstrap.names import guess  # difflib: only when something is wrong

    raise UserError("unknown-agent", f'there is no bootstrap agent "{name}"', hint=guess(word))


def agent(name: str) -> Callable[[BootstrapRequest], BootstrapResult]:
    """Return the function of the agent called `name` in a header.

    Raises:
        UserError: there is no such agent.
    """
    import importlib  # agents are loaded one at a time: some are heavy

    return importlib.import_module(f"pysingularity.build.bootstrap.{known(name)}").bootstrap  # type: ignore[no-any-return]
