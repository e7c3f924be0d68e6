# SPDX-License-Identifier: Apache-2.0
"""Loop devices: a part of a file as a block device (loop(4)), for real root only. Start ring."""

from __future__ import annotations

import posix

LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
_EBUSY, _EAGAIN = 16, 11


def attach(image: int, offset: int, size: int, *, readonly: bool = True, block: int = 4096) -> tuple[str, int]:
    """Attach a part of an open file to a free loop device; return the device's path and an open descriptor of it.

    The device frees itself when the last user is gone (AUTOCLEAR): mount it, then close the descriptor.

    Arguments:
        block: the size of its sectors, where the part's place allows that; no larger than the file system's blocks.

    Raises:
        OSError: no loop devices here (a container), or Linux < 5.8 (no LOOP_CONFIGURE).
    """
    from fcntl import ioctl  # root only: ordinary users serve images over FUSE

    flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if readonly else 0)
    # struct loop_info64: device, inode, rdevice, offset, sizelimit, number, encrypt_type, key size, flags, names, init
    info = bytes(24) + offset.to_bytes(8, "little") + size.to_bytes(8, "little") + bytes(12)
    info += flags.to_bytes(4, "little") + bytes(64 + 64 + 32 + 16)
    block = block if offset % block == 0 and size % block == 0 else 512
    control = posix.open("/dev/loop-control", posix.O_RDWR | posix.O_CLOEXEC)
    try:
        for _ in range(256):
            path = f"/dev/loop{ioctl(control, LOOP_CTL_GET_FREE)}"
            device = posix.open(path, (posix.O_RDONLY if readonly else posix.O_RDWR) | posix.O_CLOEXEC)
            try:
                ioctl(
                    device, LOOP_CONFIGURE, image.to_bytes(4, "little") + block.to_bytes(4, "little") + info + bytes(64)
                )
            except OSError as error:
                posix.close(device)
                if error.errno not in (_EBUSY, _EAGAIN):
                    raise
                continue  # another process was quicker to take this device
            return path, device
    finally:
        posix.close(control)
    raise OSError(_EBUSY, "no free loop device", "/dev/loop-control")
