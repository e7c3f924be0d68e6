# SPDX-License-Identifier: Apache-2.0
"""The C library and raw system calls, the one place where errno becomes an exception.

`function(name)` gives a C function, `syscall` a raw kernel call. Python's public `ctypes` takes 3–4 ms to import; its C
half alone takes 0.5, so that is what the start of a container uses, with the public module as fallback when a Python
changes the private one. Integers travel as C `long`: a bare Python int would be passed as a C `int` and lose the upper
half of flags and lengths. Start ring.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Argument = int | bytes | bytearray | None

try:
    import _ctypes

    class long(_ctypes._SimpleCData):  # type: ignore[type-arg]
        """A C long."""

        _type_ = "l"

    class _Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
        _restype_ = long

    _library = _ctypes.dlopen(None, 2)  # type: ignore[arg-type]
    get_errno: Callable[[], int] = _ctypes.get_errno

    def _symbol(name: str) -> Any:
        return _Function(_ctypes.dlsym(_library, name))

    class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "c"

    def pointer(buffer: bytearray) -> Any:
        """Return the address of a buffer that a C function may fill."""
        return _ctypes.byref(_Byte.from_buffer(buffer))

    def reference(number: Any) -> Any:
        """Return the address of a `long`."""
        return _ctypes.byref(number)

    def load(library: str, name: str) -> Any:
        """Return function `name` of another shared library; it gives an int. The lock is released during calls.

        Raises:
            OSError: there is no such library or function.
        """
        return _Function(_ctypes.dlsym(_ctypes.dlopen(library, 2), name))

except (ImportError, AttributeError, TypeError, OSError):  # a Python whose private half looks different
    import ctypes

    _public = ctypes.CDLL(None, use_errno=True)
    long = ctypes.c_long  # type: ignore[misc,assignment]
    get_errno = ctypes.get_errno

    def _symbol(name: str) -> Any:
        found = getattr(_public, name)
        found.restype = ctypes.c_long
        return found

    def pointer(buffer: bytearray) -> Any:
        """Return the address of a buffer that a C function may fill."""
        return ctypes.byref(ctypes.c_char.from_buffer(buffer))

    def reference(number: Any) -> Any:
        """Return the address of a `long`."""
        return ctypes.byref(number)

    def load(library: str, name: str) -> Any:
        """Return function `name` of another shared library; it gives an int."""
        try:
            found = getattr(ctypes.CDLL(library), name)
        except AttributeError:
            raise OSError(38, f"{library} has no {name}") from None
        found.restype = ctypes.c_long
        return found


_known: dict[str, Any] = {}

#: The processor, as the kernel calls it.
MACHINE = posix.uname().machine
#: Numbers that differ between x86-64 and the generic table (arm64, riscv64 and every later port).
_X86 = MACHINE in ("x86_64", "amd64") and sys.maxsize > 1 << 32
NR_PIVOT_ROOT = 155 if _X86 else 41
NR_SECCOMP = 317 if _X86 else 277
NR_KEYCTL = 250 if _X86 else 219
#: Numbers that all architectures share (they came after the tables were unified).
NR_OPEN_TREE, NR_MOVE_MOUNT = 428, 429
NR_PIDFD_OPEN, NR_CLOSE_RANGE, NR_OPENAT2, NR_PIDFD_GETFD = 434, 436, 437, 438
NR_MOUNT_SETATTR = 442


def function(name: str) -> Any:
    """Return the C function `name`; its integer arguments have to be wrapped in `long`.

    Raises:
        OSError: the C library has no such function.
    """
    found = _known.get(name)
    if found is None:
        try:
            found = _known[name] = _symbol(name)
        except AttributeError:
            raise OSError(38, f"the C library has no {name}") from None
    return found


def encode(path: str | bytes | None) -> bytes | None:
    """Return a path or word as the kernel wants it."""
    return path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path


def check(result: Any, call: str, path: str | bytes | None = None) -> int:
    """Return the result of a call as int.

    Raises:
        OSError: it is negative; carries errno, the call's name in its text, and the path.
    """
    value: int = result if isinstance(result, int) else result.value
    if value < 0:
        number = get_errno()
        name = path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path
        if name:
            raise OSError(number, f"{posix.strerror(number)} ({call})", name)
        raise OSError(number, f"{posix.strerror(number)} ({call})")
    return value


def call(name: str, *arguments: Argument, path: str | bytes | None = None) -> int:
    """Call a C function with integers as longs, bytes as pointers and None as NULL; `path` is for the error only.

    Raises:
        OSError: the result is negative.
    """
    return check(
        function(name)(*[long(word) if isinstance(word, int) else word for word in arguments]),
        name,
        path,
    )


def syscall(number: int, *arguments: Argument, name: str = "", path: str | bytes | None = None) -> int:
    """Make a system call by number.

    Raises:
        OSError: the result is negative.
    """
    wrapped = [long(word) if isinstance(word, int) else word for word in arguments]
    return check(function("syscall")(long(number), *wrapped), name or f"system call {number}", path)
