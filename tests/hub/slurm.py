# SPDX-License-Identifier: Apache-2.0
"""A Slurm of one node, of the tests' own: munged, slurmctld and slurmd on free ports, below one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """\
ClusterName=hub
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/d
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=300
KillWait=5
MessageTimeout=10
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 Feature=fast State=UNKNOWN
PartitionName=build Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=other Nodes={host} MaxTime=INFINITE State=UP
"""


def ports(count: int) -> list[int]:
    """Return free ports of loopback."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Cluster:
    """Slurm's daemons, and its commands for the tests.

    Arguments:
        folder: of its own, that everybody may enter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        folder.chmod(0o755)
        for name in ("ctld", "d"):
            (folder / name).mkdir(mode=0o755)
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(CONFIGURATION.format(folder=folder, host=self.host, ports=ports(2)))
        self.environ = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait for the node."""
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        places = (key, *(self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")))
        options = [f"--{name}={place}" for name, place in zip(names, places, strict=True)]
        self.daemon("munged", "--foreground", "--force", *options)
        deadline = time.monotonic() + 20
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < deadline, "munged does not come up"
            time.sleep(0.05)
        self.daemon("slurmctld", "-D", "-f", str(self.configuration))
        self.start_node()

    def start_node(self) -> None:
        """Start the node's daemon."""
        self.daemon("slurmd", "-D", "-f", str(self.configuration))
        self.ready()

    def ready(self) -> None:
        """Wait until the node takes jobs."""
        deadline = time.monotonic() + 60
        while (state := self.call("sinfo", "--noheader", "--partition=build", "--format=%T", check=False)) != "idle":
            assert time.monotonic() < deadline, (state, (self.folder / "ctld.log").read_text()[-2000:])
            if "down" in state or "drain" in state:  # what a killed daemon leaves behind
                self.call("scontrol", "update", f"nodename={self.host}", "state=resume", check=False)
            time.sleep(0.2)

    def daemon(self, name: str, *options: str) -> None:
        """Start one of the daemons."""
        program = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin")
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program, *options], env=self.environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def call(self, *words: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it prints."""
        result = subprocess.run(words, env=self.environ, capture_output=True, text=True, check=False, timeout=60)
        assert not check or result.returncode == 0, result.stderr
        return result.stdout.strip()

    def end(self, name: str, *, kill: bool = False) -> None:
        """End a daemon."""
        daemon = self.daemons.pop(name)
        daemon.kill() if kill else daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """End everything, jobs first."""
        if "slurmd" in self.daemons and "slurmctld" in self.daemons:
            self.call("scancel", "--state=RUNNING", "--state=PENDING", "--user=root,pysing,pysing-plain", check=False)
            self.call("scontrol", "shutdown", check=False)
        for name in ("slurmd", "slurmctld", "munged"):
            if name in self.daemons:
                self.end(name)
