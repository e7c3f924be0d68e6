# SPDX-License-Identifier: Apache-2.0
"""Put a SIF file together: definition file, metadata, OCI configuration and a squashfs partition, written in one pass.

`SifAssembly` opens the output with a squashfs writer standing where the partition will be; whoever has contents (a
folder, layers of a registry, another image) feeds the writer and finally hands over the tree. The same tree gives the
same bytes: the identity comes from the partition's digest, and times from the caller, SOURCE_DATE_EPOCH, or the newest
file of the tree. Converting whole images is `image.convert`.
"""

from __future__ import annotations

import os

from pysingularity.errors import UserError
from pysingularity.files import hash_stretch
from pysingularity.image import metadata
from pysingularity.image.entries import Entry, put_into_tree
from pysingularity.image.output import OutputFile, epoch
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create, identity_from, plan
from pysingularity.squashfs.writer import SquashfsWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Any

    from pysingularity.squashfs.node import Node
    from pysingularity.trust.encryption import Seal
    from pysingularity.trust.sealing import Sealing

BLOCK_SIZE = 131072


class Written:
    """What was written.

    Attributes:
        path: the file.
        size: its size in bytes.
        partition_offset, partition_size: where the squashfs stands in it, in bytes.
        partition_digest: "sha256:…" of the squashfs.
        identity: the SIF file's UUID, "" for a bare squashfs.
    """

    __slots__ = ("identity", "partition_digest", "partition_offset", "partition_size", "path", "size")

    def __init__(self, path: str, size: int, offset: int, partition_size: int, digest: str, identity: str) -> None:
        self.path, self.size, self.identity = path, size, identity
        self.partition_offset, self.partition_size, self.partition_digest = offset, partition_size, digest

    def __repr__(self) -> str:
        return f"Written({self.path!r}, {self.size} bytes, {self.partition_digest})"


class SifAssembly:
    """A SIF file in the making; a context manager.

        with SifAssembly("image.sif", definition=text, attributes=found, arch="amd64") as sif:
            node.data = sif.writer.store_bytes(b"...")
            sif.finish(root)

    Nothing appears under the name before `finish` has returned.

    Arguments:
        output: path of the file.
        definition: the definition file, None for none.
        attributes: `inspect`'s attributes, kept as a JSON object; whoever makes the tree writes the files.
        oci_config: configuration of the OCI image this one comes from.
        arch: architecture in OCI's words.
        bare: write the squashfs alone, without the SIF file around it.
        compression, level, block_size, threads: for the squashfs writer.
        when: time stamp in Unix seconds; by default SOURCE_DATE_EPOCH, otherwise the newest time in the tree.
        force: replace an existing file.
        seal: encrypt the squashfs; no plain byte of it reaches the disk.
    """

    def __init__(
        self,
        output: str,
        *,
        definition: bytes | None = None,
        attributes: Mapping[str, Any] | None = None,
        oci_config: bytes | None = None,
        arch: str = "amd64",
        bare: bool = False,
        compression: str = "gzip",
        level: int | None = None,
        block_size: int = BLOCK_SIZE,
        threads: int | None = None,
        when: int | None = None,
        force: bool = False,
        seal: Seal | None = None,
    ) -> None:
        if seal is not None and bare:
            raise UserError("encrypted-squashfs", f"{output}: only SIF files can be encrypted")
        self._output = OutputFile(output, force=force)
        self.path, self.bare = output, bare
        self.when = epoch(os.environ) if when is None else when
        self._settings = {"compression": compression, "level": level, "block_size": block_size, "threads": threads}
        self._objects = [] if bare else objects_for(definition, attributes, oci_config, arch, seal)
        self._seal = seal
        self._sealing: Sealing | None = None
        self.offset = 0 if bare else plan(self._objects)[-1]
        self._writer: SquashfsWriter | None = None

    def __enter__(self) -> SifAssembly:
        self._output.__enter__()
        try:
            if self._seal is not None:
                from pysingularity.trust.sealing import Sealing  # loads ciphers

                self._sealing = Sealing(self._output.fd, self.offset, self._seal)
            self._writer = SquashfsWriter(
                self._output.fd,
                self.offset,
                sink=self._sealing.sink if self._sealing is not None else None,
                mtime=self.when or 0,
                **self._settings,  # type: ignore[arg-type]
            )
        except BaseException as error:
            self._output.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._output.__exit__(kind, value, trace)

    @property
    def writer(self) -> SquashfsWriter:
        """The writer of the squashfs partition."""
        if self._writer is None:
            raise UserError("not-open", f"{self.path}: is not being written")
        return self._writer

    def put(self, root: Node, entries: Iterable[Entry]) -> list[str]:
        """Put small files into the tree; see `image.entries.put_into_tree`."""
        return put_into_tree(root, entries, self.writer.store_bytes, self.when or 0)

    def finish(self, root: Node) -> Written:
        """Write the tree's tables and everything around the partition, and publish the file."""
        when = newest(root) if self.when is None else self.when
        self.writer.mtime = when
        size = self.writer.finish(root)
        if self._sealing is not None:
            size = self._sealing.finish(size, when)
        fd = self._output.fd
        digest = hash_stretch(fd, self.offset, size)
        identity = ""
        if self.bare:
            os.ftruncate(fd, size)
        else:
            partition = self._objects[-1]
            partition.offset, partition.size = self.offset, size
            mark = identity_from(digest)
            create(fd, self._objects, identity=mark, when=when)
            identity = layout.Header(identity=mark).uuid
        total = os.fstat(fd).st_size
        self._output.publish()
        return Written(self.path, total, self.offset, size, "sha256:" + digest.hex(), identity)


def objects_for(
    definition: bytes | None,
    attributes: Mapping[str, Any] | None,
    oci_config: bytes | None,
    arch: str,
    seal: Seal | None = None,
) -> list[SifObject]:
    """Return the objects of an image in their usual order, the partition (without content yet) last."""
    objects = []
    if definition is not None:
        objects.append(SifObject(layout.DEFINITION, definition))
    if attributes is not None:
        objects.append(SifObject(layout.JSON, metadata.inspect_object(attributes), name=metadata.INSPECT_OBJECT))
    if oci_config is not None:
        objects.append(SifObject(layout.JSON, oci_config, name=metadata.OCI_CONFIG_OBJECT))
    if seal is not None and seal.message:
        extra = layout.crypto_message_extra(layout.PEM, layout.RSA_OAEP)
        # The partition comes next; it is last because its size is not known yet.
        objects.append(SifObject(layout.CRYPTO_MESSAGE, seal.message, link=len(objects) + 2, extra=extra))
    kind = layout.SQUASHFS if seal is None else layout.GOCRYPTFS_SQUASHFS
    extra = layout.partition_extra(kind, layout.PRIMARY, arch)
    objects.append(SifObject(layout.PARTITION, extra=extra))
    return objects


def newest(root: Node) -> int:
    """Return the latest modification time in a tree."""
    return max(node.mtime for _, node in root.walk())
