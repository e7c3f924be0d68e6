# SPDX-License-Identifier: Apache-2.0
"""`singularity push`: one SIF file to a registry (oras://) or a library (library://)."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli.options import MANY, TEXT, Arguments, Option
from pysingularity.cli.pull import SIGN_IN
from pysingularity.errors import UsageError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = "IMAGE REFERENCE"
COUNT = (2, 2)
HELP = """\
Send a SIF file to a registry or a library.

    singularity push tools.sif oras://registry.example.org/lab/tools:1.0
    singularity push tools.sif library://lab/tools/main:1.0,latest
"""
OPTIONS = (
    Option("allow-unsigned", "Send images without a signature (always done)", short="U", env=("ALLOW_UNSIGNED",)),
    Option("description", "Describe the image to the library", short="D", kind=TEXT, metavar="TEXT"),
    Option("annotation", "Add KEY=VALUE to the manifest (oras)", kind=MANY, metavar="KEY=VALUE"),
    Option("library", "Use this library", kind=TEXT, metavar="URL", env=("LIBRARY",)),
    Option("json", "Print digests as JSON", short="j"),
    *SIGN_IN,
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Push the image."""
    from pysingularity.cli.pull import options_of
    from pysingularity.cli.transfer import Display
    from pysingularity.reference import parse_reference
    from pysingularity.registry.settings import settings_from
    from pysingularity.sif.file import SifFile
    from pysingularity.sif.layout import arch_name

    path, text = arguments.positional
    reference = parse_reference(text)
    if reference.scheme not in ("oras", "library"):
        hint = "use oras:// or library://; for a registry of container images: singularity convert --to docker-archive"
        raise UserError("cannot-push", f"{text}: a SIF file cannot be sent to {reference.scheme}://", hint=hint)
    if reference.digest:
        raise UserError("push-by-digest", f"{text}: an image is sent to a tag; its digest follows from its content")
    annotations: dict[str, str] = {}
    for one in arguments.annotation:  # type: ignore[attr-defined]
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UsageError("bad-annotation", f"--annotation {one}: write KEY=VALUE")
        annotations[key] = value
    with SifFile.open(path) as sif:  # nothing else is sent
        arch = arch_name(sif.header.arch)
    settings = settings_from(options_of(arguments), environ)
    from pysingularity import thirdparty
    from pysingularity.files import hash_file

    thirdparty.enable()
    sha256 = hash_file(path)
    with Display() as display:
        if reference.scheme == "oras":
            from pysingularity.registry import oras

            with open(path, "rb") as file:
                source = _Told(file, display, os.path.basename(path))
                digest = oras.push(
                    path, reference, settings, sha256=sha256, annotations=annotations, note=display, source=source
                )
        else:
            from pysingularity.registry import library

            digest = library.push(
                path,
                reference,
                settings,
                sha256=sha256,
                arch=arch,
                description=str(arguments.description or ""),
                note=display,
            )
    if arguments.json:
        from pysingularity.cli.results import write_json

        write_json({"reference": str(reference), "image": f"sha256:{sha256}", "manifest": digest})
    else:
        messages.info(f"{path} is now {reference} ({digest})")
    return 0


class _Told:
    """A file that tells how much of it was read."""

    def __init__(self, file: Any, display: Any, title: str) -> None:
        self._file, self._display, self._title = file, display, title
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(1 << 18 if size < 0 or size > 1 << 18 else size)
        self._display(self._title, self._file.tell(), self._size)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._file.seek(position, whence))

    def tell(self) -> int:
        return int(self._file.tell())
