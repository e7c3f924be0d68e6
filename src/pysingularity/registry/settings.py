# SPDX-License-Identifier: Apache-2.0
"""What the caller wants of a fetch: options of the command line and variables of the environment, as one value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from pysingularity.errors import UsageError
from pysingularity.image.output import epoch
from pysingularity.registry.auth import Credentials
from pysingularity.sif.layout import host_arch

#: When a tag is asked for: every time, when it is not remembered (or too long ago), never.
ALWAYS, MISSING, NEVER = "always", "missing", "never"
#: Seconds that a tag is believed with "missing".
TAG_AGE = 3600.0
#: The kernel's names of architectures → OCI's name and variant.
OTHER_NAMES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}
TRUE = ("1", "t", "true", "y", "yes", "on")


class Settings(NamedTuple):
    """How to fetch.

    Arguments:
        environ: environment variables.
        arch, variant: platform wanted, in OCI's words.
        no_https: speak plain http to the registry that the reference names.
        credentials: given on the command line or in the environment.
        authfile: a file of credentials.
        policy: ALWAYS, MISSING or NEVER.
        tag_age: seconds a tag is believed.
        disable_cache: keep nothing.
        library: address of the library for library:// without a host.
        compression, level, threads: of the squashfs.
        docker_host: address of a Docker daemon.
    """

    environ: Mapping[str, str]
    arch: str
    variant: str = ""
    no_https: bool = False
    credentials: Credentials | None = None
    authfile: str = ""
    policy: str = ALWAYS
    tag_age: float = TAG_AGE
    disable_cache: bool = False
    library: str = ""
    compression: str = "gzip"
    level: int | None = None
    threads: int | None = None
    docker_host: str = ""
    when: int | None = None


def settings_from(options: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Settings:
    """Return settings from options by name (dashes or underscores), with the environment behind them.

    Raises:
        UsageError: an option has no sense.
    """
    given = {name.replace("-", "_"): value for name, value in options.items()}
    environment = given.get("environ")
    env: Mapping[str, str] = environ or (environment if isinstance(environment, Mapping) else os.environ)

    def text(name: str, *variables: str) -> str:
        value = given.get(name)
        if value:
            return str(value)
        for variable in variables:
            for prefix in ("SINGULARITY_", "APPTAINER_"):
                if env.get(prefix + variable):
                    return env[prefix + variable]
        return ""

    policy = text("pull", "PULL") or ALWAYS
    if given.get("offline") or text("", "OFFLINE").lower() in TRUE:
        policy = NEVER
    if policy not in (ALWAYS, MISSING, NEVER):
        raise UsageError("bad-pull-policy", f"--pull {policy}: say always, missing or never")
    arch, _, variant = text("arch").partition("/")
    arch, usual = OTHER_NAMES.get(arch, (arch, ""))
    user, password = text("docker_username"), given.get("docker_password")
    return Settings(
        environ=env,
        arch=arch or host_arch(),
        variant=text("arch_variant") or variant or usual,
        no_https=bool(given.get("no_https")) or text("", "NOHTTPS", "NO_HTTPS").lower() in TRUE,
        credentials=Credentials(user, str(password or "")) if user else None,
        authfile=text("authfile", "AUTH_FILE"),
        policy=policy,
        tag_age=_seconds(text("tag_age", "TAG_AGE")),
        disable_cache=bool(given.get("disable_cache")),
        library=text("library", "LIBRARY"),
        compression=text("compress", "COMPRESS") or "gzip",
        level=_number(text("level"), "level"),
        threads=_number(text("threads"), "threads"),
        docker_host=text("docker_host", "DOCKER_HOST") or env.get("DOCKER_HOST", ""),
        when=epoch(env),
    )


def _number(text: str, name: str) -> int | None:
    if not text:
        return None
    if not text.isdigit():
        raise UsageError("bad-number", f"--{name} {text}: wants a whole number")
    return int(text)


def _seconds(text: str) -> float:
    if not text:
        return TAG_AGE
    if not text.isdigit():
        raise UsageError("bad-number", f"the age of tags is a number of seconds, not {text!r}")
    return float(text)
