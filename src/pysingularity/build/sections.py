# SPDX-License-Identifier: Apache-2.0
"""Sections of a recipe that become files of the image: scripts, environment, labels, help, apps, the definition itself.

From a stage and the files of the base image to `Entry` values; putting them into a folder or over an image is the
caller's. What runs (%pre, %setup, %post, %test) and what is copied (%files) is `execute` and `files`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from pysingularity.image import metadata, scif, scripts
from pysingularity.image.entries import Entry
from pysingularity.recipe.model import Recipe, Stage
from pysingularity.recipe.sections import labels as read_labels

if TYPE_CHECKING:
    from pysingularity.image.inside import Source


class Wanted:
    """Which sections of a recipe are followed: all, or those that --section names.

    Arguments:
        names: values of --section; empty or with "all" for everything, "none" for nothing.
    """

    __slots__ = ("_names",)

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = {name.lower().lstrip("%") for name in names}

    def __contains__(self, name: object) -> bool:
        if not self._names or "all" in self._names:
            return True
        return "none" not in self._names and name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def everything(self) -> bool:
        """Return whether nothing is left out."""
        return not self._names or "all" in self._names


def app_entries(stage: Stage) -> list[Entry]:
    """Return the folders and files of a stage's SCIF apps, and the script that tells all programs where they are."""
    found: list[Entry] = []
    for name in stage.apps:

        def body(section: str, app: str = name) -> str | None:
            return stage.body(section, app) if stage.has(section, app) else None

        words = [section.arguments.split(None, 1) for section in stage.all("apprun", name)]
        arguments = next((two[1] for two in reversed(words) if len(two) > 1), "")
        found += scif.entries(
            name,
            run=body("apprun"),
            run_arguments=arguments,
            start=body("appstart"),
            test=body("apptest"),
            help=body("apphelp"),
            environment=body("appenv"),
            labels=read_labels(stage.body("applabels", name)),
        )
    if stage.apps:
        found.append(Entry.file(metadata.APPS_BASE, scif.global_script(stage.apps), 0o755))
    return found


def post_script(stage: Stage) -> str:
    """Return the text of %post with the %appinstall of every app behind it, in the order of the file."""
    text = stage.body("post")
    for name in stage.apps:
        if stage.has("appinstall", name):
            text += scif.install_script(name, stage.body("appinstall", name))
    return text


def metadata_entries(
    recipe: Recipe,
    stage: Stage,
    source: Source,
    *,
    wanted: Wanted,
    when: int,
    arch: str,
    force: bool = False,
    base_labels: Mapping[str, str] | None = None,
    post_labels: str = "",
) -> tuple[list[Entry], list[str]]:
    """Return what a stage's sections write into the image, and lines on what was not done as written.

    Arguments:
        recipe: its text is kept in the image.
        stage: the last one.
        source: the files of the root file system so far.
        wanted: sections to follow.
        when: time of the build, Unix seconds.
        arch: architecture of the image.
        force: new labels replace old ones of another value.
        base_labels: labels of the base that are not in a file of it.
        post_labels: lines that %post wrote to SINGULARITY_LABELS.
    """
    entries = metadata.history_entry(source)
    remarks: list[str] = []
    has_help = stage.has("help")
    if "help" in wanted and has_help:
        entries.append(Entry.file(metadata.HELP, stage.body("help")))
    entries.append(Entry.file(metadata.DEFINITION, recipe.text))
    if "labels" in wanted:
        old = {**(base_labels or {}), **metadata.parse_labels(source.read(metadata.LABELS))}
        new = {**read_labels(stage.body("labels")), **read_labels(post_labels)}
        labels, kept = metadata.merge_labels(old, new, force=force)
        remarks += [f"label {name}: the base image's value stays ({old[name]!r}); --force replaces it" for name in kept]
        labels.update(metadata.automatic_labels(when=when, arch=arch, header=stage.header, has_help=has_help))
        entries.append(Entry.file(metadata.LABELS, metadata.labels_file(labels)))
    if "environment" in wanted and stage.has("environment"):
        old_text = (source.read(metadata.CUSTOM_ENVIRONMENT) or b"").decode("utf-8", "surrogateescape")
        text = scripts.append_environment(old_text, stage.body("environment"))
        entries.append(Entry.file(metadata.CUSTOM_ENVIRONMENT, text, 0o755))
    for name, path in (
        ("startscript", metadata.STARTSCRIPT),
        ("runscript", metadata.RUNSCRIPT),
        ("test", metadata.TEST),
    ):
        if name in wanted and stage.has(name):
            entries.append(Entry.file(path, scripts.section_script(stage.body(name), stage.arguments(name)), 0o755))
    return entries, remarks
