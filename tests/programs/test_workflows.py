# SPDX-License-Identifier: Apache-2.0
"""Workflow managers: cwltool's and Snakemake's steps run in our containers, with the options that these choose."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.long, pytest.mark.network, pytest.mark.rootless, pytest.mark.fuse]

TOOL = """\
cwlVersion: v1.2
class: CommandLineTool
baseCommand: [sh, -c]
arguments: ["cat $(inputs.data.path); pwd; echo $HOME; cat given.txt; echo $SINGULARITY_NAME:$LEAK; cat $(inputs.net)"]
requirements:
  DockerRequirement: {dockerPull: "tools:1"}
  InlineJavascriptRequirement: {}
  InitialWorkDirRequirement:
    listing: [{entryname: given.txt, entry: "was given\\n"}]
inputs: {data: File, net: {type: string, default: /proc/net/dev}}
stdout: out.txt
outputs: {result: stdout}
"""
FAILING = TOOL.replace('arguments: ["', 'arguments: ["exit 7; ')


@pytest.fixture
def cwltool(programs, as_user, sif):
    """Run a CWL tool in the image, which lies where cwltool keeps what it has pulled."""
    (as_user.tmp / "images").mkdir()
    sif.rename(as_user.tmp / "images/tools_1.sif")
    as_user.own(as_user.tmp / "images")
    as_user.write("data.txt", "the data\n")
    as_user.write("job.yml", "data: {class: File, path: data.txt}\n")
    environ = {"CWL_SINGULARITY_CACHE": str(as_user.tmp / "images"), "LEAK": "leaks"}

    def run(text: str):
        tool = as_user.write("tool.cwl", text)
        return as_user([programs / "cwltool", "--singularity", "--outdir", "results", tool, "job.yml"], env=environ)

    return run


def test_cwltool_runs_a_tool_in_a_local_image(cwltool, as_user):
    result = cwltool(TOOL)
    assert result.returncode == 0, result.stderr
    data, here, home, given, name, *networks = (as_user.tmp / "results/out.txt").read_text().splitlines()
    assert (data, given) == ("the data", "was given")
    assert here == home
    assert name.startswith("tools")
    assert name.endswith(".sif:")  # the caller's LEAK stays outside: cwltool asks for a clean environment
    assert [line.split(":")[0].strip() for line in networks if ":" in line] == ["lo"]


def test_cwltool_sees_a_failing_tool(cwltool):
    result = cwltool(FAILING)
    assert result.returncode != 0
    assert "exit status: 7" in result.stderr or "exited with status: 7" in result.stderr, result.stderr


SNAKEFILE = """\
rule all:
    input: "second.txt"

rule first:
    output: "first.txt"
    container: "{image}"
    shell: "echo $SINGULARITY_NAME > {{output}}; id -u >> {{output}}"

rule second:
    input: "first.txt"
    output: "second.txt"
    container: "{image}"
    threads: 2
    shell: "cat {{input}} - <<< threads:{{threads}} > {{output}}"
"""


def snakemake(programs, as_user, *options):
    command = [programs / "snakemake", "--cores", "2", *options]
    return as_user(command, env={"XDG_CACHE_HOME": str(as_user.tmp / "snakemake-cache")})


@pytest.mark.parametrize("options", [("--use-singularity",), ("--software-deployment-method", "apptainer")])
def test_snakemake_runs_rules_in_a_local_image(programs, as_user, sif, options):
    as_user.write("Snakefile", SNAKEFILE.format(image=sif))
    result = snakemake(programs, as_user, *options)
    assert result.returncode == 0, result.stderr
    assert (as_user.tmp / "second.txt").read_text() == f"tools.sif\n{as_user.uid}\nthreads:2\n"


def test_snakemake_passes_our_options_and_sees_a_failing_rule(programs, as_user, sif):
    rules = 'rule all:\n    output: "x.txt"\n    container: "{image}"\n    shell: "test $A = 1 && touch {{output}}"\n'
    as_user.write("Snakefile", rules.format(image=sif))
    failed = snakemake(programs, as_user, "--use-singularity")
    assert failed.returncode == 1
    assert not (as_user.tmp / "x.txt").exists()
    result = snakemake(programs, as_user, "--use-singularity", "--singularity-args=--cleanenv --env A=1")
    assert result.returncode == 0, result.stderr
    assert (as_user.tmp / "x.txt").exists()
