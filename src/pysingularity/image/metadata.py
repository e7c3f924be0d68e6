# SPDX-License-Identifier: Apache-2.0
"""The `/.singularity.d` contract: what stands there, how labels are made, and how `inspect` shows all of it.

An image tells its runtime everything through small files below `/.singularity.d` (surface kept by Singularity since
2.3). This module turns values into those files (`Entry`s, put into an image by `image.entries`) and files back into
values. The scripts' texts are `image.scripts`, apps are `image.scif`, files are read by `image.inside`.
"""

from __future__ import annotations

import json
import time

from pysingularity.errors import ImageError
from pysingularity.image import scripts
from pysingularity.image.entries import Entry
from pysingularity.version import FULL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from pysingularity.image.inside import Source
    from pysingularity.image.open import Image

META = ".singularity.d"
ENV = META + "/env"
DEFINITION = META + "/Singularity"
LABELS = META + "/labels.json"
RUNSCRIPT = META + "/runscript"
STARTSCRIPT = META + "/startscript"
TEST = META + "/test"
HELP = META + "/runscript.help"
HISTORY = META + "/bootstrap_history"
DOCKER_ENVIRONMENT = ENV + "/10-docker2singularity.sh"
CUSTOM_ENVIRONMENT = ENV + "/90-environment.sh"
POST_ENVIRONMENT = ENV + "/91-environment.sh"
APPS_BASE = ENV + "/94-appsbase.sh"

#: Names of the JSON objects in a SIF file.
INSPECT_OBJECT, OCI_CONFIG_OBJECT = "inspect-metadata.json", "oci-config.json"

#: Folders of every root file system, made when missing.
FOLDERS = (
    *(("dev", 0o755), ("proc", 0o755), ("root", 0o700), ("var", 0o755), ("var/tmp", 0o1777), ("tmp", 0o1777)),
    *(("etc", 0o755), ("sys", 0o755), ("home", 0o755)),
)
ACTIONS = {
    "exec": scripts.ACTION_EXEC,
    "run": scripts.ACTION_RUN,
    "shell": scripts.ACTION_SHELL,
    "start": scripts.ACTION_START,
    "test": scripts.ACTION_TEST,
}
LINKS = {
    "singularity": RUNSCRIPT,
    ".run": META + "/actions/run",
    ".exec": META + "/actions/exec",
    ".test": META + "/actions/test",
    ".shell": META + "/actions/shell",
    "environment": CUSTOM_ENVIRONMENT,
}
#: Keys of `inspect`'s attributes in the order in which they are written.
ATTRIBUTES = ("apps", "environment", "labels", "runscript", "test", "helpfile", "deffile", "startscript")
APP_ATTRIBUTES = ("environment", "labels", "runscript", "startscript", "test", "helpfile")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
SCHEMA = "org.label-schema."
#: JSON objects of a SIF file with more bytes than this are refused.
LIMIT = 16 << 20


def base_entries() -> list[Entry]:
    """Return what every image has: base folders, links, env and action scripts.

    Files that say something of this one image (environment, runscript) are kept when they are there; the scripts that
    are the same everywhere are written anew.
    """
    entries = [Entry.folder(path, mode) for path, mode in FOLDERS]
    entries += [Entry.file("etc/hosts", b"", keep=True), Entry.file("etc/resolv.conf", b"", keep=True)]
    entries += [Entry.folder(META + path) for path in ("", "/actions", "/env", "/libs")]
    entries += [Entry.file(f"{META}/actions/{name}", text, 0o755) for name, text in ACTIONS.items()]
    entries += [
        Entry.file(ENV + "/01-base.sh", scripts.ENV_BASE, 0o755),
        Entry.file(CUSTOM_ENVIRONMENT, scripts.ENV_CUSTOM, 0o755, keep=True),
        Entry.file(ENV + "/95-apps.sh", scripts.ENV_APPS, 0o755),
        Entry.file(ENV + "/99-base.sh", scripts.ENV_LIBRARIES, 0o755),
        Entry.file(ENV + "/99-runtimevars.sh", scripts.ENV_RUNTIME, 0o755),
    ]
    entries.append(Entry.file(RUNSCRIPT, '#!/bin/sh\nexec /bin/sh "$@"\n', 0o755, keep=True))
    return entries + [Entry.link(path, target) for path, target in LINKS.items()]


