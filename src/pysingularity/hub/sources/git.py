# SPDX-License-Identifier: Apache-2.0
"""The git program, kept on a short lead: clean environment, few transports, time and size limits, no hooks.

Repositories are hostile. We keep a bare mirror per collection and read objects out of it by plumbing commands; nothing
of a repository is ever run by git (no hooks, filters, fsmonitor, submodules or aliases), and a name from a repository
or a user never stands where git could take it for an option.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pysingularity.hub.errors import Invalid, NotFound
from pysingularity.hub.settings import SourceSettings

SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")
#: Transports that git may have at all.
PROTOCOLS = ("https", "http", "ssh", "git", "file")
_TRUSTING = Path(__file__).with_name("trusting.gitconfig")
#: What a push says for "nothing".
ZERO = re.compile(r"0+\Z")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)\Z")
_SCP = re.compile(r"[A-Za-z0-9_.-]+@[A-Za-z0-9_.-]+:(?!/?-)[^\s]+\Z")
#: A branch name as git itself allows it, and never an option.
_BRANCH = re.compile(r"(?!-)(?!.*(?:\.\.|//|@\{|\.lock(?:/|\Z)|[\x00-\x20~^:?*\[\\\x7f]))[^/.][^\x00]*(?<![./])\Z")
#: Variables of the hub's environment that reach git: how the site reaches the world.
_PASSED = (
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "SSH_AUTH_SOCK"),
)
_CONFIG = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.askPass": "true",
    "credential.helper": "",
    "protocol.allow": "never",
    "protocol.ext.allow": "never",
    "fetch.recurseSubmodules": "false",
    "fetch.fsckObjects": "true",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "uploadpack.packObjectsHook": "",
    "core.symlinks": "true",
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "advice.detachedHead": "false",
    "http.followRedirects": "initial",
    "safe.directory": "*",
}


def public_text(text: str) -> str:
    """Return a text without the names and passwords of addresses in it."""
    return _CREDENTIALS.sub("", text)


class GitError(Invalid):
    """git said no: the repository cannot be reached, is too big, or is not what it was said to be.

    Addresses lose their passwords: the words reach exchanges and pages of builds, which others read.
    """

    def __init__(self, id: str, message: str, *, hint: str = "") -> None:  # noqa: A002
        super().__init__(id, public_text(message), hint=hint)


def check_url(url: str, settings: SourceSettings, *, approved: bool = False) -> str:
    """Return a repository's address, after checking that it may be used.

    Arguments:
        approved: an administrator wrote it, who could change the settings as well: any transport and folder will do.

    Raises:
        Invalid: an unknown or forbidden transport, an option in disguise, a local path outside the allowed folders.
    """
    if not url or url != url.strip() or any(ord(letter) < 33 for letter in url) or len(url) > 2000:
        raise Invalid("wrong-git-url", f"{url[:200]!r} is no address of a git repository")
    match = _SCHEME.match(url)
    if match is None:
        if _SCP.match(url) and "::" not in url:
            scheme = "ssh"
        elif url.startswith("/"):
            scheme = "file"
        else:
            raise Invalid(
                "wrong-git-url", f"{url}: not the address of a git repository", hint="write https://HOST/PATH"
            )
    else:
        scheme = match[1]
        if match[2].startswith("-"):
            raise Invalid("wrong-git-url", f"{url}: a host does not start with a hyphen")
    if approved and scheme in PROTOCOLS:
        return url
    if scheme not in settings.protocols:
        raise Invalid(
            "forbidden-transport",
            f"{public_text(url)}: this hub does not use the transport {scheme}",
            hint=f"allowed are {', '.join(settings.protocols)} (sources.protocols); an administrator may use any",
        )
    if scheme == "file":
        path = Path(match[2] if match else url).resolve()
        if not any(path.is_relative_to(Path(folder).resolve()) for folder in settings.local):
            raise Invalid("forbidden-path", f"{url}: outside the folders that the hub may read (setting sources.local)")
    return url


def check_branch(name: str) -> str:
    """Return a branch name, after checking that git would take it for one.

    Raises:
        Invalid: it could be an option or a revision expression.
    """
    if len(name) > 255 or not _BRANCH.match(name):
        raise Invalid("wrong-branch", f"{name[:200]!r} is no name of a branch")
    return name


@dataclass(frozen=True)
class Entry:
    """A file of a commit: `mode` as git writes it ("100644", "120000" for a symlink, "160000" for a submodule)."""

    mode: str
    kind: str
    sha: str
    size: int
    path: str


class Mirror:
    """A bare copy of a repository.

    Arguments:
        path: folder of the copy; made by the first `fetch`.
        url: where it comes from, checked by `check_url`.
        settings: programs, transports, limits.
        approved: an administrator vouches for the address, and for whoever owns a local repository.
    """

    def __init__(self, path: Path, url: str, settings: SourceSettings, *, approved: bool = False) -> None:
        self.path, self.url, self.settings, self.approved = path, url, settings, approved

    def _environment(self) -> dict[str, str]:
        given = {name: os.environ[name] for name in _PASSED if name in os.environ}
        config = {
            **_CONFIG,
            **{
                f"protocol.{name}.allow": "always" for name in (PROTOCOLS if self.approved else self.settings.protocols)
            },
        }
        numbered = {}
        for number, (key, value) in enumerate(config.items()):
            numbered[f"GIT_CONFIG_KEY_{number}"], numbered[f"GIT_CONFIG_VALUE_{number}"] = key, value
        return {
            **given,
            "PATH": os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
            "HOME": "/nonexistent",
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            # The other side of a local fetch is a git of its own, which reads no more of what we say than this file.
            "GIT_CONFIG_GLOBAL": str(_TRUSTING if self.approved else "/dev/null"),
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=20",
            "GIT_CONFIG_COUNT": str(len(config)),
            **numbered,
        }

    def run(
        self,
        *words: str,
        limit: int = 64 << 20,
        data: bytes | None = None,
        check: bool = True,
        grow: int = 0,
        extra: dict[str, str] | None = None,
    ) -> bytes:
        """Run git on the mirror and return its output.

        Arguments:
            limit: output beyond this many bytes is an error.
            data: standard input.
            check: a status other than 0 is an error.
            grow: bytes that the mirror may have meanwhile; 0 without limit.
            extra: more environment.

        Raises:
            GitError: git failed, took too long or said too much.
        """
        argv = [self.settings.git, f"--git-dir={self.path}", *words]
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**self._environment(), **(extra or {})},
                cwd="/",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise GitError("no-git", f"the program {self.settings.git} is missing", hint="install git")
        done = threading.Event()
        problem: list[GitError] = []
        deadline = time.monotonic() + self.settings.time_limit

        def guard() -> None:
            while not done.wait(0.5):
                if time.monotonic() > deadline:
                    problem.append(GitError("git-timeout", f"{self.url}: git {words[0]} took longer than allowed"))
                elif grow and _tree_size(self.path) > grow:
                    problem.append(GitError("repository-too-big", f"{self.url}: more than {grow} bytes"))
                if problem:
                    _kill_group(child.pid)
                    return

        errors: list[bytes] = []
        assert child.stdout is not None and child.stderr is not None
        helpers = [
            threading.Thread(target=guard, daemon=True),
            threading.Thread(target=lambda: errors.append(_read(child.stderr, 1 << 16)), daemon=True),
        ]
        if data is not None:
            helpers.append(threading.Thread(target=_feed, args=(child.stdin, data), daemon=True))
        for helper in helpers:
            helper.start()
        try:
            output = _read(child.stdout, limit + 1)
            if len(output) > limit:
                raise GitError("git-output", f"git {words[0]}: more than {limit} bytes of output")
            status = child.wait()
        finally:
            done.set()
            if child.poll() is None:
                _kill_group(child.pid)
                child.wait()
            for helper in helpers:
                helper.join()
            child.stdout.close()
            child.stderr.close()
        if problem:
            raise problem[0]
        if status and check:
            text = errors[0].decode("utf-8", "replace").strip() if errors else ""
            raise GitError("git-failed", f"{self.url}: {_last_words(text) or f'git ended with status {status}'}")
        return output

    def fetch(self) -> None:
        """Bring the mirror up to date with all branches and tags; forgets what the repository no longer has.

        Raises:
            GitError: unreachable, or bigger than the limit.
        """
        check_url(self.url, self.settings, approved=self.approved)
        if not (self.path / "HEAD").exists():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.run("init", "--quiet", "--bare", "--template=", str(self.path))
        try:
            self.run(
                "fetch",
                "--quiet",
                "--prune",
                "--no-tags",
                "--force",
                "--no-write-fetch-head",
                "--no-recurse-submodules",
                "--",
                self.url,
                "+refs/heads/*:refs/heads/*",
                "+refs/tags/*:refs/tags/*",
                grow=self.settings.size_limit,
            )
            if self.settings.size_limit and _tree_size(self.path) > self.settings.size_limit:
                raise GitError("repository-too-big", f"{self.url}: more than {self.settings.size_limit} bytes")
        except GitError as error:
            if error.id == "repository-too-big":
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        head = self.remote_head()
        if head:
            self.run("symbolic-ref", "HEAD", f"refs/heads/{head}")

    def remote_head(self) -> str:
        """Ask the repository for its default branch; "" when it has none."""
        text = self.run("ls-remote", "--symref", "--", self.url, "HEAD", limit=1 << 20).decode("utf-8", "replace")
        for line in text.splitlines():
            if line.startswith("ref: refs/heads/"):
                return check_branch(line.removeprefix("ref: refs/heads/").partition("\t")[0])
        return ""

    def remote_branches(self) -> dict[str, str]:
        """Ask the repository for its branches and their heads, without fetching anything."""
        text = self.run("ls-remote", "--heads", "--", self.url, limit=16 << 20).decode("utf-8", "replace")
        pairs = [line.split("\t", 1) for line in text.splitlines() if "\trefs/heads/" in line]
        return {name.removeprefix("refs/heads/"): sha for sha, name in pairs if SHA.match(sha)}

    def branches(self) -> dict[str, str]:
        """Return the mirror's branches and their heads."""
        return self._refs("refs/heads/")

    def tags(self) -> dict[str, str]:
        """Return the mirror's tags and the commits they stand for."""
        text = self.run("for-each-ref", "--format=%(objectname) %(*objectname) %(refname)", "refs/tags/").decode()
        found = {}
        for line in text.splitlines():
            sha, peeled, name = line.split(" ", 2)
            found[name.removeprefix("refs/tags/")] = peeled or sha
        return found

    def _refs(self, prefix: str) -> dict[str, str]:
        text = self.run("for-each-ref", "--format=%(objectname) %(refname)", prefix).decode("utf-8", "replace")
        pairs = [line.split(" ", 1) for line in text.splitlines()]
        return {name.removeprefix(prefix): sha for sha, name in pairs}

    def default_branch(self) -> str:
        """Return the branch that HEAD names."""
        return self.run("symbolic-ref", "--short", "HEAD", check=False).decode("utf-8", "replace").strip()

    def has(self, commit: str) -> bool:
        """Return whether the mirror has a commit."""
        if not SHA.match(commit) or ZERO.match(commit):
            return False
        return self.run("cat-file", "--batch-check", data=commit.encode() + b"\n").split()[1:2] == [b"commit"]

    def resolve(self, name: str) -> str:
        """Return the commit of a branch, a tag or a full or short commit id.

        Raises:
            NotFound: there is none.
        """
        if re.fullmatch(r"[0-9a-f]{7,64}", name) is None:
            check_branch(name)
        for candidate in (f"refs/heads/{name}", f"refs/tags/{name}", name):
            found = self.run(
                "rev-parse", "--verify", "--quiet", "--end-of-options", f"{candidate}^{{commit}}", check=False
            )
            if SHA.match(found.decode().strip()):
                return found.decode().strip()
        raise NotFound("no-such-commit", f"{name[:200]}: the repository has no such branch, tag or commit")

    def entries(self, commit: str, *paths: str) -> list[Entry]:
        """Return the files of a commit (or of some paths in it)."""
        words = ["ls-tree", "-r", "-z", "-l", "--full-tree", _commit(commit)]
        if paths:
            words += ["--", *paths]
        found = []
        for record in self.run(*words, limit=256 << 20).split(b"\0"):
            if record:
                about, _, path = record.partition(b"\t")
                mode, kind, sha, size = about.split()
                found.append(
                    Entry(
                        mode.decode(),
                        kind.decode(),
                        sha.decode(),
                        int(size) if size.isdigit() else 0,
                        path.decode("utf-8", "surrogateescape"),
                    )
                )
        return found

    def tree(self, commit: str) -> str:
        """Return the id of a commit's tree: equal trees have equal files."""
        return self.run("rev-parse", "--verify", "--end-of-options", f"{_commit(commit)}^{{tree}}").decode().strip()

    def blob(self, sha: str, limit: int) -> bytes:
        """Return the content of a file.

        Raises:
            GitError: it is bigger than `limit`.
        """
        return self.run("cat-file", "blob", _commit(sha), limit=limit)

    def blobs(self, shas: set[str], limit: int = 256 << 20) -> dict[str, bytes]:
        """Return the contents of many files by one run of git; those beyond `limit` bytes together are missing."""
        names = sorted(shas)
        text = self.run(
            "cat-file", "--batch-check=%(objectname) %(objecttype) %(objectsize)", data="\n".join(names).encode()
        )
        chosen, total = [], 0
        for line in text.decode().splitlines():
            sha, kind, *size = line.split()
            if kind == "blob" and total + int(size[0]) <= limit:
                chosen.append(sha)
                total += int(size[0])
        found: dict[str, bytes] = {}
        output = self.run("cat-file", "--batch", data="\n".join(chosen).encode(), limit=total + 200 * len(chosen) + 1)
        at = 0
        while at < len(output):
            end = output.index(b"\n", at)
            sha, _, size_text = output[at:end].decode().split()
            found[sha] = output[end + 1 : end + 1 + int(size_text)]
            at = end + 2 + int(size_text)
        return found

    def changed(self, before: str, after: str) -> set[str]:
        """Return the paths that differ between two commits; every path of `after` when `before` is unknown."""
        if not self.has(before):
            return {entry.path for entry in self.entries(after)}
        text = self.run("diff-tree", "-r", "-z", "--name-only", "--no-renames", _commit(before), _commit(after))
        return {path.decode("utf-8", "surrogateescape") for path in text.split(b"\0") if path}

    def last_changes(self, commit: str, paths: set[str], pattern: str) -> dict[str, tuple[str, float]]:
        """Return the commit that last changed each path and its time, by one walk through the history.

        Arguments:
            paths: of interest.
            pattern: glob that all of them match, for git to leave out the rest.
        """
        left, found = set(paths), {}
        words = ["log", "--format=%x01%H %ct", "--name-only", "-z", "--no-renames", "-m", "--first-parent"]
        text = self.run(*words, _commit(commit), "--", f":(top,glob){pattern}", limit=1 << 30)
        for record in text.split(b"\x01")[1:]:
            about, _, names = record.partition(b"\0")
            sha, when = about.decode().split()
            for name in names.split(b"\0"):
                path = name.lstrip(b"\n").decode("utf-8", "surrogateescape")
                if path in left:
                    left.discard(path)
                    found[path] = (sha, float(when))
            if not left:
                break
        return found

    def time_of(self, commit: str) -> float:
        """Return the time of a commit."""
        return float(self.run("log", "-1", "--format=%ct", _commit(commit)).decode().strip() or 0)

    def checkout(self, commit: str, target: Path) -> None:
        """Write the files of a commit into an empty folder, without any `.git`; symlinks stay symlinks.

        git itself takes care that nothing is written through a symlink. Submodules become empty folders.
        """
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        index = target.parent / f"{target.name}.index"
        extra = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(target)}
        try:
            self.run("read-tree", _commit(commit), extra=extra)
            self.run("checkout-index", "--all", "--quiet", f"--prefix={target}/", extra=extra)
        finally:
            index.unlink(missing_ok=True)


def _commit(text: str) -> str:
    if not SHA.match(text):
        raise Invalid("wrong-commit", f"{text[:100]!r} is no commit id")
    return text


def _last_words(text: str) -> str:
    """Return what of git's complaint a person needs."""
    lines = [line for line in text.splitlines() if line.startswith(("fatal:", "error:"))] or text.splitlines()
    return lines[0].partition(": ")[2] or lines[0] if lines else ""


def _read(stream: object, limit: int) -> bytes:
    chunks, size = [], 0
    while size < limit:
        chunk = stream.read(min(1 << 16, limit - size))  # type: ignore[attr-defined]
        if not chunk:
            break
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _feed(stream: object, data: bytes) -> None:
    try:
        stream.write(data)  # type: ignore[attr-defined]
        stream.close()  # type: ignore[attr-defined]
    except BrokenPipeError:  # git has heard enough; its status tells why
        pass


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _tree_size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
