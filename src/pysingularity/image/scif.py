# SPDX-License-Identifier: Apache-2.0
"""Apps inside an image, after the Scientific Filesystem (SCIF): where their files stand and what is written there.

An app has its folder `/scif/apps/NAME` with `bin`, `lib` and `scif` (scripts, labels, help), and `/scif/data/NAME`.
The definition file's %app sections are `recipe`; the build decides when these entries are written.
"""

from __future__ import annotations

import json

from pysingularity.errors import UserError
from pysingularity.image.entries import Entry
from pysingularity.image.scripts import HEAD, quote, section_script

APPS, DATA = "scif/apps", "scif/data"


def check_name(name: str) -> str:
    """Return the name of an app if it can be a folder.

    Raises:
        UserError: it cannot.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name or "\n" in name:
        raise UserError("app-name", f"{name!r} cannot be the name of an app")
    return name


def variables(name: str) -> dict[str, str]:
    """Return the variables that tell an app where it is."""
    root = f"/{APPS}/{name}"
    return {
        "SCIF_APPNAME": name,
        "SCIF_APPROOT": root,
        "SCIF_APPMETA": f"{root}/scif",
        "SCIF_DATA": f"/{DATA}",
        "SCIF_APPDATA": f"/{DATA}/{name}",
        "SCIF_APPINPUT": f"/{DATA}/{name}/input",
        "SCIF_APPOUTPUT": f"/{DATA}/{name}/output",
    }


def base_script(name: str) -> str:
    """Return the app's `01-base.sh`: its variables."""
    found = variables(name)
    lines = [f"{key}={quote(value)}\n" for key, value in found.items()]
    return f"{HEAD}{''.join(lines)}export {' '.join(found)}\n"


def global_script(names: list[str]) -> str:
    """Return `94-appsbase.sh`: for every app, where its parts are, with the app's name at the end of each variable."""
    lines = [HEAD, "# Where the apps of this image are.\n"]
    for name in names:
        root, suffix = f"/{APPS}/{name}", "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name)
        places = {
            "SCIF_APPDATA": f"/{DATA}/{name}",
            "SCIF_APPMETA": f"{root}/scif",
            "SCIF_APPROOT": root,
            "SCIF_APPBIN": f"{root}/bin",
            "SCIF_APPLIB": f"{root}/lib",
            "SCIF_APPLABELS": f"{root}/scif/labels.json",
            "SCIF_APPENV": f"{root}/scif/env/90-environment.sh",
            "SCIF_APPRUN": f"{root}/scif/runscript",
        }
        for key, value in places.items():
            lines.append(f"{key}_{suffix}={quote(value)}\n")
        lines.append("export " + " ".join(f"{key}_{suffix}" for key in places) + "\n")
    return "".join(lines)


def install_script(name: str, body: str) -> str:
    """Return what is run after %post for an app: its %appinstall, in its folder and with its variables."""
    root = quote(f"/{APPS}/{check_name(name)}")
    return f"cd /\n. {root}/scif/env/01-base.sh\ncd {root}\n{body.rstrip(chr(10))}\ncd /\n"


def entries(
    name: str,
    *,
    run: str | None = None,
    run_arguments: str = "",
    start: str | None = None,
    test: str | None = None,
    help: str | None = None,  # noqa: A002
    environment: str | None = None,
    labels: dict[str, str] | None = None,
) -> list[Entry]:
    """Return the folders and files of an app.

    Arguments:
        name: the app's name.
        run, start, test, help, environment: bodies of %apprun, %appstart, %apptest, %apphelp, %appenv; None when the
            definition file has no such section.
        run_arguments: words behind the app's name on the %apprun line.
        labels: from %applabels.

    Raises:
        UserError: the name cannot be a folder.
    """
    root = f"{APPS}/{check_name(name)}"
    made = [Entry.folder(path) for path in ("scif", APPS, root, f"{root}/bin", f"{root}/lib", f"{root}/scif")]
    made += [Entry.folder(f"{root}/scif/env")]
    made += [Entry.folder(path) for path in (DATA, f"{DATA}/{name}", f"{DATA}/{name}/input", f"{DATA}/{name}/output")]
    made.append(Entry.file(f"{root}/scif/env/01-base.sh", base_script(name), 0o755))
    if environment is not None:
        made.append(Entry.file(f"{root}/scif/env/90-environment.sh", environment, 0o755))
    for file, body, arguments in (("runscript", run, run_arguments), ("startscript", start, ""), ("test", test, "")):
        if body is not None:
            made.append(Entry.file(f"{root}/scif/{file}", section_script(body, arguments), 0o755))
    if help is not None:
        made.append(Entry.file(f"{root}/scif/runscript.help", help))
    all_labels = {**(labels or {}), "SCIF_APP_NAME": name}
    text = json.dumps(all_labels, indent="\t", sort_keys=True, ensure_ascii=False)
    made.append(Entry.file(f"{root}/scif/labels.json", text))
    return made
