# SPDX-License-Identifier: Apache-2.0
"""What `singularity build` is given with a Dockerfile: context, .dockerignore, arguments, secrets. No command."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.build.dockerfile.select import select
from pysingularity.build.dockerfile.state import PROXIES
from pysingularity.build.request import DockerBuild
from pysingularity.cli.options import Arguments
from pysingularity.errors import UserError
from pysingularity.recipe import templates
from pysingularity.recipe.dockerfile import parse
from pysingularity.recipe.model import Recipe
from pysingularity.sif.layout import host_arch

#: A secret is a key or a password, not a data set.
LARGEST_SECRET = 1 << 20
#: Arguments that builders themselves understand, and that no ARG has to name.
_KNOWN = (*PROXIES, "SOURCE_DATE_EPOCH")


def request(text: bytes, path: str, arguments: Arguments, environ: dict[str, str]) -> DockerBuild:
    """Return what belongs to the build of a Dockerfile.

    Raises:
        RecipeError: the Dockerfile is wrong at a place.
        UserError: a folder, argument or secret is not there.
    """
    folder = str(getattr(arguments, "context", "") or os.path.dirname(path) or ".")
    if not os.path.isdir(folder):
        raise UserError("no-context", f"--context {folder}: there is no such folder")
    words = arguments.build_arg if isinstance(arguments.build_arg, list) else []
    words = [str(word) for word in words]
    # As docker does: a name alone takes the value of the environment.
    words = [word if "=" in word else f"{word}={environ[word]}" for word in words if "=" in word or word in environ]
    secrets = getattr(arguments, "secret", None) or []
    return DockerBuild(
        dockerfile=parse(text, path),
        context=os.path.abspath(folder),
        ignore=_ignore(path, folder),
        arguments=templates.from_options(words, str(arguments.build_arg_file or "")),
        target=str(getattr(arguments, "target", "") or ""),
        secrets=dict(_secret(str(word), environ) for word in secrets),
    )


def stages(docker: DockerBuild, arguments: Arguments) -> Recipe:
    """Return the stages that will be built, and say what in the file or the arguments may want mending."""
    selection = select(docker, str(getattr(arguments, "arch", "") or host_arch()))
    for remark in docker.dockerfile.remarks:
        messages.warning(remark)
    declared = [one.text for stage in selection.stages for one in stage.instructions if one.name == "ARG"]
    named = {word.partition("=")[0] for text in declared for word in text.split()}
    unused = [
        name
        for name in docker.arguments
        if name not in named | selection.reader.used and name not in _KNOWN and not name.startswith("BUILDKIT_")
    ]
    if unused:
        messages.warning(f"these build arguments are not used in {docker.dockerfile.file}: {', '.join(unused)}")
    return selection.recipe(docker.dockerfile)


def _ignore(path: str, folder: str) -> tuple[str, ...]:
    """Return the lines of the file's own .dockerignore, else of the context's."""
    for name in (f"{path}.dockerignore", os.path.join(folder, ".dockerignore")):
        try:
            with open(name, encoding="utf-8-sig", errors="surrogateescape") as stream:
                return tuple(stream.read().splitlines())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError("dockerignore", f"{name}: cannot be read: {(error.strerror or '').lower()}") from None
    return ()


def _secret(text: str, environ: dict[str, str]) -> tuple[str, bytes]:
    """Return name and content of a --secret.

    Raises:
        UserError: it has no name, or cannot be read.
    """
    options = dict(part.partition("=")[::2] for part in text.split(","))
    name = options.get("id", "")
    source = options.get("src") or options.get("source") or ""
    variable = options.get("env", "")
    unknown = set(options) - {"id", "src", "source", "env", "type"}
    if not name or unknown:
        hint = "write --secret id=NAME,src=FILE or --secret id=NAME,env=VARIABLE"
        raise UserError("bad-secret", f"--secret {text}: {'has no id' if not name else 'is not understood'}", hint=hint)
    if not source and (variable or name in environ):
        variable = variable or name
        if variable not in environ:
            raise UserError("bad-secret", f"--secret id={name}: there is no variable {variable}")
        return name, environ[variable].encode("utf-8", "surrogateescape")
    try:
        with open(source or name, "rb") as stream:
            content = stream.read(LARGEST_SECRET + 1)
    except OSError as error:
        raise UserError(
            "bad-secret", f"--secret id={name}: {source or name}: {(error.strerror or '').lower()}"
        ) from None
    if len(content) > LARGEST_SECRET:
        raise UserError("bad-secret", f"--secret id={name}: {source or name} has more than {LARGEST_SECRET} bytes")
    return name, content
