# SPDX-License-Identifier: Apache-2.0
"""What the instructions of a stage say of an image, without doing anything: environment, user, command, labels.

`State` is filled from a base image's OCI configuration, changed by one instruction after another, and becomes the
configuration of the result. Source: OCI image specification, "Image Configuration"; Docker's additions to it (Shell,
OnBuild, Healthcheck) are kept as Docker writes them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from pysingularity.recipe.dockerfile import Dockerfile, Instruction
from pysingularity.recipe.dockerwords import Lexer, WordError, pairs, raw_words

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHELL = ["/bin/sh", "-c"]
#: Build arguments that need no ARG, and that no step depends on.
PROXIES = tuple(
    name for one in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY") for name in (one, one.lower())
)
#: Instructions that change files.
ACTING = ("RUN", "COPY", "ADD", "WORKDIR")
#: Instructions that later steps of the same stage depend on.
FELT = ("ENV", "ARG", "USER", "SHELL")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us|µs|ns)")
_NANOSECONDS = {"h": 3600e9, "m": 60e9, "s": 1e9, "ms": 1e6, "us": 1e3, "µs": 1e3, "ns": 1}


class State:
    """An image in the making.

    Arguments:
        document: the OCI configuration that a stage starts from; {} for none, None for a copy.

    Attributes:
        env: variables that the image sets.
        args: build arguments of the stage that have a value.
        config: the rest of the configuration, as in its `config` object.
        author: behind MAINTAINER.
    """

    __slots__ = ("_commanded", "args", "author", "config", "env")

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        inner = (document or {}).get("config")
        self.config: dict[str, Any] = dict(inner) if isinstance(inner, dict) else {}
        self.env: dict[str, str] = {}
        for text in self.config.pop("Env", None) or []:
            name, _, value = str(text).partition("=")
            self.env[name] = value
        if document is not None:  # every image of a builder has one, and ENV PATH=/x:$PATH counts on it
            self.env.setdefault("PATH", PATH)
        self.args: dict[str, str] = {}
        self.author = str((document or {}).get("author") or "")
        self._commanded = False

    def copy(self) -> State:
        """Return a state that changes on its own; arguments of a stage do not pass on."""
        other = State()
        other.config = {key: dict(value) if isinstance(value, dict) else value for key, value in self.config.items()}
        other.env, other.author = dict(self.env), self.author
        return other

    def snapshot(self) -> State:
        """As `copy`, with the arguments: what one step sees."""
        other = self.copy()
        other.args, other._commanded = dict(self.args), self._commanded
        return other

    @property
    def user(self) -> str:
        """Who runs programs: NAME or NUMBER, with or without :GROUP; "" for root."""
        return str(self.config.get("User") or "")

    @property
    def workdir(self) -> str:
        """The folder that programs start in."""
        return str(self.config.get("WorkingDir") or "/")

    @property
    def shell(self) -> list[str]:
        """What the shell form of instructions is given to."""
        return [str(word) for word in self.config.get("Shell") or SHELL]

    @property
    def triggers(self) -> list[str]:
        """Instructions for whoever builds on the image."""
        return [str(text) for text in self.config.get("OnBuild") or []]

    def variables(self) -> dict[str, str]:
        """Return what may be put into an instruction: ENV wins over ARG."""
        return {**self.args, **self.env}

    def environment(self) -> dict[str, str]:
        """Return what programs of RUN see."""
        return self.variables()

    def place(self, path: str) -> str:
        """Return a path of the image, from the working folder."""
        return posixpath.normpath(posixpath.join("/", self.workdir, path))

    def document(self, base: Mapping[str, Any], *, arch: str, created: str, history: list[str]) -> dict[str, Any]:
        """Return the OCI configuration of the image.

        Arguments:
            base: configuration of the base image.
            arch: in OCI's words.
            created: RFC 3339 time.
            history: instructions of this build.
        """
        config = {key: value for key, value in self.config.items() if value not in (None, "", [], {})}
        config["Env"] = [f"{name}={value}" for name, value in self.env.items()]
        found: dict[str, Any] = {"created": created, "architecture": arch, "os": "linux", "config": config}
        if self.author:
            found["author"] = self.author
        before = base.get("history")
        lines = [{"created": created, "created_by": text, "empty_layer": True} for text in history]
        found["history"] = [*(before if isinstance(before, list) else []), *lines]
        # The result is one file system, not the base's layers.
        found["rootfs"] = {"type": "layers", "diff_ids": []}
        return found


class Reader:
    """Applies instructions to a state.

    Arguments:
        dockerfile: for its escape sign and name.
        given: values of --build-arg.
        outside: values of ARG instructions above the first FROM, and of the platform.

    Attributes:
        used: names of build arguments that an ARG declares.
        missing: variables that had no value when they were asked for.
    """

    def __init__(self, dockerfile: Dockerfile, given: Mapping[str, str], outside: Mapping[str, str]) -> None:
        self.file, self.escape = dockerfile.file, dockerfile.escape
        self._given, self._outside = given, outside
        self.used: set[str] = set()
        self.missing: set[str] = set()

    def word(self, text: str, state: State, one: Instruction) -> str:
        """Return a text with its variables put in.

        Raises:
            RecipeError: it cannot be read.
        """
        return self._read(text, state, one)[0]

    def words(self, text: str, state: State, one: Instruction) -> list[str]:
        """Return the words of a text with their variables put in; raises as `word`."""
        return self._read(text, state, one)[1]

    def _read(self, text: str, state: State, one: Instruction) -> tuple[str, list[str]]:
        lexer = Lexer(state.variables(), self.escape)
        try:
            return lexer.word(text), lexer.words(text)
        except WordError as error:
            raise one.wrong(str(error), self.file, word=text) from None
        finally:
            self.missing |= lexer.missing

    def apply(self, one: Instruction, state: State) -> None:
        """Change a state as an instruction says; what acts on files is the caller's.

        Raises:
            RecipeError: it says nothing that can be understood.
        """
        method = getattr(self, f"_{one.name.lower()}", None)
        if method is not None:
            method(one, state)

    def _pairs(self, one: Instruction, state: State) -> dict[str, str]:
        try:
            raw = pairs(one.text, self.escape)
        except WordError as error:
            raise one.wrong(str(error), self.file, word=one.text) from None
        # All values of one instruction see what was before it.
        return {self.word(name, state, one): self.word(value, state, one) for name, value in raw}

    def _env(self, one: Instruction, state: State) -> None:
        state.env.update(self._pairs(one, state))

    def _label(self, one: Instruction, state: State) -> None:
        state.config["Labels"] = {**(state.config.get("Labels") or {}), **self._pairs(one, state)}

    def _maintainer(self, one: Instruction, state: State) -> None:
        state.author = one.text

    def _arg(self, one: Instruction, state: State) -> None:
        for raw in raw_words(one.text, self.escape):
            name, equals, value = raw.partition("=")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
                raise one.wrong(f"{name}: no name of a build argument", self.file, word=raw)
            self.used.add(name)
            if name in self._given:
                state.args[name] = self._given[name]
            elif equals:
                state.args[name] = self.word(value, state, one)
            elif name in self._outside:
                state.args[name] = self._outside[name]

    def _user(self, one: Instruction, state: State) -> None:
        state.config["User"] = self.word(one.text, state, one)

    def _workdir(self, one: Instruction, state: State) -> None:
        state.config["WorkingDir"] = state.place(self.word(one.text, state, one))

    def _shell(self, one: Instruction, state: State) -> None:
        state.config["Shell"] = one.listed

    def _command(self, one: Instruction, state: State) -> list[str]:
        words = one.listed
        return words if words is not None else [*state.shell, one.text]

    def _cmd(self, one: Instruction, state: State) -> None:
        state.config["Cmd"] = self._command(one, state)
        state._commanded = True

    def _entrypoint(self, one: Instruction, state: State) -> None:
        state.config["Entrypoint"] = self._command(one, state)
        if not state._commanded:  # the base's words were for the base's program
            state.config.pop("Cmd", None)

    def _expose(self, one: Instruction, state: State) -> None:
        ports = dict(state.config.get("ExposedPorts") or {})
        for word in self.words(one.text, state, one):
            number, _, protocol = word.partition("/")
            first, dash, last = number.partition("-")
            if not (first.isdigit() and (not dash or last.isdigit())) or protocol.lower() not in (
                "",
                "tcp",
                "udp",
                "sctp",
            ):
                raise one.wrong(f"{word}: no port; write 80, 80/udp or 8000-8010", self.file, word=word)
            end = int(last or first)
            for port in range(int(first), min(end, 65535) + 1):
                ports[f"{port}/{protocol.lower() or 'tcp'}"] = {}
        state.config["ExposedPorts"] = ports

    def _volume(self, one: Instruction, state: State) -> None:
        words = one.listed
        places = self.words(one.text, state, one) if words is None else [self.word(word, state, one) for word in words]
        state.config["Volumes"] = {**(state.config.get("Volumes") or {}), **{place: {} for place in places}}

    def _stopsignal(self, one: Instruction, state: State) -> None:
        state.config["StopSignal"] = self.word(one.text, state, one)

    def _onbuild(self, one: Instruction, state: State) -> None:
        text = one.text + "".join(f"\n{doc.content}{doc.name}" for doc in one.heredocs)
        state.config["OnBuild"] = [*state.triggers, text]

    def _healthcheck(self, one: Instruction, state: State) -> None:
        kind, _, rest = one.text.partition(" ")
        if kind.upper() == "NONE":
            state.config["Healthcheck"] = {"Test": ["NONE"]}
            return
        if kind.upper() != "CMD" or not rest.strip():
            raise one.wrong("HEALTHCHECK takes CMD COMMAND or NONE", self.file, word=kind)
        command = Instruction("CMD", rest.strip())
        listed = command.listed
        check: dict[str, Any] = {"Test": ["CMD", *listed] if listed is not None else ["CMD-SHELL", rest.strip()]}
        for flag, key in (
            ("interval", "Interval"),
            ("timeout", "Timeout"),
            ("start-period", "StartPeriod"),
            ("start-interval", "StartInterval"),
        ):
            if one.flag(flag):
                check[key] = self._duration(one.flag(flag), one)
        if one.flag("retries"):
            if not one.flag("retries").isdigit():
                raise one.wrong("--retries is a number", self.file, word="--retries")
            check["Retries"] = int(one.flag("retries"))
        state.config["Healthcheck"] = check

    def _duration(self, text: str, one: Instruction) -> int:
        parts = _DURATION.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise one.wrong(f"{text}: no length of time; write for example 30s or 1m30s", self.file, word=text)
        return round(sum(float(number) * _NANOSECONDS[unit] for number, unit in parts))


def platform_values(arch: str) -> dict[str, str]:
    """Return the build arguments that tell a Dockerfile its platform; builds run where they are built for."""
    name, _, variant = arch.partition("/")
    found = {}
    for side in ("TARGET", "BUILD"):
        found[f"{side}PLATFORM"] = f"linux/{arch}"
        found |= {f"{side}OS": "linux", f"{side}ARCH": name, f"{side}VARIANT": variant}
    return found
