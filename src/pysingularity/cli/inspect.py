# SPDX-License-Identifier: Apache-2.0
"""`singularity inspect`: show what an image says of itself, read without running anything in it."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UserError
from pysingularity.image import metadata
from pysingularity.image.open import open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = "IMAGE"
COUNT = (1, 1)
HELP = """\
Show labels (the default), scripts, environment, help text and definition file of an image: a SIF file, a bare squashfs
or ext3 image, or a sandbox. Several options show several parts.

    singularity inspect image.sif
    singularity inspect --runscript --environment image.sif
    singularity inspect --json --all sandbox/
"""
OPTIONS = (
    Option("labels", "Show the labels (default)", short="l"),
    Option("deffile", "Show the definition file that the image was built from", short="d"),
    Option("runscript", "Show the runscript", short="r"),
    Option("startscript", "Show the startscript", short="s"),
    Option("test", "Show the test script", short="t"),
    Option("environment", "Show the environment files", short="e"),
    Option("helpfile", "Show the help text", short="H"),
    Option("json", "Print JSON", short="j"),
    Option("all", "Show everything, as JSON"),
    Option("app", "Show parts of an app instead of the image", kind=TEXT, metavar="NAME", env=("APP", "APPNAME")),
    Option("list-apps", "List the apps"),
)
#: The order in which parts are shown.
PARTS = ("deffile", "runscript", "startscript", "test", "helpfile", "environment", "labels")


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the parts of the image that are asked for."""
    path = arguments.positional[0]
    with open_image(path) as image:
        attributes = metadata.attributes_of(image)
    if arguments.all:
        results.write_json(metadata.document(attributes))
        return 0
    wanted = [part for part in PARTS if getattr(arguments, part)]
    if not wanted and not arguments.list_apps:
        wanted = ["labels"]
    app = str(arguments.app or "")
    shown = attributes
    if app:
        apps = attributes.get("apps", {})
        if app not in apps:
            hint = f"apps of this image: {', '.join(apps)}" if apps else "this image has no apps"
            raise UserError("no-such-app", f"{path}: has no app {app}", hint=hint)
        shown = apps[app]
    if arguments.json:
        chosen: dict[str, Any] = {part: shown[part] for part in wanted if part in shown}
        found = {"apps": {app: chosen}} if app else chosen
        if arguments.list_apps:
            found = {"apps": attributes.get("apps", {}), **(chosen if not app else {})}
        results.write_json(metadata.document(metadata.clean(found)))
        return 0
    if arguments.list_apps:
        results.write("".join(f"{name}\n" for name in attributes.get("apps", {})))
    results.write("".join(text(part, shown[part]) for part in wanted if part in shown))
    return 0


def text(part: str, value: Any) -> str:
    """Return one part as people read it."""
    if part == "labels":
        return "".join(f"{name}: {label}\n" for name, label in value.items())
    if part == "environment":
        return "".join(f"=== {path} ===\n{script}\n\n" for path, script in value.items())
    return f"{value}\n"
