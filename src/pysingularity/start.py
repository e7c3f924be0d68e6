# SPDX-License-Identifier: Apache-2.0
"""What the launcher runs; also by hand: `python3 -I -S start.py ARGUMENTS`.

Without `site` and isolated there is no path to this package, and giving one would make every import list a large
site-packages. So the package is made known by hand, with its own folder as the only place to look. The modules that
every start needs come out of one file (see `ring`).
"""

from __future__ import annotations

import _signal
import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

# Starting a container leaves nothing to clean up, so Ctrl-C simply ends this process, without a traceback. Commands
# that have something to tidy take the interpreter's way back (cli.main). A caller that ignores the signal still does.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

if "pysingularity" not in sys.modules:
    package = sys.modules["pysingularity"] = type(sys)("pysingularity")
    package.__path__ = [__file__.rpartition("/")[0] or "."]
    package.__file__ = package.__path__[0] + "/__init__.py"
folder = sys.modules["pysingularity"].__path__[0]
ring_file = f"{folder}/__pycache__/ring.{sys.implementation.cache_tag}"


class Ring:
    """An importer of the modules in the ring's file: name → (is it a package, time and size of its source, code)."""

    def __init__(self, codes: dict[str, tuple[bool, int, int, bytes]]) -> None:
        self.codes = codes

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return the spec of a module whose source is still what the code was made of."""
        entry = self.codes.get(name)
        if entry is None:
            return None
        is_package, seconds, size, _ = entry
        place = f"{folder}/{name[14:].replace('.', '/')}"
        source = place + ("/__init__.py" if is_package else ".py")
        if seconds >= 0:
            try:
                found = posix.stat(source)
            except OSError:
                return None
            if (int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF) != (seconds, size):
                discard()
                return None
        spec = ModuleSpec(name, self, origin=source)  # type: ignore[arg-type]  # importlib.abc would cost an import
        if is_package:
            spec.submodule_search_locations = [place]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the interpreter."""

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's code."""
        exec(marshal.loads(self.codes[module.__name__][3]), module.__dict__)  # noqa: S102


def discard() -> None:
    """Remove a file that is out of date: the next start writes it anew."""
    try:
        posix.unlink(ring_file)
    except OSError:
        pass


try:
    with open(ring_file, "rb") as file:
        magic, codes = marshal.loads(file.read())
except (OSError, ValueError, EOFError, TypeError):
    magic, codes = b"", {}
if magic == MAGIC_NUMBER:
    sys.meta_path.insert(0, Ring(codes))
elif not sys.dont_write_bytecode and posix.access(f"{folder}/__pycache__", posix.W_OK):
    from pysingularity.ring import write

    write(folder, ring_file)

from pysingularity.cli.main import main  # noqa: E402

sys.exit(main())
