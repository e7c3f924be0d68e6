# SPDX-License-Identifier: Apache-2.0
"""The environment of a container's program: what the host gives, what the image sets, what the caller insists on.

The image's scripts (`/.singularity.d/env/*.sh`) are shell text. Nearly all of them only assign constants; those are
understood here, without starting a shell (and in images that have none). One line that is more than an assignment hands
the whole job to the container's own `/bin/sh`, with the same result. Later wins: runtime defaults, host variables that
the image does not set, image, SINGULARITYENV_* and --env. Start ring.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.image import scripts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FOLDER = "/.singularity.d/env"
LIBRARIES = "/.singularity.d/libs"
PREFIXES = ("APPTAINERENV_", "SINGULARITYENV_")  # the later one wins
#: What passes even with --cleanenv.
ALWAYS = {"TERM"} | {
    word
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
    for word in (name, name.upper())
}
#: Variables of the host that the runtime decides itself.
NEVER = {"HOME", "PATH", "LD_LIBRARY_PATH", "PWD", "OLDPWD"}
#: Scripts whose whole effect is built in here, by content: they are in every image we or our relatives made.
_BUILT_IN = {
    scripts.ENV_BASE.encode(),
    scripts.ENV_CUSTOM.encode(),
    scripts.ENV_LIBRARIES.encode(),
    scripts.ENV_RUNTIME.encode(),
}
_LIMIT = 1 << 20
_FIRST = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
_REST = _FIRST + "0123456789"

#: What the container's shell runs when the image's scripts are more than assignments. Arguments: number of host
#: variables, those; number of variables insisted on, those; parts of PATH to put first, last, instead; the program.
SHELL_SCRIPT = """\
_source() { . "$1"; }
if [ -d /.singularity.d/env ]; then
    for _file in /.singularity.d/env/*.sh; do
        case $_file in */99-runtimevars.sh) continue ;; esac
        if [ -f "$_file" ]; then _source "$_file"; fi
    done
elif [ -f /environment ]; then
    _source /environment
fi
set +e +u +x
IFS='
'
_left=$1; shift
while [ "$_left" -gt 0 ]; do
    _name=${1%%=*}
    eval "[ -n \\"\\${$_name+x}\\" ] || export \\"\\$1\\""
    shift; _left=$((_left - 1))
done
_left=$1; shift
while [ "$_left" -gt 0 ]; do export "$1"; shift; _left=$((_left - 1)); done
[ -z "$1" ] || PATH=$1:$PATH
[ -z "$2" ] || PATH=$PATH:$2
[ -z "$3" ] || PATH=$3
export PATH
shift 3
case ":${LD_LIBRARY_PATH-}:" in
    *:/.singularity.d/libs:*) ;;
    *) LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs ;;
