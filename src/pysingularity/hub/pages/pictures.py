# SPDX-License-Identifier: Apache-2.0
"""Pictures as SVG text: badges, and the treemap of what fills an image. Pure functions.

The treemap is "squarified" (Bruls, Huizing, van Wijk, 2000): rectangles whose area is a size and whose shape stays near
a square, so that large files are seen at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from urllib.parse import quote

#: Width of a character of the badge's font (Verdana 11) in units of a tenth of a pixel, by class of character.
_NARROW, _WIDE, _USUAL = "fijlrtI.,:;|!'()[] ", "mwMW@%", 70
_COLOURS = {
    "done": "#2f7d32",
    "failed": "#b3261e",
    "timed_out": "#b3261e",
    "cancelled": "#6b6f76",
    "superseded": "#6b6f76",
    "skipped": "#6b6f76",
    "unknown": "#6b6f76",
}
_BUSY = "#1f5fa8"


def _text_width(text: str) -> int:
    """Return about how many pixels a text takes."""
    tenths = sum(38 if letter in _NARROW else 105 if letter in _WIDE else _USUAL for letter in text)
    return -(-tenths // 10)


def badge(left: str, right: str, state: str = "") -> str:
    """Return a badge: a grey half with a name, a coloured half with a value.

    Arguments:
        state: a build's state, which gives the colour.
    """
    left_width, right_width = _text_width(left) + 12, _text_width(right) + 12
    width = left_width + right_width
    colour = _COLOURS.get(state, _BUSY)
    label = escape(f"{left}: {right}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}">'
        f"<title>{label}</title>"
        f'<clipPath id="r"><rect width="{width}" height="20" rx="4"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left_width}" height="20" fill="#45494f"/>'
        f'<rect x="{left_width}" width="{right_width}" height="20" fill="{colour}"/></g>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left_width / 2:g}" y="14">{escape(left)}</text>'
        f'<text x="{left_width + right_width / 2:g}" y="14">{escape(right)}</text></g></svg>'
    )


@dataclass
class Folder:
    """A folder or file with the bytes it and everything below it takes."""

    name: str
    size: int = 0
    files: int = 0
    children: dict[str, Folder] = field(default_factory=dict)

    def add(self, path: str, size: int) -> None:
        """Add a file below this folder."""
        node = self
        node.size += size
        node.files += 1
        for part in path.split("/"):
            if part:
                node = node.children.setdefault(part, Folder(part))
                node.size += size
                node.files += 1


@dataclass(frozen=True)
class Rectangle:
    """A place in a picture."""

    x: float
    y: float
    width: float
    height: float


def squarify(sizes: Sequence[float], place: Rectangle) -> list[Rectangle]:
    """Return a rectangle for each size, largest first, filling `place` in proportion. Sizes must be positive."""
    total = sum(sizes)
    found: list[Rectangle] = []
    if not sizes or total <= 0 or place.width <= 0 or place.height <= 0:
        return [Rectangle(place.x, place.y, 0, 0) for _ in sizes]
    scale = place.width * place.height / total
    areas = [size * scale for size in sizes]
    x, y, width, height = place.x, place.y, place.width, place.height
    start = 0
    while start < len(areas):
        short = min(width, height)
        end, row = start + 1, areas[start]
        # A row grows as long as its worst rectangle becomes squarer by it.
        while end < len(areas) and _worst(areas[start : end + 1], row + areas[end], short) <= _worst(
            areas[start:end], row, short
        ):
            row += areas[end]
            end += 1
        thick = row / short if short else 0
        at = 0.0
        for area in areas[start:end]:
            length = area / thick if thick else 0
            if width >= height:
                found.append(Rectangle(x, y + at, thick, length))
            else:
                found.append(Rectangle(x + at, y, length, thick))
            at += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
        start = end
    return found


def _worst(row: Sequence[float], total: float, side: float) -> float:
    if not total or not side:
        return float("inf")
    largest, smallest = max(row), min(row)
    return max(side * side * largest / (total * total), total * total / (side * side * smallest or 1e-12))


def treemap(
    root: Folder, *, width: int = 960, height: int = 480, link: str = "", below: str = "", after: str = ""
) -> str:
    """Return the picture of a folder's two upper levels.

    Arguments:
        link: address to which a folder's path is appended, quoted, or "" for a picture without links.
        after: what the address ends with.
        below: what comes before the path in the link, for a folder that is not the root.
    """
    label = escape(f"what fills {root.name or 'the image'}", quote=True)
    head = f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}"'
    parts = [f'<svg class="treemap" xmlns="http://www.w3.org/2000/svg" {head}>']
    top = _largest(root, 40)
    places = squarify([child.size for child in top], Rectangle(0, 0, width, height))
    for number, (child, place) in enumerate(zip(top, places, strict=True)):
        inner = [_box(child, child.name, place, f"t{number % 8}", link, below, after)]
        # Room for the name above what lies inside.
        inside = Rectangle(place.x + 2, place.y + 16, place.width - 4, place.height - 18)
        if child.children and inside.width > 30 and inside.height > 20:
            deeper = _largest(child, 24)
            for grandchild, spot in zip(deeper, squarify([one.size for one in deeper], inside), strict=True):
                path = f"{child.name}/{grandchild.name}"
                inner.append(_box(grandchild, path, spot, f"t{number % 8} deep", link, below, after))
        parts += inner
    parts.append("</svg>")
    return "".join(parts)


def _largest(folder: Folder, count: int) -> list[Folder]:
    """Return the largest entries of a folder; what is too small to see becomes one."""
    children = sorted((child for child in folder.children.values() if child.size), key=lambda one: -one.size)
    if len(children) <= count:
        return children
    rest = Folder("…", sum(one.size for one in children[count:]), sum(one.files for one in children[count:]))
    return sorted([*children[:count], rest], key=lambda one: -one.size)


def _box(node: Folder, path: str, place: Rectangle, style: str, link: str, below: str, after: str) -> str:
    if place.width < 1 or place.height < 1:
        return ""
    title = escape(f"{path}: {human_size(node.size)}, {node.files} files", quote=True)
    text = ""
    if place.width > 6 * len(node.name) + 6 and place.height > 14:
        text = f'<text x="{place.x + 4:.1f}" y="{place.y + 12:.1f}">{escape(node.name)}</text>'
    box = (
        f'<g class="{style}"><title>{title}</title><rect x="{place.x:.1f}" y="{place.y:.1f}" '
        f'width="{place.width:.1f}" height="{place.height:.1f}"/>{text}</g>'
    )
    if link and node.children:
        return f'<a href="{escape(link + quote(below + path, safe="/") + after, quote=True)}">{box}</a>'
    return box


def human_size(size: float) -> str:
    """Return bytes as people read them: "4.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
