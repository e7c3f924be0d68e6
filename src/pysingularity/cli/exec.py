# SPDX-License-Identifier: Apache-2.0
"""`singularity exec`: run a command within a container. Start ring."""

from __future__ import annotations

from pysingularity.cli import shared
from pysingularity.cli.options import Arguments

USAGE = "IMAGE COMMAND [ARGUMENT...]"
COUNT = (2, None)
PAYLOAD = True
OPTIONS = shared.OPTIONS
HELP = """
IMAGE is a SIF file, a squashfs or sandbox, a reference such as docker://debian:12, or instance://NAME. Options end at
IMAGE: what follows belongs to the command. The command's exit status or signal becomes this command's.

    singularity exec debian.sif cat /etc/os-release
    singularity exec --bind /data:/mnt:ro --pwd /mnt tools.sif ls
    singularity exec --nv docker://pytorch/pytorch python -c 'import torch; print(torch.cuda.is_available())'
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Become the command."""
    shared.start("exec", arguments, environ)
