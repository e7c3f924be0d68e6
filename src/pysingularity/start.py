# SPDX-License-Identifier: Apache-2.0
"""What the launcher runs; also by hand: `python3 -I -S start.py ARGUMENTS`.

Without `site` and isolated there is no path to this package, and giving one would make every import list a large
site-packages. So the package is made known by hand, with its own folder as the only place to look. The modules that
starts need come out of one file (see `ring`), without the interpreter's way of looking for each.
"""

import _signal
import gc
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

# Nothing that a start makes becomes garbage before execve; looking for it takes half a millisecond. Commands with more
# to do, and servers, switch it on again.
gc.disable()

if "pysingularity" not in sys.modules:
    package = sys.modules["pysingularity"] = type(sys)("pysingularity")
    package.__path__ = [__file__.rpartition("/")[0] or "."]
    package.__file__ = package.__path__[0] + "/__init__.py"
folder = sys.modules["pysingularity"].__path__[0]
ring_file = f"{folder}/__pycache__/ring.{sys.implementation.cache_tag}"


def load(part: int) -> "dict[str, int] | None":
    """Run the modules of one part of the ring's file.

    Returns:
        What the other parts hold (full name → number of the part; the first part tells it), or None when there is no
        such file, or a source has changed since it was made.
    """
    try:
        file = posix.open(ring_file, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        head = posix.read(file, 16)
        lengths = [int.from_bytes(head[at : at + 4], "little") for at in (4, 8, 12)]
        if head[:4] != MAGIC_NUMBER:
            return None
        modules, others = marshal.loads(posix.pread(file, lengths[part], 16 + sum(lengths[:part])))
        for _, source, seconds, size, _ in modules:
            status = posix.stat(f"{folder}/{source}")
            if status.st_size != size or int(status.st_mtime) != seconds:
                posix.unlink(ring_file)
                return None
    except (OSError, ValueError, EOFError, TypeError):
        return None
    finally:
        posix.close(file)
    known = sys.modules
    for name, source, _, _, code in modules:
        if name in known:
            continue
        module = known[name] = type(sys)(name)
        parent, _, last = name.rpartition(".")
        module.__file__ = f"{folder}/{source}"
        module.__package__ = parent
        if source.endswith("/__init__.py"):
            module.__package__ = name
            module.__path__ = [module.__file__[:-12]]
        try:
            exec(code, module.__dict__)  # noqa: S102
        except BaseException:
            del known[name]
            raise
        setattr(known[parent], last, module)
    return dict(others)


class Later:
    """An importer of the other parts: the first module of one that is asked for brings them all.

    Arguments:
        parts: full name → number of the part.
    """

    def __init__(self, parts: dict[str, int]) -> None:
        self.parts = parts

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":  # noqa: ARG002
        """Return the spec of a module that has been run by now."""
        part = self.parts.get(name)
        if part is None or load(part) is None:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]  # importlib.abc would cost an import

    def create_module(self, spec: ModuleSpec) -> "ModuleType":
        """Return the module."""
        return sys.modules[spec.name]

    def exec_module(self, module: "ModuleType") -> None:
        """Do nothing: it has been run."""


later = load(0)
if later is not None:
    sys.meta_path.insert(0, Later(later))
elif not sys.dont_write_bytecode and posix.access(f"{folder}/__pycache__", posix.W_OK):
    from pysingularity.ring import write

    write(folder, ring_file)

from pysingularity.cli.main import main  # noqa: E402

sys.exit(main())
