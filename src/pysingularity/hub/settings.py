# SPDX-License-Identifier: Apache-2.0
"""Settings of one hub: `hub.toml` in the data folder, overruled by environment variables SINGULARITY_HUB_*.

Every setting has a default that works for one lab on one machine; `hub.toml` made by `init` is almost empty. Sizes are
bytes and times are seconds. Groups of settings are tables of the file (`[builds]`, `[limits]`) and double underscores
in the environment (`SINGULARITY_HUB_BUILDS__WORKERS=4`).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pysingularity.errors import HostError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HOUR, DAY = 3600, 86400
FILE = "hub.toml"
#: File of the data folder whose time says when a robot was last at work (see `/healthz`).
ROBOTS = ".robots"


class _Group(BaseModel):
    """A table of the settings file; a misspelt name is an error, not a silent default."""

    model_config = {"extra": "forbid"}


class SlurmSettings(_Group):
    """How builds are submitted to a cluster; what is empty is left to the cluster's defaults."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    #: Features of nodes, as sbatch --constraint has them.
    constraint: str = ""
    gres: str = ""
    cpus: int = Field(default=2, ge=1)
    #: More options of sbatch, word by word.
    options: list[str] = Field(default_factory=list)
    #: Folder on the nodes' own disks in which a build works; $TMPDIR and the like are resolved there. Empty: the data
    #: folder, which the nodes share.
    scratch: str = ""
    #: Interpreter with this package on the nodes; empty: the hub's own, by the same path.
    python: str = ""
    #: Seconds between two looks at the cluster's queue.
    poll: float = Field(default=5.0, gt=0)


class BuildSettings(_Group):
    """How images are built."""

    #: The program that builds, with leading arguments; empty means our own, run by this interpreter.
    program: list[str] = Field(default_factory=list)
    #: "local" builds on this machine; "slurm" submits each build to a cluster that shares the data folder.
    engine: Literal["local", "slurm"] = "local"
    slurm: SlurmSettings = Field(default_factory=SlurmSettings)
    #: Builds that run at the same time; 0 means that another machine or process builds.
    workers: int = Field(default=1, ge=0, le=1024)
    active_per_collection: int = Field(default=1, ge=1)
    queued_per_collection: int = Field(default=100, ge=1)
    recipes_per_push: int = Field(default=50, ge=1)
    #: Seconds of wall clock, then the build is `timed_out`.
    time_limit: int = Field(default=2 * HOUR, ge=1)
    memory_limit: int = Field(default=8 * GIB, ge=0)
    process_limit: int = Field(default=4096, ge=0)
    disk_limit: int = Field(default=64 * GIB, ge=0)
    image_limit: int = Field(default=32 * GIB, ge=1)
    log_limit: int = Field(default=32 * MIB, ge=4 * KIB)
    #: A worker that has not been heard of for this long has lost its build.
    lease: float = Field(default=60.0, gt=0)
    attempts: int = Field(default=3, ge=1)
    #: "namespaces" builds in a throw-away sandbox; "none" trusts every recipe with the hub's own account.
    sandbox: Literal["namespaces", "none"] = "namespaces"
    #: Host folders that the sandbox may read, besides the system's own (an extra Python, a CA bundle).
    readable: list[str] = Field(default_factory=list)
    #: Variables of the hub's environment that builds may see (proxy settings and certificates always may).
    environment: list[str] = Field(default_factory=list)
    #: Days for which equal inputs give the image again that they gave before; 0 builds every time.
    reuse_days: float = Field(default=1.0, ge=0)
    keep_work: bool = False


class EgressSettings(_Group):
    """What builds may reach over the network: only through the hub's own forward proxy."""

    #: "proxy" filters, "host" shares the machine's network, "none" gives loopback only.
    mode: Literal["proxy", "host", "none"] = "proxy"
    #: Host names (with `.example.org` for all below), addresses or networks that builds may reach whatever they are.
    allow: list[str] = Field(default_factory=list)
    #: The same, refused first. Loopback, link-local and private networks are refused unless allowed.
    deny: list[str] = Field(default_factory=list)
    #: Only what is in `allow` may be reached.
    closed: bool = False
    #: Proxy of the site that ours asks in turn; empty: as the hub's environment says.
    upstream: str = ""


class SourceSettings(_Group):
    """How repositories are reached."""

    #: Transports that git may use. `file` is for hubs whose people have accounts on this machine anyway.
    protocols: list[Literal["https", "http", "ssh", "git", "file"]] = Field(default=["https", "ssh"])
    #: Folders below which `file` repositories must lie; empty refuses every one.
    local: list[str] = Field(default_factory=list)
    git: str = "git"
    time_limit: int = Field(default=600, ge=1)
    #: A mirror that grows beyond this is refused.
    size_limit: int = Field(default=4 * GIB, ge=0)
    #: Seconds between two looks at repositories that asked for polling.
    poll: float = Field(default=300.0, gt=0)
    #: Hours between two looks at the base images of collections that build when a base moves (trigger `base`).
    base_hours: float = Field(default=24.0, gt=0)
    #: Forges that commit states are reported to, where the repository's address does not tell: each with `prefix` (how
    #: addresses begin), `kind` (github, gitlab, gitea) and `api` (address of its API).
    forges: list[dict[str, str]] = Field(default_factory=list)
    recipe_limit: int = Field(default=1 * MIB, ge=1)
    payload_limit: int = Field(default=25 * MIB, ge=1)


