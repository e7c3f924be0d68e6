# SPDX-License-Identifier: Apache-2.0
"""The layers of a container's root: which image or folder, what lies over it, and which program helps to mount it.

Start ring of image files; a plain sandbox has no use for it.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import HostError, ImageError, UsageError, UserError
from pysingularity.image.open import Image, open_image
from pysingularity.linux.libc import call, encode, pointer
from pysingularity.runtime.binds import absolute
from pysingularity.runtime.spec import EXT, SANDBOX, SQUASHFS, Layer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.cli.options import Arguments
    from pysingularity.config import Settings

#: Types of file systems (statfs(2)) that cannot take the changes of an overlay: NFS, Lustre, FUSE, overlayfs, CIFS and
#: SMB2, AFS, BeeGFS, GPFS, Ceph.
NO_UPPER = {
    *(0x6969, 0x0BD00BD0, 0x65735546, 0x794C7630, 0xFF534D42, 0xFE534D42, 0x5346414F, 0x19830326, 0x47504653),
    0x00C36400,
}


class Layers:
    """What goes over the root, collected from the image and the options.

    Arguments:
        options: options of `cli.shared`.
        settings: the configuration.
        environ: the caller's environment.
        is_root: whether the caller is root, who may use loop devices.
        warm: whether keepers of warm images may be asked.

    Attributes:
        overlays: read-only layers, lowest first.
        upper: the folder that takes changes, "" for none.
        upper_layer: the ext3 file system that does, or None.
        programs: name → path of the programs that are needed to mount all this.
    """

    def __init__(
        self, options: Arguments, settings: Settings, environ: dict[str, str], is_root: bool, warm: bool
    ) -> None:
        self.options, self.settings, self.environ, self.is_root, self.warm = options, settings, environ, is_root, warm
        self.writable = bool(options.writable)
        self.overlays: list[Layer] = []
        self.upper = ""
        self.upper_layer: Layer | None = None
        self.programs: dict[str, str] = {}

    def root(self, image: Image) -> Layer:
        """Return the root layer of an image; the overlays that it carries are put upon it."""
        path = absolute(image.path)
        if image.filesystem == "ext3":
            self._need_fuse2fs(image.path)
            return Layer(EXT, path, image.offset, image.size, writable=self.writable)
        if image.locked:
            self._unlock(image)
        layer = self._unpacked_if_needed(Layer(SQUASHFS, path, image.offset, image.size, plain=image.plain))
        for part in image.overlays:
            if part.filesystem == "squashfs":
                self.overlays.append(Layer(SQUASHFS, path, part.offset, part.size))
            elif part.filesystem == "ext3" and self.writable and self.upper_layer is None:
                self._need_fuse2fs(image.path)
                self.upper_layer = Layer(EXT, path, part.offset, part.size, writable=True)
            elif part.filesystem == "ext3" and self._may_mount_ext():
                self.overlays.append(Layer(EXT, path, part.offset, part.size))
            else:
                messages.warning(
                    f"{image.path}: its {part.filesystem} overlay is left out"
                    + (": fuse2fs is not installed" if part.filesystem == "ext3" else "")
                )
        return layer

    def _unlock(self, image: Image) -> None:
        """Open an encrypted image with the key that the caller gives."""
        from pysingularity.runtime.warm import recall, recall_or_make
        from pysingularity.terminal import ask_passphrase
        from pysingularity.trust.encryption import ANSWER, key_of

        path, options = absolute(image.path), self.options
        # Those with namespaces of their own leave no keeper that others could ask.
        apart = options.pid or options.ipc or options.net or options.network or options.uts or options.hostname
        apart = apart or options.containall or options.compat or options.fakeroot or options.image_user or self.is_root
        ask_keeper = recall if apart or options.unsquash else recall_or_make

        def ask() -> bytes:
            # With limits, systemd may start this command again: people are not asked twice.
            answer = self.environ.get(ANSWER)
            if answer is None:
                answer = self.environ[ANSWER] = ask_passphrase().decode("utf-8", "surrogateescape")
            return answer.encode("utf-8", "surrogateescape")

        key = key_of(self.environ, pem_path=str(options.pem_path or ""), ask=ask if options.passphrase else None)
        # What is opened begins at its own 0, wherever it lies in the file.
        image.unlock(key, recall=(lambda proof: ask_keeper(path, 0, proof)) if self.warm else None)

    def _may_mount_ext(self) -> bool:
        """Say whether something here can mount ext3: the kernel for root, fuse2fs for others."""
        from pysingularity.runtime.helpers import find  # rarely used

        program = find("fuse2fs", self.environ.get("PATH", ""))
        if program:
            self.programs["fuse2fs"] = program
        return bool(program) or (self.is_root and posix.access("/dev/loop-control", posix.R_OK))

    def _need_fuse2fs(self, path: str) -> None:
        if not self._may_mount_ext():
            raise HostError(
                "no-fuse2fs",
                f"{path}: holds an ext3 file system, and fuse2fs, which mounts it for ordinary users, is not installed",
                hint="administrator: install fuse2fs; or convert the image: singularity build --sandbox DIR IMAGE",
            )

    def _unpacked_if_needed(self, layer: Layer) -> Layer:
        """Return the layer, or the folder of its unpacked files where nothing here can mount it."""
        from pysingularity.linux.fuse import usable  # without the server, which a warm image does not need

        driver = "unpacked" if self.options.unsquash else str(self.settings["image driver"])
        if layer.plain is not None:  # neither the kernel nor another program knows how to read it
            if driver == "unpacked" or not usable():
                from pysingularity.image.unpacked import in_memory  # brings in the whole unpacker

                messages.verbose("the image is encrypted and cannot be mounted: its files are unpacked into memory")
                layer.fill = in_memory(layer.plain, layer.path)
            return layer
        if driver == "squashfuse" and "squashfuse_ll" not in self.programs:
            from pysingularity.runtime.helpers import find

            program = find("squashfuse_ll", self.environ.get("PATH", ""))
            if not program:
                raise HostError(
                    "no-squashfuse",
                    "the setting is image driver = squashfuse, and squashfuse_ll is not installed",
                    hint="administrator: install squashfuse, or set image driver = auto",
                )
            self.programs["squashfuse_ll"] = program
        kernel = self.is_root and posix.access("/dev/loop-control", posix.R_OK)
        if driver != "unpacked" and (usable() or (kernel and driver != "python")):
            return layer
        if driver != "unpacked":
            messages.info("/dev/fuse cannot be opened: the image is unpacked into the cache (once)")
        from pysingularity.image.unpacked import unpacked  # brings in the whole unpacker

        return Layer(SANDBOX, unpacked(layer.path, layer.offset, layer.size, self.environ))

    def merge(self) -> None:
        """See to it that what takes the changes can be the upper layer of an overlay; else find a program that can."""
        upper = self.upper_layer
        if upper is None and not (self.upper and _refuses_overlays(self.upper)):
            return
        if upper is not None and self.is_root and posix.access("/dev/loop-control", posix.R_OK):
            return
        from pysingularity.runtime.helpers import find

        program = find("fuse-overlayfs", self.environ.get("PATH", ""))
        if program:
            self.programs["fuse-overlayfs"] = program
        elif upper is not None:
            raise HostError(
                "no-fuse-overlayfs",
                f"{upper.path}: changes to an ext3 file system need fuse-overlayfs, which is not installed",
                hint="administrator: install fuse-overlayfs; or use a folder: --overlay DIR",
            )

    def of_options(self) -> None:
        """Take what --overlay names."""
        for text in self.options.overlay:  # type: ignore[attr-defined]
            path, _, mode = str(text).rpartition(":")
            if mode not in ("ro", "rw") or not path:
                path, mode = str(text), ""
            path = absolute(path)
            image = open_image(path)
            image.close()
            if image.kind == "sandbox":
                if mode == "ro":
                    self.overlays.append(Layer(SANDBOX, f"{path}/upper" if posix.access(f"{path}/upper", 0) else path))
                    continue
                if self.upper:
                    raise UserError("two-writers", "only one --overlay can be writable; give the others as PATH:ro")
                if self.writable:
                    raise UsageError("two-writers", "--writable and a writable --overlay cannot both be given")
                self.upper = path
            elif image.filesystem == "ext3":
                self._need_fuse2fs(path)
                if mode != "ro":
                    if self.upper or self.upper_layer:
                        raise UserError("two-writers", "only one --overlay can be writable; give the others as PATH:ro")
                    if self.writable:
                        raise UsageError("two-writers", "--writable and a writable --overlay cannot both be given")
                    self.upper_layer = Layer(EXT, path, image.offset, image.size, writable=True)
                else:
                    self.overlays.append(Layer(EXT, path, image.offset, image.size))
            elif image.filesystem == "squashfs":
                self.overlays.append(self._unpacked_if_needed(Layer(SQUASHFS, path, image.offset, image.size)))
            else:
                raise ImageError(
                    "unsupported-image",
                    f"--overlay {text}: its file system ({image.filesystem}) cannot be mounted here",
                    hint="use a folder instead: mkdir DIR; singularity exec --overlay DIR ...",
                )


def _refuses_overlays(path: str) -> bool:
    """Say whether a folder lies on a file system of which the kernel is known to make no upper layer: statfs(2)."""
    buffer = bytearray(256)
    try:
        call("statfs", encode(path), pointer(buffer), path=path)
    except OSError:
        return False
    return int.from_bytes(buffer[:8], "little") & 0xFFFFFFFF in NO_UPPER
