"""Draw the rooms of the project, their files and who imports whom: docs/architecture.svg, from the syntax trees.

    python docs/draw_architecture.py [--check]

An arrow is an import. One that follows from others is left out: where a imports b and c, and b imports c, only a → b
and b → c are drawn. ``--check`` writes nothing and fails where the picture is out of date.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from check_imports import FLOOR, FOLDERS, imports, modules, room, tree

PICTURE = Path(__file__).with_name("architecture.svg")
WIDTH, MARGIN, GAP, PAD = 1300, 28, 62, 14  # the page, its margin, between floors, inside a box
LEFT, MIDDLE, RIGHT = (28, 270), (346, 608), (1002, 270)  # columns: the left edge and the width
WHERE = {  # row, left edge, width
    "bayeslm.cli": (0, *MIDDLE),
    "bayeslm.inference.preferences": (1, *LEFT),
    "bayeslm.inference.control": (1, *RIGHT),
    "bayeslm.inference": (2, *MIDDLE),
    "bayeslm.inference.training": (3, 346, 200),
    "bayeslm.inference.sequential": (3, 558, 200),
    "bayeslm.inference.markov": (3, 770, 184),
    "bayeslm.inference.program": (4, *MIDDLE),
    "bayeslm.models.preferences": (5, *LEFT),
    "bayeslm.models.control": (5, *RIGHT),
    "bayeslm.models": (6, 470, 330),
    "bayeslm.models.samplers": (6, *RIGHT),
    "bayeslm.models.lm": (7, 28, 726),
    "bayeslm.models.rewards": (7, 810, 462),
    "bayeslm": (8, 28, 1244),
}
COLOURS = {  # fill, edge
    "bayeslm.cli": ("#f6eefb", "#8e5bb0"),
    "bayeslm.inference": ("#eaf2fb", "#3f74ad"),
    "bayeslm.models": ("#ebf6ec", "#4c8f55"),
    "bayeslm": ("#fbf4e4", "#b08a3a"),
}


@dataclass
class Box:
    """A room: what it holds, and where it stands."""

    title: str
    purpose: list[str]
    files: list[str]
    fill: str
    edge: str
    row: int
    x: float
    width: float
    y: float = 0.0

    @property
    def height(self) -> float:
        return 2 * PAD + 20 + 17 * len(self.purpose) + 6 + 17 * len(self.files)

    @property
    def centre(self) -> float:
        return self.x + self.width / 2

    def svg(self) -> str:
        lines = [("room", self.title, 20.0)]
        lines += [("purpose", line, 17.0) for line in self.purpose]
        lines += [("file", line, 17.0 + (6 if i == 0 else 0)) for i, line in enumerate(self.files)]
        y, texts = self.y + PAD - 5, []
        for kind, line, step in lines:
            y += step
            texts.append(f'<text class="{kind}" x="{self.x + PAD:.0f}" y="{y:.0f}">{escape(line)}</text>')
        frame = f'x="{self.x:.0f}" y="{self.y:.0f}" width="{self.width:.0f}" height="{self.height:.0f}" rx="8"'
        return f'<rect {frame} fill="{self.fill}" stroke="{self.edge}" stroke-width="1.6"/>\n' + "\n".join(texts)


def boxes() -> dict[str, Box]:
    """A box for each room, rows from top to bottom."""
    found = {}
    for name, (row, x, width) in WHERE.items():
        folder = next(f for f in sorted(FOLDERS, key=len, reverse=True) if f"{name}.".startswith(f"{f}."))
        title = "/".join([FOLDERS[folder], *name.removeprefix(folder).split(".")[1:]]) + "/"
        first = (ast.get_docstring(tree(name)) or "").split("\n\n")[0].replace("`", "")
        names = sorted(m.rpartition(".")[2] for m in modules() if room(m) == name and m != name)
        purpose = wrap(" ".join(first.split()), int((width - 2 * PAD) / 6.6))
        files = wrap(", ".join(names), int((width - 2 * PAD) / 6.7))
        fill, edge = COLOURS[name if name in COLOURS else folder]
        found[name] = Box(title, purpose, files, fill, edge, row, x, width)
    y = float(MARGIN)
    for row in range(1 + max(box.row for box in found.values())):
        of_row = [box for box in found.values() if box.row == row]
        for box in of_row:
            box.y = y
        y += max(box.height for box in of_row) + GAP
    return found


def arrows() -> list[tuple[str, str]]:
    """Pairs of rooms of which one imports the other, without those that follow from others."""
    direct: dict[str, set[str]] = {name: set() for name in WHERE}
    for module in modules():
        for each in imports(module):
            if each.target in modules() and room(module) in WHERE:
                here, there = room(module), room(each.target)
                if FLOOR[here] < FLOOR[there]:
                    direct[here].add(there)

    def below(name: str) -> set[str]:
        return direct[name].union(*(below(other) for other in direct[name]))

    return [(a, b) for a in WHERE for b in WHERE if b in direct[a] and not any(b in below(c) for c in direct[a])]


def curves(found: dict[str, Box], pairs: list[tuple[str, str]]) -> list[str]:
    """Arrows from the lower edge of one box to the upper edge of the other, past the boxes between them."""
    rows: dict[int, list[Box]] = {}
    for box in found.values():
        rows.setdefault(box.row, []).append(box)
    taken: list[tuple[str, float]] = []  # ports: an edge of a box, and x
    passed: list[float] = []  # x where arrows pass other boxes

    def nearest(edge: str, box: Box, x: float) -> float:
        """A free port on the edge of a box, as near to x as may be."""
        free = range(int(box.x) + 20, int(box.x + box.width) - 19, 2)
        best = min(free, key=lambda at: (any(edge == e and abs(at - t) < 26 for e, t in taken), abs(at - x)))
        taken.append((edge, best))
        return best

    paths = []
    for a, b in sorted(pairs, key=lambda pair: (-abs(FLOOR[pair[0]] - FLOOR[pair[1]]), pair)):
        upper, lower = found[a], found[b]
        if upper.row == lower.row:  # of one row: a straight line between their sides
            sides = (upper.x + upper.width, lower.x - 2) if upper.x < lower.x else (upper.x, lower.x + lower.width + 2)
            line = f"M{sides[0]:.0f},{upper.y + 36:.0f} H{sides[1]:.0f}"
            paths.append(f'<path class="arrow" d="{line}" stroke="{upper.edge}" marker-end="url(#tip)"/>')
            continue
        between = [box for row in range(upper.row + 1, lower.row) for box in rows[row]]
        channels = [
            x for x in range(10, WIDTH - 9, 2) if not any(box.x - 14 < x < box.x + box.width + 14 for box in between)
        ]
        overlap = max(upper.x, lower.x), min(upper.x + upper.width, lower.x + lower.width)
        middle = sum(overlap) / 2  # of what both boxes cover, or of the space between them

        def off(x: float, upper: Box = upper, lower: Box = lower) -> float:
            return sum(max(box.x + 20 - x, x - box.x - box.width + 20, 0) for box in (upper, lower))

        crowded = passed + [at for edge, at in taken if edge in (f"{a} below", f"{b} above")]
        x = min(channels, key=lambda x: (off(x) + 40 * any(abs(x - at) < 16 for at in crowded), abs(x - middle)))
        x0, x1 = nearest(f"{a} below", upper, x), nearest(f"{b} above", lower, x)
        y0, y1 = (max(box.y + box.height for box in rows[upper.row]), lower.y - 2)
        line = f"M{x0:.0f},{upper.y + upper.height:.0f} V{y0:.0f} "
        if between:
            below, above = (min(box.y for box in between) - 6, max(box.y + box.height for box in between) + 6)
            passed.append(x)
            half = (y0 + below) / 2
            line += f"C{x0:.0f},{half:.0f} {x:.0f},{half:.0f} {x:.0f},{below:.0f} V{above:.0f} "
            x0, y0 = x, above
        half = (y0 + y1) / 2
        line += f"C{x0:.0f},{half:.0f} {x1:.0f},{half:.0f} {x1:.0f},{y1:.0f}"
        paths.append(f'<path class="arrow" d="{line}" stroke="{upper.edge}" marker-end="url(#tip)"/>')
    return paths


def picture() -> str:
    """The picture as SVG."""
    found, pairs = boxes(), arrows()
    height = max(box.y + box.height for box in found.values()) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}">',
            "<title>The rooms of bayeslm and who imports whom</title>",
            "<defs>",
            '<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,1 L9,5 L0,9 z" fill="#5a6470"/></marker>',
            "<style>text { font-family: 'DejaVu Sans', Verdana, sans-serif; fill: #22272e }"
            " .room { font-size: 15px; font-weight: bold } .purpose { font-size: 12px; fill: #3d4652 }"
            " .file { font-size: 11px; font-family: 'DejaVu Sans Mono', Menlo, monospace; fill: #59636e }"
            " .arrow { fill: none; stroke-width: 1.7 }</style>",
            "</defs>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *curves(found, pairs),
            *(box.svg() for box in found.values()),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    drawn = picture()
    if "--check" not in sys.argv:
        PICTURE.write_text(drawn, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn:
        sys.exit("docs/architecture.svg is out of date: run python docs/draw_architecture.py")
