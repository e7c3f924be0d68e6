# SPDX-License-Identifier: Apache-2.0
"""Print docs/reference/hub-settings.md (from the classes that read them) or hub-commands.md (from the parser).

    python scripts/hub_reference.py settings|commands

Settings are read from the source, so that the comments beside them are what people read; commands need the hub's
packages.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "pysingularity" / "hub" / "settings.py"
FACTORS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "HOUR": 3600, "DAY": 86400}


def settings() -> list[str]:
    """Return the page of settings."""
    text = SOURCE.read_text()
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    page = [
        "# Settings of a hub",
        "",
        "Made from the classes that read them (`pysingularity.hub.settings`) by `scripts/reference`.",
        "",
        "Settings are lines of `hub.toml` in the data folder. Environment variables overrule them: `SINGULARITY_HUB_`",
        "and the name, with two underscores behind the table (`SINGULARITY_HUB_BUILDS__WORKERS=4`, lists as JSON).",
        "`singularity-hub settings` shows all of them as they are now. Sizes are bytes and times seconds unless the",
        "name says otherwise.",
        "",
    ]
    return page + _table(classes, lines, "Settings", "")


def _table(classes: dict[str, ast.ClassDef], lines: list[str], name: str, path: str) -> list[str]:
    node = classes[name]
    title = f"`[{path}]`" if path else "At the top"
    page = [f"## {title}", "", ast.get_docstring(node) or "", "", "| setting | values | default | meaning |"]
    page.append("| --- | --- | --- | --- |")
    below: list[str] = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        kind = ast.unparse(field.annotation)
        if kind in classes:
            below += _table(classes, lines, kind, f"{path}.{field.target.id}".lstrip("."))
            continue
        row = [f"`{field.target.id}`", _values(kind), _default(field.value), _comment(lines, field.lineno)]
        page.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return [*page, "", *below]


def _values(kind: str) -> str:
    if kind.startswith("Literal["):
        return ", ".join(re.findall(r"'([^']*)'", kind))
    words = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true, false", "Path": "a path"}
    if kind.startswith("list[dict"):
        return "tables"
    if kind.startswith("list[Literal"):
        return "list of " + ", ".join(re.findall(r"'([^']*)'", kind))
    if kind.startswith("list["):
        return "list of texts"
    return "a table" if kind.startswith("dict[") else words.get(kind, kind)


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        given = {word.arg: word.value for word in value.keywords}
        value = value.args[0] if value.args else given.get("default", given.get("default_factory"))
        if isinstance(value, ast.Lambda):
            value = value.body
        elif isinstance(value, ast.Name):
            return {"list": "`[]`", "dict": "`{}`"}.get(value.id, "")
    try:
        # The names of units are the only ones there are.
        result = eval(compile(ast.Expression(value or ast.Constant("")), "", "eval"), {}, FACTORS)
    except (NameError, TypeError):
        return f"`{ast.unparse(value)}`" if value else ""
    text = str(result).lower() if isinstance(result, bool) else str(result)
    return f"`{text}`" if text else ""


def _comment(lines: list[str], number: int) -> str:
    found = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#:"):
            break
        found.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(found)


def commands() -> list[str]:
    """Return the page of commands."""
    from pysingularity.hub.command import parser

    page = [
        "# Commands of a hub",
        "",
        "Made from the parser (`pysingularity.hub.command`) by `scripts/reference`.",
        "",
        "Every command has `--data DIR` (the data folder; `SINGULARITY_HUB_DATA`, else `hub`) and `--json`. Commands",
        "work on the data folder, so they need no running hub and no token; whoever can read it is the administrator.",
        "",
    ]
    return page + _commands(parser())


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    page: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                page += _commands(one)
            return page
    options = [one for one in parser._actions if one.option_strings and one.dest not in ("help", "data", "json")]
    words = [one.metavar or one.dest.upper() for one in parser._actions if not one.option_strings]
    page += [f"## {' '.join([parser.prog, *map(str, words)])}", "", str(parser.description or ""), ""]
    if options:
        page += ["| option | meaning |", "| --- | --- |"]
        for one in options:
            value = "" if one.nargs == 0 else f" {one.metavar or one.dest.upper()}"
            page.append(f"| `{', '.join(one.option_strings)}{value}` | {one.help or ''} |")
        page.append("")
    return page


if __name__ == "__main__":
    print("\n".join({"settings": settings, "commands": commands}[sys.argv[1]]()).rstrip())
