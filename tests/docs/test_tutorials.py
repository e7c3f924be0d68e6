# SPDX-License-Identifier: Apache-2.0
"""The tutorials are run: files are written, commands typed, and what they print is compared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs/tutorials"
_BLOCK = re.compile(r"^```(file (\S+)|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: A reference to a registry that tests need not reach → the same image, made here.
DEBIAN, ARCHIVE = "docker://debian:12", "docker-archive:debian.tar"


def make_debian(user) -> None:
    """Make what stands for Debian's image of a registry: a small Debian from the mirror, as `docker save` writes it."""
    user.write("debian.def", "Bootstrap: debootstrap\nOSVersion: bookworm\nInclude: ca-certificates\n")
    for command in (
        ["singularity", "build", "made.sif", "debian.def"],
        ["singularity", "convert", "--to", "docker-archive", "made.sif", "debian.tar"],
        ["rm", "made.sif"],
    ):
        user(command, timeout=1200, check=True)


def bring_wheels(user) -> None:
    """Lay PyTorch for the processor where the page says, from a folder that this machine's pip knows."""
    known = shlex.split(os.environ.get("PIP_FIND_LINKS", ""))
    wheels = [path for folder in known if os.path.isdir(folder) for path in Path(folder).glob("torch-*+cpu-*.whl")]
    if not wheels:
        pytest.skip("needs a wheel of PyTorch for the processor in a folder of PIP_FIND_LINKS")
    for path in wheels:
        user.write(f"wheels/{path.name}")
        shutil.copyfile(path, user.tmp / "wheels" / path.name)


def looks_like_a_picture(user, image: str, picture: str) -> None:
    """A frame that was never drawn is of one colour."""
    code = f"import imageio.v3; print(len({{tuple(p) for p in imageio.v3.imread('{picture}').reshape(-1, 3)[::7]}}))"
    found = user(["singularity", "exec", image, "python3", "-c", code], check=True)
    assert int(found.stdout) > 100


@pytest.mark.network
@pytest.mark.rootless
@pytest.mark.long
@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
@pytest.mark.parametrize("page", sorted(path.name for path in FOLDER.glob("*.md")))
def test_tutorial_works_as_it_is_written(request, kind, page):
    user = request.getfixturevalue(kind)
    text = (FOLDER / page).read_text()
    blocks = list(_BLOCK.finditer(text))
    assert blocks
    if "wheels/" in text:
        bring_wheels(user)
    if DEBIAN in text:
        make_debian(user)
    for block in blocks:
        if block[2]:
            user.write(block[2], block[3])
            continue
        for typed in re.split(r"^\$ ", block[3], flags=re.MULTILINE)[1:]:
            command, _, wanted = typed.partition("\n")
            result = user(["sh", "-c", command.replace(DEBIAN, ARCHIVE)], timeout=3600)
            assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
            assert result.stdout == wanted.rstrip("\n") + ("\n" if wanted.strip() else ""), command
    if "frame.png" in text:
        looks_like_a_picture(user, "simulation.sif", "frame.png")
