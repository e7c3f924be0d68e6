# SPDX-License-Identifier: Apache-2.0
"""Other people's packages, made importable when a command needs them.

The launcher starts the interpreter without `site`, which saves 3 ms in a clean environment and tens in a full one, and
leaves the folders of third-party packages out of `sys.path`. Whoever imports such a package calls `enable()` first.
Start ring.
"""

from __future__ import annotations

import sys

_done = False


def neighbours() -> None:
    """Make the packages importable that were installed beside this one; cheap enough for `exec` (decompressors)."""
    if sys.flags.no_site:
        folder = __file__.rpartition("/")[0].rpartition("/")[0]
        if folder and folder not in sys.path:
            sys.path.append(folder)


def enable() -> None:
    """Put the folders of installed packages on `sys.path`, as the interpreter does when started in the plain way."""
    global _done
    if _done:
        return
    _done = True
    if not sys.flags.no_site:
        return
    import site  # 2 ms: not for `exec`

    # The folder this package lies in goes first: its neighbours are the versions it was installed with.
    folder = __file__.rpartition("/")[0].rpartition("/")[0]
    known = set(sys.path)
    site.main()
    if folder and folder not in known:
        sys.path[:] = [path for path in sys.path if path != folder]
        at = next((number for number, path in enumerate(sys.path) if path.endswith("-packages")), len(sys.path))
        sys.path.insert(at, folder)
