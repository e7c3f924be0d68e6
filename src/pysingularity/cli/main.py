# SPDX-License-Identifier: Apache-2.0
"""The `singularity` command: read the global options, look the command up, import that one file, run it.

The only place that turns errors into messages and exit statuses. Start ring: light imports only.
"""

from __future__ import annotations

import posix
import sys

from pysingularity import messages, thirdparty
from pysingularity.cli.commands import COMMANDS
from pysingularity.cli.options import TEXT, Option
from pysingularity.cli.scan import scan
from pysingularity.errors import SingularityError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

#: Commands that start containers: they do without other people's packages, and start fast.
START_RING = ("exec", "run", "shell", "test", "version")

GLOBAL = (
    Option("debug", "Show every step, and tracebacks of errors", short="d", env=("DEBUG",)),
    Option("verbose", "Say more", short="v"),
    Option("quiet", "Say nothing but warnings and errors", short="q"),
    Option("silent", "Say nothing but errors", short="s"),
    Option("nocolor", "Print without colours"),
    Option("config", "Read settings from FILE", short="c", kind=TEXT, metavar="FILE", env=("CONFIG_FILE",)),
    Option("version", "Show the version", hidden=True),
    Option("help", "Show help", short="h", hidden=True),
)


def main(words: list[str] | None = None) -> int:
    """Run the command line `words` (default: the process's own) and return the exit status."""
    environ = dict(_environment())
    try:
        return _main(list(sys.argv[1:]) if words is None else words, environ)
    except SingularityError as error:
        return report(error)
    except KeyboardInterrupt:
        messages.fatal("interrupted; give the same command to start again")
        return 255
    except BrokenPipeError:
        return die_by_signal(13)
    except MemoryError:
        messages.fatal("out of memory")
        return 255
    except OSError as error:
        if messages.level >= messages.DEBUG:
            raise
        name = error.filename if error.filename is not None else ""
        if isinstance(name, bytes):
            name = name.decode("utf-8", "surrogateescape")
        messages.fatal(f"{name}: {error.strerror}" if name else str(error))
        return 255
    except Exception as error:
        if messages.level >= messages.DEBUG:
            raise
        lack = thirdparty.lacking(error)
        if lack is not None:
            return report(lack)
        # Our fault; the place helps whoever reads the report, the whole trace is one option away.
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
        messages.fatal(
            f"internal error: {type(error).__name__}: {error}{place}\n"
            "    hint: please report it with the output of the same command with --debug"
        )
        return 255


def _main(words: list[str], environ: dict[str, str]) -> int:
    start = globals_end(words)
    settings = scan(words[:start], GLOBAL, environ)
    messages.configure(settings, environ)
    words = words[start:]
    if settings.version:
        words = ["version", "--long"]
    if settings.help or not words:
        words = ["help", *words]
    if settings.config:
        environ["SINGULARITY_CONFIG_FILE"] = str(settings.config)
    return dispatch(words, COMMANDS, environ)


def globals_end(words: list[str]) -> int:
    """Return the index of the first word that is neither a global option nor the value of one."""
    at = 0
    while at < len(words) and words[at][:1] == "-" and words[at] != "-":
        if words[at] in ("-c", "--config"):
            at += 1
        at += 1
    return min(at, len(words))


def dispatch(
    words: list[str], table: dict[str, tuple[str, str, str]], environ: dict[str, str], parent: str = ""
) -> int:
    """Run the command that `words` name in `table` (sub-commands are tables inside tables)."""
    name = words[0]
    entry = table.get(name)
    full = f"{parent} {name}".strip()
    if entry is None:
        from pysingularity.cli.suggest import nearest  # difflib: only when something is wrong

        guess = nearest(name, list(table))
        hint = f"did you mean: singularity {(parent + ' ' + guess).strip()}" if guess else "see: singularity help"
        raise UsageError("unknown-command", f'unknown command "{full}" for "singularity"', hint=hint)
    module = load(entry[0])
    subcommands = getattr(module, "SUBCOMMANDS", None)
    rest = words[1:]
    if subcommands is not None:
        if not rest or rest[0] in ("-h", "--help"):
            return dispatch(["help", *full.split()], COMMANDS, environ)
        return dispatch(rest, subcommands, environ, full)
    payload = getattr(module, "PAYLOAD", False)
    options = (*module.OPTIONS, *(option for option in GLOBAL if _free(option, module.OPTIONS)))
    try:
        arguments = scan(rest, options, environ, payload=payload, command=full)
    except UsageError:
        if "-h" in rest or "--help" in rest:
            return dispatch(["help", *full.split()], COMMANDS, environ)
        raise
    if arguments.help:
        return dispatch(["help", *full.split()], COMMANDS, environ)
    messages.configure(arguments, environ)
    least, most = getattr(module, "COUNT", (0, None))
    if len(arguments.positional) < least or (most is not None and len(arguments.positional) > most):
        raise UsageError(
            "argument-count",
            f"singularity {full}: {'too few' if len(arguments.positional) < least else 'too many'} arguments",
            hint=f"usage: singularity {full} {module.USAGE}",
        )
    return int(module.run(arguments, environ))


def _free(option: Option, taken: tuple[Option, ...]) -> bool:
    """Return whether a global option collides with none of the command's own (exec has its own -c and -s)."""
    return not any(option.long == other.long or (option.short and option.short == other.short) for other in taken)


def load(name: str) -> ModuleType:
    """Import the module of one command."""
    if name not in START_RING:
        interruptible()
        thirdparty.enable()
    full = "pysingularity.cli." + name
    __import__(full)
    return sys.modules[full]


def interruptible() -> None:
    """Take back what `start` does for the sake of starts, for work that takes longer and has to be tidied up.

    Ctrl-C becomes KeyboardInterrupt again, and garbage is looked for.
    """
    import _signal
    import gc

    gc.enable()
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def report(error: SingularityError) -> int:
    """Print an error and return its exit status."""
    if messages.level >= messages.DEBUG:
        import traceback  # only when asked for

        traceback.print_exc()
    say = {255: messages.fatal, 0: messages.info}.get(error.exit_code, messages.error)
    say(str(error))
    return error.exit_code


def die_by_signal(number: int) -> int:
    """End this process by the signal that ended the work, so that the caller sees a true death by signal."""
    import _signal

    _signal.signal(number, _signal.SIG_DFL)
    posix.kill(posix.getpid(), number)
    return 128 + number


def _environment() -> dict[str, str]:
    found = {
        name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, value in posix.environ.items()
    }
    if found.get("LC_CTYPE", "").lower().replace("-", "") in ("c.utf8", "utf8"):
        # The interpreter sets this one itself when it finds the locale C (PEP 538); the caller may not have.
        with open("/proc/self/environ", "rb") as file:
            if b"\0LC_CTYPE=" not in b"\0" + file.read():
                del found["LC_CTYPE"]
    return found