esac
export LD_LIBRARY_PATH
_fail() { echo "FATAL:   $*" >&2; exit 255; }
case $1 in
    */*)
        [ -e "$1" ] || _fail "$1: no such file in the container"
        [ -x "$1" ] && [ ! -d "$1" ] || _fail "cannot execute $1: Permission denied"
        ;;
    *)
        IFS=:
        _found=
        for _folder in $PATH; do
            if [ -x "${_folder:-.}/$1" ] && [ ! -d "${_folder:-.}/$1" ]; then _found=yes; break; fi
        done
        [ -n "$_found" ] || _fail "\\"$1\\": executable file not found in \\$PATH of the container"
        ;;
esac
unset _file _left _name _found _folder IFS
unset -f _source _fail
exec "$@"
"""


class EnvironmentPlan:
    """The environment before the image's own scripts have had their say.

    Arguments:
        base: what the runtime sets; the image's scripts see it and may change it, except `fixed`.
        host: the caller's variables that pass when the image does not set them.
        forced: what the caller insists on.
        fixed: names in `base` that the image cannot change (HOME, SINGULARITY_*).
        prepend, append, path: parts to put in front of PATH, behind it, or instead of it.
        app: name of the SCIF app, or "".
    """

    __slots__ = ("app", "append", "base", "fixed", "forced", "host", "path", "prepend")

    def __init__(
        self,
        *,
        base: Mapping[str, str],
        host: Mapping[str, str],
        forced: Mapping[str, str],
        fixed: Sequence[str] = (),
        prepend: str = "",
        append: str = "",
        path: str = "",
        app: str = "",
    ) -> None:
        self.base, self.host, self.forced, self.fixed = dict(base), dict(host), dict(forced), tuple(fixed)
        self.prepend, self.append, self.path, self.app = prepend, append, path, app

    def __repr__(self) -> str:
        return f"EnvironmentPlan({len(self.host)} from the host, {len(self.forced)} insisted on)"


class HardLineError(Exception):
    """A line that only a shell can understand."""


def compose(plan: EnvironmentPlan, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return what to execute with what environment; called inside the container, so nothing outside can be read."""
    env = dict(plan.base)
    image: set[str] = set()
    for path in script_files():
        data = _read(path)
        if data is None or data in _BUILT_IN or path.endswith("/99-runtimevars.sh"):
            continue
        if not plan.app and data == scripts.ENV_APPS.encode():
            continue
        try:
            evaluate(data.decode("utf-8", "surrogateescape"), env, image)
        except HardLineError:
            shell = "/bin/sh"
            if posix.access(shell, posix.X_OK):
                return _by_shell(plan, argv, shell)
            messages.warning(f"{path} is left out: it needs a shell, and the image has no /bin/sh")
    result = dict(plan.base)
    for name in image:
        if name in env:
            result[name] = env[name]
        else:
            result.pop(name, None)
    result.update({name: value for name, value in plan.host.items() if name not in image and name not in plan.base})
    for name in plan.fixed:
        if name in plan.base:
            result[name] = plan.base[name]
    result.update(plan.forced)
    path = result.get("PATH", DEFAULT_PATH)
    if plan.prepend:
        path = f"{plan.prepend}:{path}"
    if plan.append:
        path = f"{path}:{plan.append}"
    result["PATH"] = plan.path or path
    libraries = result.get("LD_LIBRARY_PATH", "")
    if LIBRARIES not in libraries.split(":"):
        result["LD_LIBRARY_PATH"] = f"{libraries}:{LIBRARIES}" if libraries else LIBRARIES
    return list(argv), result


def origins(plan: EnvironmentPlan) -> list[tuple[str, str, str]]:
    """Return (name, value, where it comes from) of all variables; called inside the container.

    Values that only a shell can compute are given as "(computed)".
    """
    seen: dict[str, tuple[str, str]] = {name: (value, "runtime") for name, value in plan.base.items()}
    env = dict(plan.base)
    for path in script_files():
        data = _read(path)
        if data is None or data in _BUILT_IN or path.endswith("/99-runtimevars.sh"):
            continue
        mine: set[str] = set()
        try:
            evaluate(data.decode("utf-8", "surrogateescape"), env, mine)
        except HardLineError:
            seen.setdefault("(computed)", ("by the container's shell", f"image, {path}"))
        for name in mine:
            if name not in plan.fixed:
                seen[name] = (env.get(name, ""), f"image, {path}")
    for name, value in plan.host.items():
        seen.setdefault(name, (value, "host"))
    for name, value in plan.forced.items():
        seen[name] = (value, "--env, --env-file or SINGULARITYENV_")
    final = compose(plan, ["true"])[1]
    for name in ("PATH", "LD_LIBRARY_PATH"):
        if name in final and seen.get(name, ("", ""))[0] != final[name]:
            seen[name] = (final[name], seen.get(name, ("", "runtime"))[1] + ", completed by the runtime")
    return [(name, *seen[name]) for name in sorted(seen)]


def _by_shell(plan: EnvironmentPlan, argv: Sequence[str], shell: str) -> tuple[list[str], dict[str, str]]:
    host = [f"{name}={value}" for name, value in plan.host.items() if name not in plan.base]
    forced = [f"{name}={plan.base[name]}" for name in plan.fixed if name in plan.base]
    forced += [f"{name}={value}" for name, value in plan.forced.items()]
    words = [shell, "-c", SHELL_SCRIPT, "singularity", str(len(host)), *host, str(len(forced)), *forced]
    return [*words, plan.prepend, plan.append, plan.path, *argv], dict(plan.base)


def script_files() -> list[str]:
    """Return the image's environment scripts in the order in which they count."""
    try:
        names = sorted(posix.listdir(FOLDER))
    except OSError:
        return ["/environment"]  # images of Singularity 2.0–2.2
    return [f"{FOLDER}/{name}" for name in names if name.endswith(".sh")]


def _read(path: str) -> bytes | None:
    """Return the content of a regular file; None when there is none. Larger ones than 1 MiB are cut."""
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        if posix.fstat(descriptor).st_mode & 0o170000 != 0o100000:
            return None
        data = b""
        while len(data) < _LIMIT and (part := posix.read(descriptor, _LIMIT)):
            data += part
        return data
    except OSError as error:
        messages.warning(f"{path}: {error.strerror}")
        return None
    finally:
        posix.close(descriptor)


def evaluate(text: str, env: dict[str, str], assigned: set[str], *, export_all: bool = False) -> None:
    """Do what a shell would do that sources `text`, as long as it consists of assignments and exports.

    Arguments:
        env: exported variables; changed in place.
        assigned: gets the names that the text sets and exports.
        export_all: every variable that is set counts as exported (set -a).

    Raises:
        HardLineError: the text is more than that. `env` may have been changed by then.
    """
    local: dict[str, str] = {}  # set, and not exported yet
    lines = text.split("\n")
    for line in lines:
        at = _skip(line, 0)
        if at == len(line) or line[at] == "#":
            continue
        if line.startswith('[ -n "${', at):
            # The guard of OCI variables: [ -n "${NAME:-}" ] || NAME=…
            end = line.find(':-}" ] || ', at)
            name = line[at + 8 : end]
            if end < 0 or not _is_name(name):
                raise HardLineError
            if env.get(name, local.get(name)):
                continue
            at = end + len(':-}" ] || ')
        export = line.startswith("export ", at)
        if export:
            at = _skip(line, at + 7)
        while at < len(line) and line[at] != "#":
            start = at
            while at < len(line) and line[at] in _REST:
                at += 1
            name = line[start:at]
            if not _is_name(name):
                raise HardLineError
            if line[at : at + 1] == "=":
                value, at = _word(line, at + 1, env, local, export)
                if export or export_all or name in env:
                    env[name] = value
                    assigned.add(name)
                    local.pop(name, None)
                else:
                    local[name] = value
            elif export and (at == len(line) or line[at] in " \t\r;"):
                if name in local:
                    env[name] = local.pop(name)
                    assigned.add(name)
            else:
                raise HardLineError
            at = _skip(line, at)
            if line[at : at + 1] == ";" and line[at : at + 2] != ";;":
                at = _skip(line, at + 1)
                export = line.startswith("export ", at)
                if export:
                    at = _skip(line, at + 7)


def _skip(line: str, at: int) -> int:
    while at < len(line) and line[at] in " \t\r":
        at += 1
    return at


def _is_name(name: str) -> bool:
    return bool(name) and name[0] in _FIRST


def _word(line: str, at: int, env: dict[str, str], local: dict[str, str], split: bool) -> tuple[str, int]:
    """Return the value of the word at `at`, and where it ends.

    Arguments:
        split: the shell would split expansions here (an argument of `export` in POSIX shells).
    """
    out = ""
    while at < len(line):
        letter = line[at]
        if letter in " \t\r;":
            break
        if letter == "'":
            end = line.find("'", at + 1)
            if end < 0:
                raise HardLineError
            out += line[at + 1 : end]
            at = end + 1
        elif letter == '"':
            part, at = _quoted(line, at + 1, '"', env, local)
            out += part
        elif letter == "$":
            part, at = _expand(line, at, env, local)
            if split and any(one in part for one in " \t\n*?["):
                raise HardLineError
            out += part
        elif letter == "\\":
            if at + 1 == len(line):
                raise HardLineError
            out += line[at + 1]
            at += 2
        elif letter in "&|<>()`*?[{}~":
            raise HardLineError
        else:
            out += letter
            at += 1
    return out, at


def _quoted(line: str, at: int, end: str, env: dict[str, str], local: dict[str, str]) -> tuple[str, int]:
    """Return the text up to the closing `end`, with the rules of double quotes."""
    out = ""
    while at < len(line):
        letter = line[at]
        if letter == end:
            return out, at + 1
        if letter == "\\" and line[at + 1 : at + 2] in ("$", "`", '"', "\\"):
            out += line[at + 1]
            at += 2
        elif letter == "$":
            part, at = _expand(line, at, env, local)
            out += part
        elif letter == "`":
            raise HardLineError
        elif letter == '"':  # a quoted part of the default inside ${NAME:-…}
            part, at = _quoted(line, at + 1, '"', env, local)
            out += part
        else:
            out += letter
            at += 1
    raise HardLineError


def _expand(line: str, at: int, env: dict[str, str], local: dict[str, str]) -> tuple[str, int]:
    """Return the value of the `$…` at `at`, and where it ends."""
    at += 1
    braces = line[at : at + 1] == "{"
    at += braces
    start = at
    while at < len(line) and line[at] in _REST:
        at += 1
    name = line[start:at]
    if not _is_name(name):
        raise HardLineError
    value = local.get(name, env.get(name))
    if not braces:
        return value or "", at
    if line[at : at + 1] == "}":
        return value or "", at + 1
    sign = line[at : at + 2] if line[at : at + 1] == ":" else line[at : at + 1]
    if sign not in (":-", "-", ":+", "+"):
        raise HardLineError
    word, at = _quoted(line, at + len(sign), "}", env, local)
    there = bool(value) if sign[0] == ":" else value is not None
    if sign[-1] == "-":
        return (value or "") if there else word, at
    return word if there else "", at


def find_program(name: str, path: str) -> str | None:
    """Return the path of a program as execvp would find it, or None; called inside the container."""
    if "/" in name:
        try:
            posix.stat(name)
        except OSError as error:
            return None if error.errno in (2, 20) else name
        return name
    blocked = None
    for folder in path.split(":"):
        candidate = f"{folder or '.'}/{name}"
        try:
            mode = posix.stat(candidate).st_mode
        except OSError:
            continue
        if mode & 0o170000 != 0o040000:
            if posix.access(candidate, posix.X_OK):
                return candidate
            blocked = blocked or candidate
    return blocked


def insisted(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that SINGULARITYENV_X and APPTAINERENV_X ask for, without the prefix."""
    found: dict[str, str] = {}
    for prefix in PREFIXES:
        for name, value in environ.items():
            if name.startswith(prefix) and len(name) > len(prefix):
                found[name[len(prefix) :]] = value
    return found


def from_host(environ: Mapping[str, str], clean: bool) -> dict[str, str]:
    """Return the caller's variables that pass into the container when the image does not set them."""
    if clean:
        return {name: value for name, value in environ.items() if name in ALWAYS}
    return {
        name: value
        for name, value in environ.items()
        if name not in NEVER
        and not name.startswith(("SINGULARITY_", "APPTAINER_", "SINGULARITYENV_", "APPTAINERENV_"))
        and scripts.is_name(name)
    }
