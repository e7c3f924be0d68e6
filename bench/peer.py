# SPDX-License-Identifier: Apache-2.0
"""Run a peer that lives in a root tree of its own (another distribution's), in turn with ours, without wrappers.

A wrapper that enters the tree anew for every run would be counted as the peer's time. So one process enters the tree
once, becomes an ordinary user there, and then runs a command each time it is asked. Needs root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from common import Series

from pysingularity.linux import mounts, namespaces


class Tree:
    """A process inside `root` that runs commands as `uid` when asked."""

    def __init__(self, root: str, uid: int = 1000, home: str = "/home/u", shared: tuple[str, ...] = ("/tmp",)) -> None:
        ask, self._ask = os.pipe()
        self._answer, answer = os.pipe()
        if os.fork() == 0:
            os.close(self._ask)
            os.close(self._answer)
            try:
                self._serve(root, uid, home, shared, os.fdopen(ask), os.fdopen(answer, "w"))
            finally:
                os._exit(0)
        os.close(ask)
        os.close(answer)
        self._to, self._from = os.fdopen(self._ask, "w"), os.fdopen(self._answer)

    @staticmethod
    def _serve(root, uid, home, shared, requests, answers) -> None:
        namespaces.unshare(namespaces.NEWNS)
        mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
        mounts.mount(root, root, None, mounts.MS_BIND)
        mounts.mount("proc", root + "/proc", "proc")
        for path in ("/sys", "/dev", *shared):
            os.makedirs(root + path, exist_ok=True)
            mounts.mount(path, root + path, None, mounts.MS_BIND | mounts.MS_REC)
        os.chdir(root)
        mounts.pivot_root(".", ".")
        mounts.unmount(".")
        os.chdir("/")
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        environ = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": home, "USER": "u", "LOGNAME": "u"}
        for line in requests:
            request = json.loads(line)
            started = time.perf_counter()
            child = subprocess.Popen(
                request["argv"],
                env={**environ, **request["env"]},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            complaint = child.stderr.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            result = {
                "wall": time.perf_counter() - started,
                "cpu": usage.ru_utime + usage.ru_stime,
                "peak": usage.ru_maxrss / 1024,
                "status": child.returncode,
                "complaint": complaint.decode("utf-8", "replace"),
            }
            answers.write(json.dumps(result) + "\n")
            answers.flush()

    def run(self, argv: list[str], env: dict[str, str] | None = None) -> dict:
        """Run a command in the tree and return its wall and processor seconds, peak MiB, status and complaint."""
        self._to.write(json.dumps({"argv": argv, "env": env or {}}) + "\n")
        self._to.flush()
        return json.loads(self._from.readline())


class PeerSeries(Series):
    """A series whose command runs in a `Tree`."""

    def __init__(self, name: str, tree: Tree, argv: list[str], env: dict[str, str] | None = None, before=None) -> None:
        super().__init__(name, argv, before)
        self.tree, self.env = tree, env

    def once(self, environ: dict[str, str] | None = None, count: bool = True) -> None:  # noqa: ARG002
        """Run the command once in the tree and note its figures."""
        if self.before:
            self.before()
        result = self.tree.run(list(self.command), self.env)
        if result["status"]:
            sys.exit(f"{self.name}: {self.command} ended with {result['status']}\n{result['complaint']}")
        if count:
            self.wall.append(result["wall"])
            self.cpu.append(result["cpu"])
            self.peak.append(result["peak"])
