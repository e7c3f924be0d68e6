# SPDX-License-Identifier: Apache-2.0
"""The API described for people, from its OpenAPI description: rows for the page at /api, text for docs/reference."""

from __future__ import annotations

from typing import Any


def operations(openapi: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the operations by their tags: method, path, summary, description, parameters, answers."""
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, methods in openapi["paths"].items():
        for method, one in methods.items():
            rows = [
                {
                    "name": row["name"],
                    "place": row["in"],
                    "type": _type(row["schema"]),
                    "text": row.get("description", ""),
                }
                for row in one.get("parameters", ())
            ]
            rows += _body(openapi, one)
            text = str(one.get("description", "")).replace("`", "")
            tags.setdefault(one["tags"][0], []).append(
                {
                    "method": method,
                    "path": path,
                    "summary": text.partition("\n")[0].rstrip("."),
                    "description": text,
                    "parameters": rows,
                    "answers": [code for code in one["responses"] if code.isdigit()],
                }
            )
    return tags


def _type(schema: dict[str, Any]) -> str:
    kinds = [one.get("type", "") for one in schema.get("anyOf", [schema])]
    return " or ".join(kind for kind in kinds if kind and kind != "null")


def _body(openapi: dict[str, Any], operation: dict[str, Any]) -> list[dict[str, str]]:
    """Return the fields of a JSON body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    if not name:
        return []
    schema = openapi["components"]["schemas"][name]
    return [
        {
            "name": key + ("" if key in schema.get("required", ()) else "?"),
            "place": "body",
            "type": _type(value),
            "text": value.get("description", ""),
        }
        for key, value in schema.get("properties", {}).items()
    ]


def manual(openapi: dict[str, Any]) -> list[str]:
    """Return the lines of docs/reference/hub-api.md."""
    lines = [
        "# The hub's API",
        "",
        "<!-- Made by scripts/reference; do not change by hand. -->",
        "",
        "JSON over HTTP, with `Authorization: Bearer TOKEN` where somebody has to be known. A refusal is",
        '`{"error": {"code", "message", "id"}}`: the status, words for people, a name of the case that stays. A `?`',
        "marks fields that may be left out. The same for programs: `/api/v1/openapi.json`.",
    ]
    for tag, rows in operations(openapi).items():
        lines += ["", f"## {tag.capitalize()}"]
        for one in rows:
            lines += ["", f"**{one['method'].upper()} `{one['path']}`**", "", *one["description"].splitlines()]
            fields = [row for row in one["parameters"] if row["place"] != "path"]
            if fields:
                lines.append("")
            for row in fields:
                text = f": {row['text']}" if row["text"] else ""
                lines.append(f"- `{row['name']}` ({row['type']}, {row['place']}){text}")
    return lines
