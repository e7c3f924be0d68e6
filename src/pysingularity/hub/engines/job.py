# SPDX-License-Identifier: Apache-2.0
"""One build as one process: `python -m pysingularity.hub.engines.job SPEC`, here or on a node of a cluster.

It starts the builder in the sandbox, turns the builder's events into the log, keeps the limits, runs the image's test,
and leaves `result.json` beside its specification. It has no way to the database: the hub reads `status.json`, the log
and the result, and believes none of them before it has looked at the image itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pysingularity import events
from pysingularity.hub.builds.log import LogWriter
from pysingularity.hub.engines.egress import Policy, Proxy
from pysingularity.hub.engines.sweep import size_of, sweep
from pysingularity.linux import process

#: A builder that ends with this status says that there is nothing to build.
SKIP = 183
#: Folders of a build's scratch.
SCRATCH = ("home", "tmp", "cache", "out")
#: Seconds between looks at memory, and at the disk.
WATCH, WATCH_DISK = 0.5, 2.0
GRACE = 5.0


class Stopped(Exception):
    """The build is ended by us: (state, error id, sentence)."""


class GivenUp(Exception):
    """The hub has given this job up (its folder is gone, or another attempt's): whatever it did is nobody's."""


class Job:
    """One build under way.

    Arguments:
        folder: the build's working folder with `job.json`, `source`, `scratch`.
        spec: what `job.json` says; see `base.specification`.
        log: where output goes.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], log: LogWriter) -> None:
        self.folder, self.spec, self.log = folder, spec, log
        self.limits: dict[str, Any] = spec["limits"]
        self.deadline = time.time() + float(self.limits["seconds"])
        self.steps: list[dict[str, Any]] = []
        self.failure: dict[str, str] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.cancelled = False
        self.titles: dict[object, str] = {}
        self.look_at = 0.0
        self.said = ""
        self.bases: list[dict[str, Any]] = []
        #: Where the build works: in its folder, or on the node's own disk.
        self.scratch = folder / "scratch"

    # --- what the hub reads ---

    def tell(self, state: str) -> None:
        """Say which state the build is in, and where its steps begin in the log."""
        write_json(self.folder / "status.json", {"state": state, "steps": self.steps, "at": time.time()})

    def finish(self, state: str, error_id: str = "", reason: str = "", **more: Any) -> None:
        """Leave the result: `state` is "built", or a final state of the build."""
        self.given_up()
        value = {"state": state, "error_id": error_id, "reason": reason, "steps": self.steps, **more}
        # Addresses of proxies may hold passwords, and are of no use to anybody else.
        seen = {name: text for name, text in self.spec["environment"].items() if not name.lower().endswith("_proxy")}
        value |= {"token": self.spec["token"], "environment": seen, "bases": self.bases}
        write_json(self.folder / "result.json", {**value, "node": platform.node(), "at": time.time()})

    def given_up(self) -> None:
        """Check that the folder still speaks of this job.

        Raises:
            GivenUp: it does not.
        """
        try:
            token = json.loads((self.folder / "job.json").read_bytes())["token"]
        except FileNotFoundError:
            token = None
        except (OSError, ValueError, KeyError):  # a file system between two machines has its moments
            return
        if token != self.spec["token"]:
            raise GivenUp

    # --- the work ---

    def run(self) -> None:
        """Build, test, and leave a result whatever happens."""
        started = time.time()
        try:
            self.tell("building")
            self._step("prepare", "Preparing")
            self.log.line(self._describe())
            if self.spec["scratch"]:
                with local_scratch(self.spec) as scratch:
                    self.scratch = scratch
                    self._build()
                    bring_back(scratch / "out" / "image.sif", self.folder / "scratch" / "out" / "image.sif")
            else:
                self._build()
            self._end("done")
            self.finish("built", seconds=time.time() - started)
        except Stopped as stop:
            state, error_id, reason = stop.args
            self._end("failed" if state != "skipped" else "done")
            self.log.line(f"{state.replace('_', ' ')}: {reason}")
            self.finish(state, error_id, reason, seconds=time.time() - started)

    def _build(self) -> None:
        """Run the builder and the image's test."""
        inside = self._inside()
        image = f"{inside['scratch']}/out/image.sif"
        recipe = f"{inside['source']}/{self.spec['recipe']}"
        status = self._program(["build", "--json", "--notest", image, recipe], os.path.dirname(recipe), events_=True)
        if status == SKIP:
            raise Stopped("skipped", "skipped", "the recipe said that there is nothing to build (exit status 183)")
        if status:
            raise Stopped(
                "failed",
                self.failure.get("id") or "build-failed",
                self.failure.get("message") or f"the builder ended with status {status}",
            )
        self.tell("testing")
        self._step("test", "Testing the image")
        status = self._program(["test", image], f"{inside['scratch']}/home", events_=False)
        if status:
            raise Stopped("failed", "test-failed", f"the image's test ended with status {status}")

    def ask(self, words: list[str]) -> int:
        """Run the program with some arguments, without steps and results; returns its exit status.

        Raises:
            Stopped: it took too long or too much.
        """
        return self._program(["--json", *words], self._inside()["source"], events_=True)

    def _describe(self) -> str:
        limits = self.limits
        parts = [
            f"{limits['seconds']} s",
            f"{limits['memory'] >> 20} MiB of memory",
            f"{limits['disk'] >> 20} MiB of disk",
        ]
        job = f"Job {os.environ['SLURM_JOB_ID']} on {platform.node()}\n" if "SLURM_JOB_ID" in os.environ else ""
        return f"{job}Limits: {', '.join(parts)}; network: {self.spec['network']}; sandbox: {self.spec['sandbox']}"

    def _inside(self) -> dict[str, str]:
        if self.spec["sandbox"] == "namespaces":
            return {"source": "/source", "scratch": "/scratch"}
        return {"source": str(self.folder / "source"), "scratch": str(self.scratch)}

    def _program(self, words: list[str], folder: str, *, events_: bool) -> int:
        """Run the builder with some arguments; its output goes to the log. Returns its exit status."""
        inside = self._inside()
        argv = [*self.spec["program"], *words]
        environment = {
            **self.spec["environment"],
            "HOME": f"{inside['scratch']}/home",
            "TMPDIR": f"{inside['scratch']}/tmp",
            "SINGULARITY_TMPDIR": f"{inside['scratch']}/tmp",
            "SINGULARITY_CACHEDIR": f"{inside['scratch']}/cache",
        }
        proxy = None
        if self.spec["sandbox"] == "namespaces":
            egress = self.folder / "egress"
            shutil.rmtree(egress, ignore_errors=True)
            egress.mkdir(mode=0o755)
            if self.spec["network"] == "proxy":
                proxy = Proxy(egress / "proxy", Policy(**self.spec["policy"]), self.log.line)
                address = "http://127.0.0.1:3128"
                environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address)
            room = {
                "source": str(self.folder / "source"),
                "scratch": str(self.scratch),
                "owned": [str(self.scratch / name) for name in (".", *SCRATCH)],
                "readable": self.spec["readable"],
                "egress_folder": str(egress),
                "network": self.spec["network"],
                "limits": {
                    "file": self.limits["disk"],
                    "processes": self.limits["processes"],
                    "memory": self.limits["memory"],
                },
                "environment": environment,
                "folder": folder,
                "parent": os.getpid(),
                "links": self.spec["links"],
                "seed": self.spec["build"],
            }
            write_json(self.folder / "room.json", room)
            argv = [
                sys.executable,
                "-I",
                "-m",
                "pysingularity.hub.engines.sandbox",
                str(self.folder / "room.json"),
                *argv,
            ]
            environment, folder = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, "/"
        try:
            return self._watch(argv, environment, folder, events_=events_)
        finally:
            if proxy is not None:
                proxy.close()

    def _watch(self, argv: list[str], environment: dict[str, str], folder: str, *, events_: bool) -> int:
        child = subprocess.Popen(
            argv,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.child = child
        assert child.stdout is not None and child.stderr is not None
        rest = b""
        looked = 0.0
        with selectors.DefaultSelector() as selector:
            for stream in (child.stdout, child.stderr):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            try:
                while selector.get_map():
                    for key, _ in selector.select(0.5):
                        data = os.read(key.fd, 1 << 16)
                        if not data:
                            selector.unregister(key.fileobj)
                        elif key.fileobj is child.stdout and events_:
                            *lines, rest = (rest + data).split(b"\n")
                            for line in lines:
                                self._event(line)
                            if len(rest) > 1 << 20:
                                self.log.write(rest)
                                rest = b""
                        else:
                            self.log.write(data)
                    if time.monotonic() - looked > WATCH:
                        looked = time.monotonic()
                        self._look(child.pid)
                    elif self.cancelled or time.time() > self.deadline:
                        self._look(child.pid)
                    if child.poll() is not None and not selector.select(0):
                        break  # a process that left the sandbox's reach may hold the pipe open for ever
                if rest:
                    self._event(rest)
                return self._wait(child)
            finally:
                self._kill(child)
                self.log.flush()
                child.stdout.close()
                child.stderr.close()
                self.child = None

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return child.wait(0.5)
            except subprocess.TimeoutExpired:
                self._look(child.pid)

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        """End the builder: politely first, so that it unmounts; then for good, with all below."""
        if child.poll() is None:
            for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    pass
                try:
                    child.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if self.spec["sandbox"] != "namespaces":
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _look(self, pid: int) -> None:
        self.given_up()
        if self.cancelled:
            raise Stopped("cancelled", "cancelled", "cancelled")
        if time.time() > self.deadline:
            raise Stopped("timed_out", "time-limit", f"longer than {self.limits['seconds']} s")
        if self.limits["memory"]:
            used = memory_of(pid)
            if used > self.limits["memory"]:
                raise Stopped("failed", "memory-limit", f"more than {self.limits['memory'] >> 20} MiB of memory")
        if time.monotonic() > self.look_at:
            begun = time.monotonic()
            self._look_at_disk()
            # Where counting takes long, it is done more seldom.
            self.look_at = time.monotonic() + max(WATCH_DISK, 20 * (time.monotonic() - begun))

    def _look_at_disk(self) -> None:
        if self.limits["disk"] and size_of(self.scratch, self.limits["disk"]) > self.limits["disk"]:
            raise Stopped("failed", "disk-limit", f"more than {self.limits['disk'] >> 20} MiB of disk")
        disk = os.statvfs(self.scratch)
        if disk.f_bavail * disk.f_frsize < self.limits["reserve"]:
            raise Stopped("failed", "disk-full", f"the disk has less than {self.limits['reserve'] >> 20} MiB left")
        if disk.f_files and disk.f_favail < disk.f_files // 50:
            raise Stopped("failed", "disk-full", "the disk has hardly any room for more files")

    # --- events to lines ---

    def _event(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            event = events.read(line)
        except (ValueError, RecursionError):
            self.log.write(line + b"\n")
            return
        if event.kind == "start":
            title = event.text("title")[:500]
            self.titles[event.fields.get("step")] = title
            self._step(title.partition("\n")[0], title)
        elif event.kind == "log":
            text = event.text("text")
            self.log.write(
                text.encode("utf-8", "surrogateescape")
                if text.endswith("\n")
                else text.encode("utf-8", "surrogateescape") + b"\n"
            )
        elif event.kind == "message":
            self.log.line(f"{event.text('level').upper() or 'INFO'}: {event.text('text')}")
        elif event.kind == "result":
            self.bases = bases_of(event.fields.get("bases"))
        elif event.kind == "end":
            self._end(event.text("status") or "done")
        elif event.kind == "failed":
            self.failure = {"id": event.text("id")[:100], "message": event.text("message")[:1000]}
            hint = event.text("hint")
            self.log.line(f"ERROR: {self.failure['message']}" + (f"\n    hint: {hint[:1000]}" if hint else ""))
        elif event.kind == "progress" and not event.number("total"):
            text = event.text("text")[:500]
            if text and text != self.said:  # ten times a second the same is for bars, not for logs
                self.log.line(text)
            self.said = text

    def _step(self, name: str, title: str) -> None:
        self._end("done")
        self.said = ""
        offset = self.log.step(title)
        self.steps = self.steps[-499:]
        self.steps.append({"name": name[:200], "offset": offset, "status": "running", "started": time.time()})
        self.tell("testing" if name == "test" else "building")

    def _end(self, status: str) -> None:
        if self.steps and self.steps[-1]["status"] == "running":
            step = self.steps[-1]
            step["status"] = status[:20]
            step["seconds"] = round(time.time() - step.pop("started"), 3)


def bases_of(value: object) -> list[dict[str, Any]]:
    """Return what a builder says of the images that it began with, as far as it has the right form."""
    found = []
    for one in value if isinstance(value, list) else []:
        uri, digest = (one.get("uri"), one.get("digest")) if isinstance(one, dict) else (None, None)
        kind, colon, number = digest.partition(":") if isinstance(digest, str) else ("", "", "")
        if isinstance(uri, str) and colon and number.isalnum():
            found.append({"uri": uri[:500], "digest": {kind[:20]: number[:128]}})
    return found[:20]


@contextlib.contextmanager
def local_scratch(spec: dict[str, Any]) -> Iterator[Path]:
    """Make a scratch folder on the node's own disk and remove it at the end.

    A lock file beside each folder is held while its job lives; folders of jobs that were killed have lost theirs and
    are removed by the next job that comes to the node.

    Raises:
        Stopped: the node has no such place.
    """
    base = os.path.expandvars(spec["scratch"])
    if not os.path.isabs(base) or "$" in base:
        raise Stopped("failed", "no-scratch", f"{base}: no folder of the node (setting builds.slurm.scratch)")
    home = Path(base) / f"hub-{os.getuid()}"
    folder = home / f"{spec['build']}-{spec['token'][:8]}"
    lock = home / f"{folder.name}.lock"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise Stopped("failed", "no-scratch", f"{home}: belongs to somebody else")
        for other in home.glob("*.lock"):
            if (handle := _held(other)) is not None:
                sweep(other.with_suffix(""))
                other.unlink(missing_ok=True)
                os.close(handle)
        while (mine := _held(lock, make=True)) is None:
            pass  # somebody swept it between its making and its locking
        for name in (".", *SCRATCH):
            (folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise Stopped("failed", "no-scratch", f"{platform.node()}: {home}: {error.strerror}")
    try:
        yield folder
    finally:
        sweep(folder)
        lock.unlink(missing_ok=True)
        os.close(mine)


def _held(path: Path, *, make: bool = False) -> int | None:
    """Return the descriptor of a lock file that we hold now; None when somebody else does, or it is gone."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(handle).st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def bring_back(image: Path, target: Path) -> None:
    """Copy the image from the node to the folder that the hub sees.

    Raises:
        Stopped: there is none, or it is no plain file.
    """
    try:
        source = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Stopped("failed", "no-result", f"the build left no image: {error.strerror}")
    with open(source, "rb") as inside:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise Stopped("failed", "odd-result", "the build's result is no plain file")
        try:
            with target.open("xb") as outside:
                shutil.copyfileobj(inside, outside, 8 << 20)
                os.fsync(outside.fileno())
        except OSError as error:
            raise Stopped("failed", "hub-error", f"the image cannot be brought to the hub: {error.strerror}")


def memory_of(pid: int) -> int:
    """Return the resident bytes of a process and all below it; shared pages count several times."""
    page = os.sysconf("SC_PAGE_SIZE")
    parents: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b") ")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents.setdefault(int(fields[1]), []).append(int(name))
            sizes[int(name)] = int(fields[21]) * page
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        total += sizes.get(one, 0)
        todo += parents.get(one, [])
    return total


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a small file so that readers see all of the old or all of the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def main(words: list[str]) -> int:
    """Run the job whose specification is words[0]."""
    path = Path(words[0])
    spec = json.loads(path.read_text())
    if spec.get("die_with_parent"):
        # Our parent may have been killed while this interpreter started: then the wish would come too late.
        process.die_with_parent(parent=int(spec.get("parent") or 0))
    with LogWriter(Path(spec["log"]), limit=spec["limits"]["log"], secrets=spec["secrets"]) as log:
        job = Job(path.parent, spec, log)

        def stop(_number: int, _frame: object) -> None:
            job.cancelled = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        try:
            job.run()
        except GivenUp:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