def oci_entries(config: Mapping[str, Any]) -> list[Entry]:
    """Return what the configuration of an OCI image becomes: environment and runscript.

    Arguments:
        config: the image configuration (the JSON document that has `config`, `rootfs` and so on).

    Raises:
        ImageError: it does not have the form that the OCI image specification gives it.
    """
    inner = config.get("config") or {}
    if not isinstance(inner, dict):
        raise ImageError("oci-config", "the image's configuration is not an object")
    environment, entrypoint, command = (_strings(inner, key) for key in ("Env", "Entrypoint", "Cmd"))
    return [
        Entry.file(DOCKER_ENVIRONMENT, scripts.docker_environment(environment), 0o755),
        Entry.file(RUNSCRIPT, scripts.oci_runscript(entrypoint, command), 0o755),
    ]


def oci_labels(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of an OCI image's configuration."""
    inner = config.get("config")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}


def _strings(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if isinstance(value, str):  # the schema of Docker 1.x
        return ["/bin/sh", "-c", value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ImageError("oci-config", f"the image's configuration has no list of words for {key}")
    return value


def build_date(when: int) -> str:
    """Return a time as the label `build-date` spells it: Tuesday_24_November_2026_15:4:6_UTC."""
    now = time.gmtime(when)
    day, month = DAYS[now.tm_wday], MONTHS[now.tm_mon - 1]
    return f"{day}_{now.tm_mday}_{month}_{now.tm_year}_{now.tm_hour}:{now.tm_min}:{now.tm_sec}_UTC"


def automatic_labels(
    *, when: int, arch: str, header: Mapping[str, str] | None = None, has_help: bool = False
) -> dict[str, str]:
    """Return the labels that every build adds.

    Arguments:
        when: time of the build, Unix seconds.
        arch: architecture of the image.
        header: header of the definition file, keys in lower case.
        has_help: the image has a help text.
    """
    labels = {
        SCHEMA + "schema-version": "1.0",
        SCHEMA + "build-date": build_date(when),
        SCHEMA + "build-arch": arch,
        SCHEMA + "usage.singularity.version": FULL,
    }
    if has_help:
        labels[SCHEMA + "usage"] = f"/{HELP}"
        labels[SCHEMA + "usage.singularity.runscript.help"] = f"/{HELP}"
    for key, value in (header or {}).items():
        labels[f"{SCHEMA}usage.singularity.deffile.{key}"] = value
    return labels


def merge_labels(
    old: Mapping[str, str], new: Mapping[str, str], *, force: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Return the labels of an image with new ones added, and the names that kept their old value.

    Arguments:
        old: labels of the base image. Automatic ones of its own build give way.
        new: labels of the definition file.
        force: a new label replaces an old one of another value.
    """
    labels = {key: value for key, value in old.items() if not key.startswith(SCHEMA)}
    kept = []
    for key, value in new.items():
        if key in labels and labels[key] != value and not force:
            kept.append(key)
        else:
            labels[key] = value
    return labels, kept


def labels_file(labels: Mapping[str, str]) -> bytes:
    """Return the content of `labels.json`."""
    return json.dumps(dict(labels), indent="\t", sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogateescape")


def parse_labels(data: bytes | None) -> dict[str, str]:
    """Return the labels of a `labels.json`; nothing for a file that is missing or is no JSON object of texts."""
    try:
        found = json.loads((data or b"{}").decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def history_entry(source: Source, *, keep_as: str = "Singularity") -> list[Entry]:
    """Return the entries that keep the base image's definition file in the history, numbered from 0."""
    old = source.read(DEFINITION)
    if not old:
        return []
    number = len([name for name in source.names(HISTORY) if name.rstrip("0123456789") in ("Singularity", "Apptainer")])
    return [Entry.folder(HISTORY), Entry.file(f"{HISTORY}/{keep_as}{number}", old)]


def collect(source: Source, *, definition: bytes | None = None) -> dict[str, Any]:
    """Return `inspect`'s attributes of a root file system, read without running anything.

    Arguments:
        source: the files.
        definition: the definition file when it is known from elsewhere (SIF object).
    """
    found: dict[str, Any] = {}
    apps = {}
    for name in source.names("scif/apps"):
        top = f"scif/apps/{name}/scif"
        if source.is_folder(top):
            apps[name] = _attributes(source, top, app=True)
    found["apps"] = apps
    found.update(_attributes(source, META, app=False))
    deffile = definition if definition is not None else source.read(DEFINITION)
    found["deffile"] = _text(deffile)
    return clean(found)


def _attributes(source: Source, top: str, *, app: bool) -> dict[str, Any]:
    environment = {}
    for name in source.names(top + "/env"):
        custom = name.startswith("9") and name.endswith("-environment.sh")
        docker = name.startswith("10-docker") and name.endswith(".sh") and not app
        if custom or docker:
            path = f"{top}/env/{name}"
            data = source.read(path)
            if data is not None:
                environment["/" + path] = _text(data)
    return {
        "environment": environment,
        "labels": parse_labels(source.read(top + "/labels.json")),
        "runscript": _text(source.read(top + "/runscript")),
        "startscript": _text(source.read(top + "/startscript")),
        "test": _text(source.read(top + "/test")),
        "helpfile": _text(source.read(top + "/runscript.help")),
    }


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape").rstrip("\n")


def clean(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes in the usual order, without the empty ones and without what has the wrong form."""
    found: dict[str, Any] = {}
    for key in ATTRIBUTES:
        value = attributes.get(key)
        if key == "apps":
            value = {
                str(name): {part: good for part in APP_ATTRIBUTES if (good := _good(part, app.get(part)))}
                for name, app in sorted(value.items() if isinstance(value, dict) else ())
                if isinstance(app, dict)
            }
        else:
            value = _good(key, value)
        if value:
            found[key] = value
    return found


def _good(key: str, value: object) -> object:
    """Return an attribute if it has the form that its name asks for: a text, or texts by name in sorted order."""
    if key in ("environment", "labels"):
        pairs = value.items() if isinstance(value, dict) else ()
        return {str(name): text for name, text in sorted(pairs) if isinstance(text, str)}
    return value if isinstance(value, str) else ""


def document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes wrapped as the JSON document that `inspect --json` prints and SIF files keep."""
    return {"data": {"attributes": dict(attributes)}, "type": "container"}


def inspect_object(attributes: Mapping[str, Any]) -> bytes:
    """Return the bytes of the object `inspect-metadata.json`."""
    return json_bytes(document(attributes))


def json_bytes(value: object, *, indent: str | None = None) -> bytes:
    """Return compact (or indented) JSON in UTF-8; bytes of an image that are no UTF-8 become question marks."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, ensure_ascii=False, separators=separators, indent=indent)
    return text.encode("utf-8", "replace")


def stored_attributes(image: Image) -> dict[str, Any] | None:
    """Return the attributes that a SIF file keeps in its JSON object; None when it has none that can be read."""
    if image.sif is None:
        return None
    from pysingularity.sif.layout import JSON

    one = image.sif.named(INSPECT_OBJECT, JSON)
    if one is None:
        return None
    try:
        found = json.loads(image.sif.read(one, LIMIT).decode("utf-8", "surrogateescape"))
        attributes = found["data"]["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return clean(attributes) if isinstance(attributes, dict) else None


def attributes_of(image: Image) -> dict[str, Any]:
    """Return `inspect`'s attributes of any open image.

    Raises:
        ImageError: damaged. HostError: its file system cannot be read here.
    """
    stored = stored_attributes(image)
    if stored is not None:
        return stored
    from pysingularity.image.inside import source_of

    definition = None
    if image.sif is not None:
        from pysingularity.sif.layout import DEFINITION as DEFINITION_TYPE

        one = image.sif.of_type(DEFINITION_TYPE)
        definition = image.sif.read(one) if one is not None else None
    with source_of(image) as source:
        return collect(source, definition=definition)


def oci_config_of(image: Image) -> bytes | None:
    """Return the OCI configuration that a SIF file keeps, if it does."""
    if image.sif is None:
        return None
    one = image.sif.named(OCI_CONFIG_OBJECT)
    return image.sif.read(one) if one is not None else None


def definition_entries(text: str | bytes, *, help: Iterable[str] = ()) -> list[Entry]:  # noqa: A002
    """Return the entries for the definition file, and for the help text when there is one."""
    entries = [Entry.file(DEFINITION, text)]
    body = "".join(help)
    if body:
        entries.append(Entry.file(HELP, body))
    return entries
