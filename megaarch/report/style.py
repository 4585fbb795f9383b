"""How figures look: one fixed colour and marker for each preset, and SVG fit for a page.

In a file, colours are plain; inside the page each becomes a CSS variable, so that light and dark
schemes share one drawing.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from megaarch.config.catalogue import PRESETS
from megaarch.report.merged_cells import MergedCell, without_positions

# name -> (light, dark); those of presets stand in the catalogue
INK = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5c6570", "#9aa4b0"),
    "rule": ("#d5d9de", "#3a4048"),
    "faint": ("#f1f3f5", "#272c33"),
    "full": ("#3d7ab5", "#5f9cd8"),
    "causal": ("#e0913a", "#dd9648"),
    "cross": ("#5aa58c", "#5fb197"),
    "page": ("#ffffff", "#16191d"),
}
DASHES = ("-", (0, (6, 1.5, 1, 1.5)), (0, (1, 1.3)), (0, (8, 2)))
LIGHT = {name: light for name, (light, _) in INK.items()}

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "path.simplify": False,
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.5,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.2,
}


@dataclass(frozen=True)
class Look:
    """How one cell is drawn everywhere. hollow: its markers are not filled, for it starts from another cell."""

    key: str
    marker: str
    dash: Any
    hollow: bool = False

    @property
    def colour(self) -> str:
        return palette()[self.key][0]

    @property
    def marks(self) -> dict[str, Any]:
        """How matplotlib draws its lines and markers."""
        fill = LIGHT["page"] if self.hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": fill}

    @property
    def variable(self) -> str:
        return variable(self.key)


@dataclass
class Panel:
    """One drawing: its name (also its file's), title and caption.

    group: the budget it belongs to, where a study has several.
    groups: gid of a drawn group -> the sentence shown when the pointer rests on it.
    """

    name: str
    title: str
    figure: Figure
    caption: str = ""
    group: str = ""
    groups: dict[str, str] = field(default_factory=dict)

    def gid(self, label: str, says: str) -> str:
        """A unique id for the group that draws `label` in this panel."""
        gid = f"{self.name}--{slug(label)}"
        self.groups[gid] = says
        return gid


def drawable(text: str) -> str:
    """The text as a figure can show it: it begins no mathematics, and XML can hold it."""
    return "".join(c for c in text if c.isprintable()).replace("$", r"\$")


def slug(name: str) -> str:
    """A name as an id and as a part of a file's name. All that a cell's name may hold stays, so that no two are one."""
    return re.sub(r"[^\w.+-]+", "-", name)


def palette() -> dict[str, tuple[str, str]]:
    """Maps each name to its colour in a light and in a dark scheme: every preset's that has one, and
    those of INK."""
    return {p.name: p.colour for p in PRESETS.values() if p.colour} | INK


def variable(name: str) -> str:
    """The CSS variable of a colour."""
    return f"var(--{name.replace('_', '-')})"


def looks(cells: Sequence[MergedCell]) -> dict[str, Look]:
    """Label -> look. A cell of no preset takes the colour of one that the study does not use; one that starts
    from another takes that one's, with hollow markers, and one without positions that of its like with some."""
    used = {cell.preset for cell in cells}
    drawn = [preset.name for preset in PRESETS.values() if preset.colour]
    spare = [name for name in drawn if name not in used] or drawn
    colours = cycle(spare)
    chosen: dict[str, Look] = {}
    keys: dict[str, str] = {}  # of names, and of what those with positions do
    for cell in sorted(cells, key=without_positions):
        if cell.label in chosen:
            continue
        key, parent = cell.preset, (cell.parent or "").partition("/")[0]
        does = f"{cell.architecture} {cell.objective}"
        if key not in drawn:
            like = keys.get(does) if without_positions(cell) else None
            key = keys.get(cell.name) or keys.get(parent) or like or next(colours)
        keys[cell.name] = key
        if not parent:
            keys.setdefault(does, key)
        again = sum(look.key == key for look in chosen.values())
        dash = DASHES[again % len(DASHES)] if cell.heldout.comparable else "--"
        hollow = parent in keys
        chosen[cell.label] = Look(key, PRESETS[key].marker or "o", dash, hollow)
    return chosen


def canvas(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` points."""
    return Figure(figsize=(width / 72, height / 72))


def svg(panel: Panel, inline: bool = False) -> str:
    """The panel as SVG: a file of its own, or a fragment to put into a page.

    Inline: colours become CSS variables, sizes the container's, and each group of the panel has its
    sentence as a tooltip.
    """
    page = io.StringIO()
    # ids that a drawing refers to are hashes: with this salt no two panels of a page share one
    salted: dict[Any, Any] = {**RC, "svg.hashsalt": panel.name}
    with matplotlib.rc_context(salted):
        panel.figure.savefig(
            page,
            format="svg",
            transparent=inline,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return fragment(panel, page.getvalue()) if inline else page.getvalue()


def fragment(panel: Panel, drawing: str) -> str:
    """matplotlib's SVG as an element of a page."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(drawing)
    link = f"{{{XLINK}}}href"
    named = {*panel.groups, *(e.get(link, "").removeprefix("#") for e in root.iter())}
    for element in root.iter():
        if element.get("id") not in named and element.tag != f"{{{SVG}}}clipPath":
            element.attrib.pop("id", None)  # matplotlib numbers groups alike in every drawing
        if says := panel.groups.get(element.get("id", "")):
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = says
            element.insert(0, title)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": panel.title}
    root.set("data-panel", panel.name)
    text = ElementTree.tostring(root, encoding="unicode")
    for name, (light, _) in palette().items():
        text = text.replace(light, variable(name))
    return text


def write(panel: Panel, directory: Path) -> list[Path]:
    """The panel as PDF and SVG files of its name. Returns their paths."""
    paths = [directory / f"{panel.name}.{kind}" for kind in ("pdf", "svg")]
    with matplotlib.rc_context(RC):
        panel.figure.savefig(paths[0], format="pdf", metadata={"CreationDate": None})
    paths[1].write_text(svg(panel), encoding="utf-8")
    return paths
