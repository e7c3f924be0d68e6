# SPDX-License-Identifier: Apache-2.0
"""Any kind of image into any other: SIF, bare squashfs, sandbox (archives for Docker and OCI are `image.export`).

A squashfs whose compression stays is taken over block by block, without decompressing anything (`with_changes` adds
files, labels and environment on the way); everything else goes through a tree of nodes into a new squashfs. The
smaller steps are `image.tree` (folders), `image.assemble` (SIF files) and `squashfs.unpack`.
"""

from __future__ import annotations

import os
import stat
import tempfile
from functools import partial

from pysingularity.errors import ImageError, UserError
from pysingularity.image import metadata as contract
from pysingularity.image.assemble import SifAssembly, Written, newest
from pysingularity.image.entries import Entry
from pysingularity.image.inside import FolderSource, OverlaidSource, source_of, squashfs_of
from pysingularity.image.open import Image, open_image
from pysingularity.image.output import OutputFolder, epoch
from pysingularity.image.tree import scan_directory, store_tree
from pysingularity.sif.layout import DEFINITION, host_arch
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
from pysingularity.squashfs.writer import SquashfsWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from pysingularity.image.inside import Source
    from pysingularity.image.tree import Owners
    from pysingularity.squashfs.inode import Inode
    from pysingularity.squashfs.node import FileData
    from pysingularity.squashfs.unpack import Owners as UnpackOwners
    from pysingularity.squashfs.unpack import Unpacked
    from pysingularity.trust.encryption import Key, Seal

MOST_LINKS = 40


