# SPDX-License-Identifier: Apache-2.0
"""What a build is asked for, as one value: filled by the command, read by plan and execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pysingularity.build.sections import Wanted
from pysingularity.recipe.dockerfile import Dockerfile
from pysingularity.recipe.model import Recipe
from pysingularity.trust.encryption import Seal

#: Kinds of what an image is built from.
RECIPE, IMAGE, SANDBOX, REFERENCE = "recipe", "image", "sandbox", "reference"


@dataclass(frozen=True)
class Writer:
    """How the file system of an image file is compressed.

    Arguments:
        compression: name of the compressor; "" keeps an existing image's, and is gzip for a new one.
        level: its level, None for its default.
        block_size: bytes.
        threads: how many; None for as many as this process may use.
    """

    compression: str = ""
    level: int | None = None
    block_size: int = 131072
    threads: int | None = None


@dataclass(frozen=True)
class DockerBuild:
    """What belongs to the build of a Dockerfile alone.

    Arguments:
        dockerfile: the file.
        context: absolute path of the folder that COPY takes from.
        ignore: lines of its .dockerignore.
        arguments: values of --build-arg.
        target: stage that becomes the image; "" for the last.
        secrets: name → content; never part of a hash, an image or the cache.
    """

    dockerfile: Dockerfile
    context: str
    ignore: tuple[str, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class BuildRequest:
    """A build.

    Arguments:
        target: path of the image.
        spec: what it is built from, as it was given.
        kind: RECIPE, IMAGE, SANDBOX or REFERENCE.
        recipe: the definition file, for RECIPE.
        sandbox: make a folder instead of a file.
        force: replace what stands at the target, and labels of the base.
        update: run the recipe on the existing sandbox at the target.
        wanted: sections to follow.
        notest: leave %test out.
        fakeroot: keep owners when an image is unpacked into a sandbox.
        fix_perms: give the owner access to everything in the image.
        cleanup: remove temporary files also when the build fails.
        nv: bring the GPU into %post and %test.
        writable_tmpfs: let %test write into memory.
        binds, mounts: values of --bind and --mount.
        ca_bundle: see `trust`.
        arch: architecture in OCI's words.
        writer: compression of image files.
        directory: folder that relative paths start from.
        environ: the caller's environment.
        options: flags for agents, see `bootstrap.BootstrapRequest`; "key" opens encrypted images that are built from.
        debug_shell: open a shell in the container when %post fails.
        cache: use cached steps.
        docker: for a Dockerfile; `recipe` then holds its stages.
        seal: encrypts the image.
    """

    target: str
    spec: str
    kind: str
    recipe: Recipe | None = None
    sandbox: bool = False
    force: bool = False
    update: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    notest: bool = False
    fakeroot: bool = False
    fix_perms: bool = False
    cleanup: bool = True
    nv: bool = False
    writable_tmpfs: bool = False
    binds: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    ca_bundle: str = "auto"
    arch: str = "amd64"
    writer: Writer = field(default_factory=Writer)
    directory: str = "."
    environ: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    debug_shell: bool = False
    cache: bool = True
    docker: DockerBuild | None = None
    seal: Seal | None = field(default=None, repr=False)
