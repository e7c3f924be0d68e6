# SPDX-License-Identifier: Apache-2.0
"""Programs written for Singularity do not notice whom they talk to: cwltool, spython, mpirun, Snakemake."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

pytestmark = [pytest.mark.rootless, pytest.mark.peer, pytest.mark.long]

TOOL = """
cwlVersion: v1.2
class: CommandLineTool
baseCommand: [sh, -c, 'cat "$0" > out.txt; id -u >> out.txt; pwd >> out.txt']
hints: {DockerRequirement: {dockerPull: "local/box:1"}}
inputs: {f: {type: File, inputBinding: {position: 1}}}
outputs: {o: {type: File, outputBinding: {glob: out.txt}}}
"""
RUNSCRIPT = '#!/bin/sh\n[ "$#" -gt 0 ] && exec "$@"\nexec sh\n'


@pytest.fixture
def packages(as_user):
    """Return the environment in which the user's Python finds what this interpreter has."""
    folders = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    return {"PYTHONPATH": folders}


@pytest.fixture
def python():
    """Return an interpreter that every user may run."""
    path = os.path.realpath(sys.executable)
    return path if not path.startswith("/root") else "/usr/bin/python3"


@pytest.fixture
def runnable(box, squash, fuse):
    """An image whose runscript starts its arguments, as those made from OCI images do."""
    (box / ".singularity.d/runscript").write_text(RUNSCRIPT)
    return squash(box)


def needs(module):
    return pytest.importorskip(module, reason=f"needs the Python package {module}")


def test_cwltool_runs_a_tool(as_user, runnable, packages, python):
    needs("cwltool")
    cache = as_user.tmp / "images"
    cache.mkdir()
    as_user.own(cache)
    for name in ("local_box_1.sif", "local_box:1.sif", "local_s_box:1.sif"):
        shutil.copy(runnable, cache / name)
    as_user.write("tool.cwl", TOOL)
    as_user.write("in.txt", "hello\n")
    as_user.write("job.yml", "f: {class: File, path: in.txt}\n")
    program = "from cwltool.main import run; run()"
    words = [python, "-c", program, "--singularity", "--outdir", "out", "tool.cwl", "job.yml"]
    result = as_user(words, env={**packages, "CWL_SINGULARITY_CACHE": str(cache)})
    assert result.returncode == 0, result.stderr
    lines = (as_user.tmp / "out/out.txt").read_text().splitlines()
    assert lines[:2] == ["hello", str(as_user.uid)]
    assert json.loads(result.stdout)["o"]["basename"] == "out.txt"


def test_spython_runs_inspects_and_starts_instances(as_user, runnable, packages, python):
    needs("spython")
    script = as_user.write(
        "script.py",
        f"""
from spython.main import Client
assert Client.version().startswith("singularity version 4.")
Client.load({str(runnable)!r})
print("execute", Client.execute(["echo", "hello"]).strip())
print("inspect", sorted(Client.inspect({str(runnable)!r})))
instance = Client.instance({str(runnable)!r}, name="spytest")
print("instance", Client.execute(instance, ["echo", "inside"]).strip())
print("listed", "spytest" in str(Client.instances(quiet=True)))
instance.stop()
print("left", Client.instances(quiet=True))
""",
    )
    result = as_user([python, script], env=packages)
    assert result.returncode == 0, result.stderr
    lines = [
        line
        for line in result.stdout.splitlines()
        if line.split(" ")[0] in ("execute", "inspect", "instance", "listed", "left")
    ]
    assert lines[0] == "execute hello"
    assert "attributes" in lines[1]
    assert lines[2:4] == ["instance inside", "listed True"]


def test_mpirun_starts_ranks(as_user, image, tool):
    program = tool("mpirun")
    words = [
        program,
        "--oversubscribe",
        "-n",
        "4",
        "singularity",
        "exec",
        str(image),
        "sh",
        "-c",
        "echo rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE; [ -d /dev/shm ]",
    ]
    result = as_user(words)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"rank {number} of 4" for number in range(4)]
    assert as_user([*words[:-1], "exit 3"]).returncode == 3


def test_snakemake_runs_a_rule(as_user, runnable, packages, python):
    needs("snakemake")
    as_user.write(
        "Snakefile",
        f'rule all:\n    output: "out.txt"\n    container: "{runnable}"\n    shell: "ls /bin > {{output}}"\n',
    )
    words = [python, "-m", "snakemake", "--cores", "1", "--software-deployment-method", "apptainer"]
    result = as_user(words, env=packages)
    assert result.returncode == 0, result.stderr
    assert "busybox" in (as_user.tmp / "out.txt").read_text()