def assemble_sif(
    folder: str,
    output: str,
    *,
    definition: bytes | None = None,
    metadata: dict[str, Any] | None = None,
    oci_config: bytes | None = None,
    arch: str = "",
    owners: Owners | None = None,
    exclude: Collection[str] = (),
    entries: Sequence[Entry] = (),
    compression: str = "gzip",
    level: int | None = None,
    block_size: int = 131072,
    threads: int | None = None,
    when: int | None = None,
    force: bool = False,
    bare: bool = False,
    seal: Seal | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Written:
    """Make a SIF file (or a bare squashfs) of a folder.

    Arguments:
        folder: the root file system.
        output: path of the file; checked before any work.
        definition: definition file for the SIF object; by default the folder's own.
        metadata: `inspect`'s attributes; by default read from the folder.
        oci_config: OCI configuration to be kept.
        arch: architecture in OCI's words, by default this machine's.
        owners, exclude: see `scan_directory`.
        entries: small files put on top of the folder's.
        compression, level, block_size, threads, when, force, bare, seal: see `SifAssembly`.
        progress: called with the number of bytes of each file read.
        say: called with a line about each entry that is left out.
    """
    with FolderSource(folder) as own:
        source = OverlaidSource([own], entries)
        if not source.is_folder(contract.META):
            # Not an image yet: it gets what a runtime expects, and keeps everything it has.
            entries = [*(kept(entry) for entry in contract.base_entries()), *entries]
            source = OverlaidSource([own], entries)
        if definition is None:
            definition = source.read(contract.DEFINITION)
        if metadata is None:
            metadata = contract.collect(source, definition=definition)
    assembly = SifAssembly(
        output,
        definition=definition,
        attributes=metadata,
        oci_config=oci_config,
        arch=arch or host_arch(),
        bare=bare,
        compression=compression,
        level=level,
        block_size=block_size,
        threads=threads,
        when=when,
        force=force,
        seal=seal,
    )
    with assembly as sif:
        root = scan_directory(folder, owners=owners, exclude=exclude, latest=epoch(os.environ), say=say)
        if sif.when is None:
            sif.when = newest(root)
        sif.put(root, entries)
        store_tree(sif.writer, root, progress=progress)
        return sif.finish(root)


def kept(entry: Entry) -> Entry:
    """Return an entry that leaves alone what stands in its place."""
    return Entry(entry.path, entry.kind, entry.mode, entry.data, keep=True)


def with_changes(
    image: Image,
    output: str,
    *,
    entries: Sequence[Entry] = (),
    staged: str = "",
    remove: Collection[str] = (),
    definition: bytes | None = None,
    oci_config: bytes | None = None,
    owners: Owners | None = None,
    compression: str = "",
    level: int | None = None,
    threads: int | None = None,
    when: int | None = None,
    latest: int | None = None,
    force: bool = False,
    bare: bool = False,
    seal: Seal | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Make a SIF file (or a bare squashfs) of an image's squashfs, with files added, changed or removed.

    The compressed blocks of the image are copied as they are when the compression stays; only new files are compressed.

    Arguments:
        image: an open image whose root file system is squashfs.
        output: path of the new file; may be the image's own with `force`.
        entries: small files (metadata, labels, environment).
        staged: a folder whose content is laid over the image's: folders merge, files replace. Links of the image that
            lead to folders are followed inside it.
        remove: paths inside the image, without leading slash, that are left out.
        definition, oci_config: for the SIF objects; None keeps the image's.
        owners: owners of the staged files, see `scan_directory`.
        compression: a squashfs compression; empty keeps the image's, and then its blocks are reused.
        level, threads, when, force, bare, seal: see `SifAssembly`.
        latest: later modification times become this one (Unix seconds).
        progress: called with numbers of bytes read.

    Raises:
        ImageError: the image is damaged, or its root file system is not squashfs.
    """
    squashfs = squashfs_of(image)
    reuse = compression in ("", squashfs.superblock.compression)
    attributes, definition, oci_config = _described(image, entries, staged, definition, oci_config)
    if when is None:
        when = epoch(os.environ)
    assembly = SifAssembly(
        output,
        definition=definition,
        attributes=attributes,
        oci_config=oci_config,
        arch=image.arch or host_arch(),
        bare=bare,
        compression=squashfs.superblock.compression if reuse else compression,
        level=level,
        block_size=squashfs.superblock.block_size,
        threads=threads,
        # Copying the same content again gives the same time again.
        when=squashfs.superblock.mtime if when is None else when,
        force=force,
        seal=seal,
    )
    with assembly as sif:
        root = sif.writer.adopt(squashfs) if reuse else copy_content(sif.writer, squashfs, progress=progress)
        for path in remove:
            _remove(root, os.fsencode(path))
        if staged:
            upper = scan_directory(staged, owners=owners)
            store_tree(sif.writer, upper, progress=progress)
            lay_over(root, upper)
        if latest is not None:
            for _, node in root.walk():
                node.mtime = min(node.mtime, latest)
        sif.put(root, entries)
        return sif.finish(root)


def _described(
    image: Image, entries: Sequence[Entry], staged: str, definition: bytes | None, oci_config: bytes | None
) -> tuple[dict[str, Any], bytes | None, bytes | None]:
    """Return attributes, definition and OCI configuration of an image with changes on top."""
    if definition is None:
        definition = source_definition(image)
    if oci_config is None:
        oci_config = contract.oci_config_of(image)
    stored = contract.stored_attributes(image)
    if stored is not None and not entries and not staged:
        return stored, definition, oci_config
    with source_of(image) as below:
        layers: list[Source] = [below]
        middle = FolderSource(staged) if staged else None
        try:
            if middle is not None:
                layers.insert(0, middle)
            found = contract.collect(OverlaidSource(layers, entries), definition=definition)
        finally:
            if middle is not None:
                middle.close()
    return found, definition, oci_config


def copy_content(
    writer: SquashfsWriter, squashfs: SquashfsImage, *, progress: Callable[[int], None] | None = None
) -> Node:
    """Read all files of a squashfs into a writer of another compression; return the tree."""
    made: dict[int, Node] = {}
    root: Node | None = None
    folders: dict[bytes, Node] = {}
    for path, inode in squashfs.walk():
        path = path.strip(b"/")
        known = made.get(inode.ref) if inode.kind != "dir" else None
        node = known or node_of(squashfs, inode)
        if known is None:
            made[inode.ref] = node
            if inode.kind == "file":
                node.data = _copy_file(writer, squashfs, inode)
                if progress is not None:
                    progress(inode.size)
        if inode.kind == "dir":
            folders[path] = node
        if not path:
            root = node
            continue
        parent, _, name = path.rpartition(b"/")
        children = folders[parent].children
        if children is not None:
            children[name] = node
    if root is None:
        raise ImageError("damaged-squashfs", "a squashfs without a root folder")
    return root


def node_of(squashfs: SquashfsImage, inode: Inode) -> Node:
    """Return a node with everything an inode says except its content."""
    node = Node(inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime)
    node.target, node.rdev = inode.target, inode.rdev
    node.xattrs = squashfs.xattrs(inode) or None
    return node


def _copy_file(writer: SquashfsWriter, squashfs: SquashfsImage, inode: Inode) -> FileData:
    if inode.size <= squashfs.superblock.block_size:
        return writer.store_bytes(squashfs.read(inode))
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        data = squashfs.read(inode, at, size)
        at += len(data)
        return data

    return writer.store(read, inode.size)


def lay_over(root: Node, upper: Node) -> None:
    """Lay one tree over another: folders merge and take the upper one's attributes, everything else is replaced."""
    stack = [(root, upper, b"")]
    while stack:
        below, above, path = stack.pop()
        for name, node in (above.children or {}).items():
            children = below.children
            if children is None:
                continue
            there = children.get(name)
            place = path + b"/" + name
            if node.kind == "dir" and there is not None and there.kind == "symlink":
                there = resolve(root, place) or there
            if node.kind == "dir" and there is not None and there.kind == "dir":
                stack.append((there, node, place))
            else:
                children[name] = node


def resolve(root: Node, path: bytes) -> Node | None:
    """Return the node at a path of a tree, symbolic links followed inside it; None when there is nothing."""
    names = [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]
    trail, links = [root], 0
    while names:
        name = names.pop()
        if name == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        node = (trail[-1].children or {}).get(name)
        if node is None:
            return None
        if node.kind != "symlink":
            trail.append(node)
            continue
        links += 1
        if links > MOST_LINKS:
            return None
        if node.target.startswith(b"/"):
            trail = [root]
        names += [part for part in reversed(node.target.split(b"/")) if part not in (b"", b".")]
    return trail[-1]


def _remove(root: Node, path: bytes) -> None:
    parent, _, name = path.strip(b"/").rpartition(b"/")
    folder = resolve(root, parent)
    if folder is not None and folder.children is not None:
        folder.children.pop(name, None)


def to_sandbox(
    image: Image,
    folder: str,
    *,
    owner: UnpackOwners | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Unpacked:
    """Unpack an image into a folder that appears when it is complete.

    Arguments:
        image: an open image of any kind but a sandbox.
        folder: path of the sandbox; checked before any work.
        owner: keeps owners and devices (`linux.ownership`). None: root keeps the image's, for anybody else everything
            belongs to the user and devices are left out.
        workers: processes that unpack; by default as many as there are processors.
        force: replace a folder that stands there.
        progress: called with numbers of bytes written.

    Returns:
        what was made, and what could not be kept.
    """
    with OutputFolder(folder, force=force) as output:
        result = unpack_into(image, output.partial, owner=owner, workers=workers, progress=progress)
        output.publish()
    return result


def unpack_into(
    image: Image,
    folder: str,
    *,
    owner: UnpackOwners | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Unpacked:
    """Unpack an image into an existing empty folder; arguments and result as for `to_sandbox`."""
    if image.kind == "sandbox":
        raise UserError("already-sandbox", f"{image.path}: is a sandbox already", hint="copy it with: cp -a")
    if image.filesystem == "ext3":
        result = _unpack_ext3(image, folder, owner, workers, progress)
    else:
        result = unpack(squashfs_of(image), folder, owner=owner, workers=workers, progress=progress)
    # A root folder that its owner may not enter could not even be moved into its place.
    os.chmod(folder, stat.S_IMODE(os.stat(folder).st_mode) | 0o700)
    return result


def _unpack_ext3(
    image: Image,
    folder: str,
    owner: UnpackOwners | None,
    workers: int | None,
    progress: Callable[[int], None] | None,
) -> Unpacked:
    """Unpack an ext3 image by way of a squashfs beside the folder, so that owners and devices follow the same rules."""
    from pysingularity.image.ext3 import store_ext3  # only old images need the tool's wrapper

    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(folder))) as middle:
        with SquashfsWriter(middle.fileno(), compression="gzip", level=1) as writer:
            root = store_ext3(image, writer)
            size = writer.finish(root)
        return unpack(SquashfsImage(middle.fileno(), 0, size), folder, owner=owner, workers=workers, progress=progress)


def to_file(
    source: str,
    output: str,
    *,
    bare: bool = False,
    compression: str = "",
    level: int | None = None,
    threads: int | None = None,
    when: int | None = None,
    force: bool = False,
    owners: Owners | None = None,
    key: Key | None = None,
    seal: Seal | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Written:
    """Make a SIF file or a bare squashfs of an image of any kind.

    Arguments:
        source: path of the image.
        output: path of the new file.
        bare: a squashfs alone.
        compression: empty for the image's own (its blocks are copied), or gzip for a folder.
        level, threads, when, force, seal: see `SifAssembly`.
        owners: see `scan_directory`.
        key: opens an image that is encrypted.
        progress: called with numbers of bytes read.
        say: called with a line about each entry that is left out.
    """
    assemble = partial(
        assemble_sif,
        output=output,
        bare=bare,
        compression=compression or "gzip",
        level=level,
        threads=threads,
        when=when,
        force=force,
        seal=seal,
        progress=progress,
        say=say,
    )
    with open_image(source) as image:
        image.unlock(key)
        if image.kind == "sandbox":
            return assemble(source, owners=owners)
        if image.filesystem == "squashfs":
            return with_changes(
                image,
                output,
                compression=compression,
                level=level,
                threads=threads,
                when=when,
                force=force,
                bare=bare,
                seal=seal,
                progress=progress,
            )
        return _ext3_to_file(
            image,
            SifAssembly(
                output,
                definition=source_definition(image),
                attributes=contract.attributes_of(image),
                arch=image.arch or host_arch(),
                bare=bare,
                compression=compression or "gzip",
                level=level,
                threads=threads,
                when=when,
                force=force,
                seal=seal,
            ),
            progress,
        )


def _ext3_to_file(image: Image, assembly: SifAssembly, progress: Callable[[int], None] | None) -> Written:
    from pysingularity.image.ext3 import store_ext3  # only old images need the tool's wrapper

    with assembly as sif:
        return sif.finish(store_ext3(image, sif.writer, progress))


def source_definition(image: Image) -> bytes | None:
    """Return the definition file that an image keeps: as an object of a SIF file, or inside."""
    if image.sif is not None:
        one = image.sif.of_type(DEFINITION)
        if one is not None:
            return image.sif.read(one)
    with source_of(image) as source:
        return source.read(contract.DEFINITION)
