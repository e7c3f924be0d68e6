# SPDX-License-Identifier: Apache-2.0
"""Other people's packages, made importable when a command needs them.

The launcher starts the interpreter without `site`, which saves 3 ms in a clean environment and tens in a full one, and
leaves the folders of third-party packages out of `sys.path`. Whoever imports such a package calls `enable()` first.
Start ring.
"""

from __future__ import annotations

import sys

from pysingularity.errors import HostError

_done = False
#: Packages whose absence is no fault of ours where somebody installed without them: import name -> what pip calls it.
_OTHERS = {
    "urllib3": "urllib3",
    "deflate": "deflate",
    "isal": "isal",
    "backports": "backports.zstd",
    "cryptography": "cryptography",
}


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


def lacking(error: BaseException) -> HostError | None:
    """Return what to tell a person about an import that failed, None when it is no package of other people."""
    package = _OTHERS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
    if package is None:
        return None
    needs = "encrypted images need" if package == "cryptography" else "fetching needs"
    return HostError(
        "package-missing",
        f"the Python package {package} is not installed; {needs} it, running and converting images does not",
        hint=f"{sys.executable} -m pip install {package}",
    )
