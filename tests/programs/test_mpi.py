# SPDX-License-Identifier: Apache-2.0
"""Open MPI: ranks that find each other by PMIx and talk through shared memory, from inside and from outside."""

from __future__ import annotations

import shutil

import pytest

pytestmark = [pytest.mark.long, pytest.mark.network, pytest.mark.rootless, pytest.mark.fuse]

RANK = """
from mpi4py import MPI
world = MPI.COMM_WORLD
data = world.bcast(bytes(1 << 20) if world.rank == 0 else None)
left = world.sendrecv(world.rank, (world.rank + 1) % world.size, source=(world.rank - 1) % world.size)
print(f"{world.rank}/{world.size} {left} {len(data)} {world.allreduce(world.rank)}\\n", end="", flush=True)
"""
ANSWERS = [f"{rank}/4 {(rank - 1) % 4} 1048576 6" for rank in range(4)]
#: Only shared memory between the ranks: a fall-back to TCP would hide that it does not work.
SHARED_MEMORY = ("--oversubscribe", "--mca", "btl", "vader,self")


def test_ranks_within_one_container(as_user, sing, mpi_image):
    program = as_user.write("rank.py", RANK)
    result = sing("exec", mpi_image, "mpirun", "-n", "4", *SHARED_MEMORY, "python3", program)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ANSWERS


def test_one_container_per_rank_started_by_the_hosts_mpirun(as_user, sing, mpi_image):
    program = as_user.write("rank.py", RANK)
    mpirun, outside, inside = [shutil.which("mpirun")], {}, []
    if mpirun == [None]:  # the image's own, run on the host: the versions are the same at any rate
        tree = as_user.tmp / "tree"
        sing("-q", "build", "--sandbox", tree, mpi_image, check=True, timeout=300)
        libraries = next(tree.glob("usr/lib/*/libmpi.so.*")).parent
        mpirun = [tree / "usr/bin/mpirun.openmpi"]
        outside = {"LD_LIBRARY_PATH": str(libraries), "OPAL_PREFIX": str(tree / "usr")}
        inside = ["env", "-u", "OPAL_PREFIX"]
        if as_user([*mpirun, "--version"], env=outside).returncode:
            pytest.skip("needs mpirun on the host (openmpi-bin)")
    rank = [*inside, "singularity", "exec", mpi_image, "python3", program]
    result = as_user([*mpirun, "-n", "4", *SHARED_MEMORY, *rank], env=outside)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ANSWERS