class StorageSettings(_Group):
    """Where image files live."""

    #: Empty: files below the data folder. Else a URL of an object store (s3://bucket/prefix, memory://).
    url: str = ""
    options: dict[str, str] = Field(default_factory=dict)
    #: Clients are sent to signed links of the object store instead of being served by the hub.
    signed_links: bool = True
    #: Address of an S3 store in signed links, when clients reach it by another one than the hub does.
    public: str = ""
    link_seconds: int = 3600
    upload_days: float = 2.0
    part_size: int = Field(default=64 * MIB, ge=5 * MIB)
    #: Bytes that stay free on the disk of the data folder.
    reserve: int = 1 * GIB


class LimitSettings(_Group):
    """What one person may use. 0 means without limit."""

    user_bytes: int = 0
    group_bytes: int = 0
    collection_bytes: int = 0
    collections_per_user: int = 0
    builds_per_day: int = 0
    #: Requests per minute and address (or token) to the JSON doors.
    requests_per_minute: int = 0
    #: Image downloads per hour and address (or token).
    pulls_per_hour: int = 0
    sign_ins_per_minute: int = 20


class KeepSettings(_Group):
    """What garbage collection and retention leave alone, and how often they run."""

    #: Hours between two garbage collections of a running hub; 0: only by `singularity-hub gc`.
    collect_hours: float = Field(default=24.0, ge=0)
    #: Days within which a running hub reads every stored file again; 0: only by `singularity-hub scrub`.
    scrub_days: float = Field(default=30.0, ge=0)

    #: Seconds before an unreferenced blob is removed.
    grace: float = 1 * DAY
    #: Older images of a tag that stay, besides the one the tag names; 0 keeps all.
    last: int = 0
    #: Images pulled within so many days stay.
    pulled_days: float = 90.0
    log_days: float = 0.0
    delivery_days: float = 90.0


class SignInSettings(_Group):
    """Ways to sign in besides local accounts."""

    #: Strangers may make themselves an account with a password.
    registration: bool = False
    passwords: bool = True
    #: Who comes from a provider for the first time gets an account; else only those who connected one may come in.
    join: bool = True
    session_days: float = 14.0
    #: name → {"issuer", "client_id", "client_secret", "title"} for OpenID Connect.
    oidc: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: {"client_id", "client_secret"} (and "url" of an own GitHub Enterprise, "title").
    github: dict[str, str] = Field(default_factory=dict)


class Settings(BaseSettings):
    """All settings of a hub."""

    model_config = SettingsConfigDict(
        env_prefix="SINGULARITY_HUB_", env_nested_delimiter="__", extra="forbid", validate_default=True
    )

    data: Path = Path("hub")
    name: str = "Singularity Hub"
    #: How people reach the hub; empty: as each request says.
    url: str = ""
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    #: Web processes.
    processes: int = Field(default=1, ge=1, le=64)
    #: Addresses of proxies whose X-Forwarded-* headers are believed.
    trusted_proxies: list[str] = Field(default_factory=lambda: ["127.0.0.1", "::1"])
    #: Empty: SQLite below the data folder. Else a URL such as postgresql://user@host/hub.
    database: str = ""
    notice: str = ""
    builds: BuildSettings = Field(default_factory=BuildSettings)
    egress: EgressSettings = Field(default_factory=EgressSettings)
    sources: SourceSettings = Field(default_factory=SourceSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    keep: KeepSettings = Field(default_factory=KeepSettings)
    sign_in: SignInSettings = Field(default_factory=SignInSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: what the command line says, environment, file, defaults."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file_of(init_settings())))

    def folder(self, name: str) -> Path:
        """Return a folder of the data folder by its name (`git`, `logs`, `work`, `blobs`)."""
        return self.data / name

    @property
    def database_url(self) -> str:
        """The URL of the database as SQLAlchemy wants it."""
        if not self.database:
            return f"sqlite:///{self.data / 'hub.sqlite'}"
        scheme, colon, rest = self.database.partition("://")
        return f"postgresql+psycopg{colon}{rest}" if scheme in ("postgresql", "postgres") else self.database

    def secret(self) -> bytes:
        """Return the hub's own secret (signing of cookies and registry tokens), from a file only the hub may read."""
        return (self.data / "secret").read_bytes()


def _file_of(given: dict[str, Any]) -> Path:
    return Path(given.get("data", "hub")) / FILE


def load_settings(data: str | os.PathLike[str], **given: Any) -> Settings:
    """Read the settings of the hub whose data folder is `data`; `given` overrules file and environment.

    Raises:
        HostError: the folder was never made by `init`, or a setting is wrong.
    """
    folder = Path(data).absolute()
    if not (folder / FILE).exists():
        raise HostError(
            "no-hub", f"{folder}: no hub here ({FILE} is missing)", hint=f"make one: singularity-hub init --data {data}"
        )
    try:
        return Settings(data=folder, **given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HostError("wrong-setting", f"{folder / FILE}: {where}: {first['msg']}")
    except ValueError as error:  # TOML that cannot be read
        raise HostError("wrong-setting", f"{folder / FILE}: {error}")


def make_data_folder(data: str | os.PathLike[str], text: str = "") -> Path:
    """Make the data folder with its settings file and secret; what exists already stays as it is."""
    folder = Path(data).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("git", "logs", "work", "blobs", "uploads"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    if not (folder / FILE).exists():
        (folder / FILE).write_text(
            text
            or "# Settings of this Singularity Hub; all of them with their defaults: singularity-hub settings\n"
            'name = "Singularity Hub"\n'
        )
        (folder / FILE).chmod(0o600)
    if not (folder / "secret").exists():
        handle = os.open(folder / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
    return folder
