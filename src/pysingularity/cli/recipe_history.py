# SPDX-License-Identifier: Apache-2.0
"""`singularity recipe history`: what was done by hand in a sandbox, as a definition file to start from."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli import results
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import SingularityError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.build.history.record import Record

USAGE = "SANDBOX"
COUNT = (1, 1)
HELP = """\
Compare SANDBOX with what it was when it was made, and print a definition file that makes the difference again: packages
that were installed with apt, apk, pip, uv, conda and npm, files that were added, changed or removed, edited
scripts. It is a beginning, to be read before it is used.

    singularity recipe history box/ > box.def
    singularity recipe history --files parts box/ > box.def
    singularity build final.sif box.def

A sandbox remembers what it was. For one that does not (made by another program), --base names the image.
"""
OPTIONS = (
    Option("base", "Compare with this image", kind=TEXT, metavar="IMAGE"),
    Option(
        "files",
        "Copy added and changed files to this folder, and take them from there",
        kind=TEXT,
        metavar="DIR",
    ),
    Option("pin", "Ask apt and apk for the very versions of the sandbox"),
    Option("list", "Print what has changed, one line each, instead of a definition file"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Print the definition file."""
    from pysingularity.build.space import is_sandbox

    name = str(arguments.positional[0])
    root = os.path.realpath(name)
    if not os.path.isdir(root) or not is_sandbox(root):
        raise UserError(
            "not-a-sandbox", f"{name}: is no sandbox", hint="singularity build --sandbox BOX IMAGE makes one"
        )
    folder = str(arguments.files or "")
    if folder and os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(
            "files-folder", f"--files {folder}: is there already", hint="name a folder that is new or empty"
        )
    before = _before(root, name, str(arguments.base or ""), environ)
    # Some files belong to subordinate ids, and only their root can read them.
    from pysingularity.runtime.rootless import become_root

    way = become_root(environ=environ, quiet=True)
    owners = way.owners.at(root) if hasattr(way.owners, "at") else way.owners
    from pysingularity.build.history.compare import compare
    from pysingularity.build.history.write import Writer

    changes = compare(root, before)
    if arguments.list:
        lines = [
            *(f"{key}: {item} {one.version}" for key, some in changes.packages.items() for item, one in some.items()),
            *(f"{key}: {item} is gone" for key, some in changes.lost.items() for item in some),
            *(f"added: /{path}" for path in changes.added),
            *(f"changed: /{path}" for path in changes.changed),
            *(f"removed: /{path}" for path in changes.removed),
        ]
        results.write("".join(f"{line}\n" for line in lines))
        return 0
    writer = Writer(
        changes, before, root, name, owners, base=str(arguments.base or ""), folder=folder, pin=bool(arguments.pin)
    )
    results.write(writer.text())
    for remark in writer.remarks:
        messages.warning(remark)
    return 0


def _before(root: str, name: str, base: str, environ: dict[str, str]) -> Record:
    """Return what the sandbox was.

    Raises:
        UserError: nothing tells.
    """
    from pysingularity.build.history import record

    if base:
        return record.of_image(base)
    found = record.load(root)
    if found is not None:
        return found
    from pysingularity.image.inside import FolderSource
    from pysingularity.image.metadata import DEFINITION

    with FolderSource(root) as source:
        text = (source.read(DEFINITION) or b"").decode("utf-8", "surrogateescape")
    try:
        from pysingularity.build.bootstrap.remote import fetch_text, reference_text
        from pysingularity.recipe.parser import parse

        header = parse(text).stages[-1].header
        path = fetch_text(reference_text(header), {"pull": "never"}, environ, lambda *_: None)
    except (SingularityError, IndexError):
        raise UserError(
            "no-base",
            f"{name}: does not say what it was when it was made",
            hint="name the image that it was made of: --base IMAGE",
        ) from None
    return record.of_image(path)
