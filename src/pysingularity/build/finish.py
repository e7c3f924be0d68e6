# SPDX-License-Identifier: Apache-2.0
"""The end of a build: metadata, %test, and the image made of a folder, of a snapshot, or of another image."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

from pysingularity.build import bootstrap, space
from pysingularity.build import plan as plans
from pysingularity.build.frame import Frame
from pysingularity.build.history import record
from pysingularity.build.plan import Step
from pysingularity.build.request import IMAGE, SANDBOX
from pysingularity.build.sections import app_entries, metadata_entries
from pysingularity.errors import UserError
from pysingularity.image import metadata, output
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.inside import FolderSource, OverlaidSource, source_of
from pysingularity.image.open import open_image
from pysingularity.recipe.sections import file_pairs
from pysingularity.trust.encryption import key_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysingularity.build.steps import Snapshot
    from pysingularity.image.assemble import Written
    from pysingularity.image.inside import Source
    from pysingularity.image.open import Image


class Finish(Frame):
    """Steps at the end of the last stage, and the one step of builds without a recipe."""

    def _entries(self, step: Step, source: Source) -> list[Entry]:
        request, stage = self.request, self._stage(step)
        when = output.epoch(request.environ)
        result = self.results.get(step.stage)
        entries, remarks = metadata_entries(
            self.recipe,
            stage,
            source,
            wanted=request.wanted,
            when=int(time.time()) if when is None else when,
            arch=request.arch,
            force=request.force,
            base_labels=result.labels if result is not None else None,
            post_labels=self.post_labels,
        )
        for remark in remarks:
            if remark not in self.told:
                self._message("warning", remark)
        self.told.update(remarks)
        return entries

    def _metadata(self, step: Step) -> None:
        if self.steps.has(plans.REUSE) or self.folded:
            return
        root = self.roots[step.stage]
        with FolderSource(root) as source:
            entries = self._entries(step, source)
        put_into_folder(root, entries)
        if self.request.fix_perms:
            fix_permissions(root)

    def _test(self, step: Step) -> str | None:
        store = self.stores.get(step.stage)
        if self.folded and store is not None and store.passed(step):
            return "cached"
        self._unfold(step)
        inside = self._container(step)
        upper = "tmpfs" if self.request.writable_tmpfs else ""
        status = inside.run([f"/{metadata.TEST}"], writable=False, upper=upper)
        self._check(status, step, "test")
        if store is not None:
            store.remember_passed(step)
        return None

    def _unfold(self, step: Step) -> None:
        """Bring the last stage to disk after all."""
        store = self.stores.get(step.stage)
        if not self.folded or store is None:
            return
        self.folded = False
        self._bring_back(step.stage)
        with FolderSource(self.roots[step.stage]) as source:
            entries = self._entries(step, source)
        put_into_folder(self.roots[step.stage], entries)

    def _assemble(self, step: Step) -> str | None:
        if self.request.sandbox:
            return None
        snapshot = self.snapshots.get(step.stage)
        if snapshot is not None and not self.request.fix_perms:
            return self._assemble_from(step, snapshot)
        self._unfold(step)
        from pysingularity.image.convert import assemble_sif  # with the squashfs writer

        request, root = self.request, self.roots[step.stage]
        writer = request.writer
        self.written = assemble_sif(
            root,
            request.target,
            definition=self.recipe.text.encode("utf-8", "surrogateescape"),
            oci_config=self._oci_config(step),
            arch=request.arch,
            owners=self.way.owners,
            compression=writer.compression or "gzip",
            level=writer.level,
            block_size=writer.block_size,
            threads=writer.threads,
            force=request.force,
            seal=request.seal,
            progress=self._advance("compressing"),
            say=lambda text: self._message("warning", text),
        )
        return None

    def _oci_config(self, step: Step) -> bytes | None:
        """Return the OCI configuration of the base image, also when its unpacking was spared."""
        result, stage = self.results.get(step.stage), self._stage(step)
        if result is not None:
            return result.oci_config
        if stage.agent != "localimage" and bootstrap.AGENTS.get(stage.agent) != "remote":
            return None
        with open_image(self._base_path(stage)) as image:
            return metadata.oci_config_of(image)

    def _assemble_from(self, step: Step, snapshot: Snapshot) -> str | None:
        """Make the image of the snapshot behind the last step: its blocks are copied, only metadata is new.

        When nothing at all has changed since such an image was made, it is the image still.
        """
        request, store = self.request, self.stores.get(step.stage)
        more = f"{sorted(request.wanted)} {request.force} {request.arch} {output.epoch(request.environ)}"
        if self.folded and store is not None and self._same_again(store.result(step, more)):
            return "cached"
        with snapshot.image() as image:
            with source_of(image) as source:
                entries = self._entries(step, source)
            image.arch = request.arch
            written = self.written = self._copy_blocks(image, entries, oci_config=self._oci_config(step))
        if store is not None:
            store.remember_result(step, more, request.target, written.identity, written.partition_digest)
        return None

    def _same_again(self, found: tuple[str, str, str] | None) -> bool:
        """Give the target the image that the same plan has given before; return False when that is no longer there."""
        from pysingularity.files import copy_bytes
        from pysingularity.image.assemble import Written

        if found is None:
            return False
        path, identity, digest = found
        request = self.request
        if not (os.path.exists(request.target) and os.path.samefile(path, request.target)):
            with open(path, "rb") as source, output.OutputFile(request.target, force=request.force) as target:
                copy_bytes(source.fileno(), target.fd)
                target.publish()
        self.written = Written(request.target, os.path.getsize(request.target), 0, 0, digest, identity)
        return True

    def _reuse(self, step: Step) -> None:
        """Copy the base image's compressed blocks; only files and metadata are new."""
        request, stage = self.request, self._stage(step)
        path = self._base_path(stage)
        staged = self.roots[step.stage]
        with open_image(path) as image:
            image.unlock(key_in(request.options))
            if image.filesystem != "squashfs":
                raise UserError(
                    "not-squashfs",
                    f"{path}: nothing can be added to an image of this kind without unpacking it",
                    hint="give the recipe a %post section (it may be empty but for a comment), or convert the image",
                )
            with source_of(image) as below:
                with self._copier(staged, is_folder=lambda name: below.is_folder(name.lstrip("/"))) as copier:
                    if "files" in request.wanted:
                        for pair in file_pairs(stage, self.recipe.file):
                            copier.copy(pair)
                    for app in stage.apps:
                        for pair in file_pairs(stage, self.recipe.file, app):
                            copier.copy(pair, base=f"/scif/apps/{app}")
                apps = app_entries(stage)
                entries = [*apps, *self._entries(step, OverlaidSource([below], apps))]
            self.written = self._copy_blocks(image, entries, staged=staged)

    def _copy_blocks(
        self, image: Image, entries: Sequence[Entry], *, staged: str = "", oci_config: bytes | None = None
    ) -> Written:
        """Make the target of an image's compressed blocks, with entries and the files of `staged` laid over it."""
        from pysingularity.image.convert import with_changes  # with the squashfs writer

        request = self.request
        return with_changes(
            image,
            request.target,
            entries=entries,
            staged=staged,
            definition=self.recipe.text.encode("utf-8", "surrogateescape"),
            oci_config=oci_config,
            latest=output.epoch(request.environ),
            compression=request.writer.compression,
            level=request.writer.level,
            threads=request.writer.threads,
            force=request.force,
            seal=request.seal,
            progress=self._advance("copying"),
        )

    def _convert(self, step: Step) -> None:  # noqa: ARG002
        from pysingularity.image import convert  # with the squashfs writer

        request = self.request
        source = request.spec if request.kind in (IMAGE, SANDBOX) else self._fetch(request.spec)
        advance = self._advance("reading")
        if not request.sandbox:
            self.written = convert.to_file(
                source,
                request.target,
                compression=request.writer.compression,
                level=request.writer.level,
                threads=request.writer.threads,
                force=request.force,
                owners=self._way.owners if self._way is not None else None,
                key=key_in(request.options),
                seal=request.seal,
                progress=advance,
                say=lambda text: self._message("warning", text),
            )
            return
        with output.OutputFolder(request.target, force=request.force) as folder:
            room = space.amount([source]) if os.path.isdir(source) else space.UNPACKED * os.path.getsize(source)
            space.need(folder.partial, room, f"unpacking {source}")
            os.chmod(folder.partial, 0o755)
            known = False
            with open_image(source) as image:
                image.unlock(key_in(request.options))
                if image.kind == "sandbox":
                    known = record.load(source) is not None  # the copy of a sandbox remembers what that one was
                    from pysingularity.build.clone import clone

                    clone(source, folder.partial, self.way.owners, advance)
                else:
                    owner = self._owners(folder.partial) if request.fakeroot else None
                    convert.unpack_into(image, folder.partial, owner=owner, progress=advance)
            if request.fix_perms:
                fix_permissions(folder.partial)
            if not known:
                record.keep(folder.partial, os.path.abspath(request.spec) if request.kind == IMAGE else request.spec)
            folder.publish()


def fix_permissions(root: str) -> None:
    """Give the owner of every file the right to read it, and of every folder to enter and change it."""
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            wanted = 0o700 if stat.S_ISDIR(mode) else 0o600 if stat.S_ISREG(mode) else 0
            if wanted & ~mode:
                os.chmod(path, stat.S_IMODE(mode) | wanted)
