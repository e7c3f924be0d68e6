# SPDX-License-Identifier: Apache-2.0
"""Removing a tree that may be hostile or deep: no link is followed, no mount is entered, no depth is too much.

A folder inside the tree is not descended into but moved up to its top, so that two open descriptors are enough for any
depth, and a name that is swapped for a link in between is at worst removed itself.
"""

from __future__ import annotations

import os
import stat

_ENOTEMPTY, _EEXIST = 39, 17


def remove_deeply(path: str) -> int:
    """Remove a folder and all that is in it; return how many entries that were.

    Permission bits that stand in the way are changed. A file that cannot be removed ends it: what is left stays.

    Raises:
        OSError: names what could not be removed; EXDEV or EBUSY for a mount inside.
    """
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        device = os.fstat(top).st_dev
        os.fchmod(top, 0o700)
        count, number = 0, 0
        while True:
            names = os.listdir(top)
            if not names:
                break
            for name in names:
                removed, number = _remove_entry(top, name, device, number)
                count += removed
    finally:
        os.close(top)
    os.rmdir(path)
    return count + 1


def _remove_entry(top: int, name: str, device: int, number: int) -> tuple[int, int]:
    """Remove an entry of the top folder; folders inside it move up. Return how many went, and the next free number."""
    if not _is_folder(name, top):
        os.unlink(name, dir_fd=top)
        return 1, number
    folder = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        if os.fstat(folder).st_dev != device:
            raise OSError(18, "something is mounted there", name)
        # A folder without permissions cannot be opened for reading before they are given.
        os.chmod(f"/proc/self/fd/{folder}", 0o700)
        inside = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    count = 0
    try:
        for entry in os.listdir(inside):
            if not _is_folder(entry, inside):
                os.unlink(entry, dir_fd=inside)
                count += 1
                continue
            # Moving a folder changes its "..": it has to be writable.
            os.chmod(entry, 0o700, dir_fd=inside)
            try:
                os.rmdir(entry, dir_fd=inside)
                count += 1
                continue
            except OSError as error:
                if error.errno not in (_ENOTEMPTY, _EEXIST):
                    raise
            while True:
                number += 1
                try:
                    os.rename(entry, f".removed-{number}", src_dir_fd=inside, dst_dir_fd=top)
                    break
                except OSError as error:
                    if error.errno not in (_ENOTEMPTY, _EEXIST, 20):  # that name is in use
                        raise
    finally:
        os.close(inside)
    os.rmdir(name, dir_fd=top)
    return count + 1, number


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
