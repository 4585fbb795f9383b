"""How figures look: one fixed colour and marker for each preset, and SVG fit for a page.

In a file, colours are plain; inside the page each becomes a CSS variable, so that light and dark
schemes share one drawing.
"""

import html
import io
import re
from dataclasses import dataclass, field

import matplotlib
from matplotlib.figure import Figure

from megaarch.config.catalogue import PRESETS

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

RC = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "megaarch",
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
    """How one cell is drawn everywhere."""

    key: str
    marker: str
    dash: object

    @property
    def colour(self) -> str:
        return palette()[self.key][0]

    @property
    def variable(self) -> str:
        return f"var(--{self.key.replace('_', '-')})"


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


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def palette() -> dict[str, tuple[str, str]]:
    """Name -> its colour in a light and in a dark scheme: of every preset that has one, and of INK."""
    return {p.name: p.colour for p in PRESETS.values() if p.colour} | INK


def looks(cells: list[dict]) -> dict[str, Look]:
    """Label -> look. A cell of no preset takes the colour of one that the study does not use."""
    used = {cell.get("preset") for cell in cells}
    drawn = [preset.name for preset in PRESETS.values() if preset.colour]
    spare = [name for name in drawn if name not in used] or drawn
    chosen: dict[str, Look] = {}
    keys: dict[str, str] = {}
    for cell in cells:
        if cell["label"] in chosen:
            continue
        key = cell.get("preset")
        if key not in drawn:
            key = keys.setdefault(cell["name"], spare[len(keys) % len(spare)])
        again = sum(look.key == key for look in chosen.values())
        dash = DASHES[again % len(DASHES)] if cell["heldout"].get("comparable", True) else "--"
        chosen[cell["label"]] = Look(key, PRESETS[key].marker or "o", dash)
    return chosen


def canvas(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` points."""
    return Figure(figsize=(width / 72, height / 72))


def svg(panel: Panel, inline: bool = False) -> str:
    """The panel as SVG: a file of its own, or a fragment to put into a page.

    Inline: colours become CSS variables, sizes the container's, ids begin with the panel's name.
    """
    page = io.StringIO()
    with matplotlib.rc_context(RC):
        panel.figure.savefig(
            page,
            format="svg",
            transparent=inline,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    drawing = page.getvalue()
    if not inline:
        return drawing
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', partial_head(panel), drawing, count=1)
    drawing = unique_ids(drawing, panel)
    for name, (light, _) in palette().items():
        drawing = re.sub(rf"{light}\b", f"var(--{name.replace('_', '-')})", drawing)
    for gid, says in panel.groups.items():
        group = f'<g id="{gid}">'
        drawing = drawing.replace(group, f"{group}<title>{html.escape(says)}</title>", 1)
    return drawing


def partial_head(panel: Panel) -> str:
    title = html.escape(panel.title, quote=True)
    return (
        rf'<svg viewBox="\1" role="img" aria-label="{title}" data-panel="{panel.name}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )


def unique_ids(drawing: str, panel: Panel) -> str:
    """Every id but those of the panel's own groups, with the panel's name before it."""

    def renamed(match: re.Match) -> str:
        before, name, after = match.groups()
        return match[0] if name in panel.groups else f"{before}{panel.name}-{name}{after}"

    for pattern in (r'(\bid=")([^"]+)(")', r'(href="#)([^"]+)(")', r"(url\(#)([^)]+)(\))"):
        drawing = re.sub(pattern, renamed, drawing)
    return drawing


def write(panel: Panel, directory) -> list:
    """The panel as PDF and SVG files of its name. Returns their paths."""
    paths = [directory / f"{panel.name}.{kind}" for kind in ("pdf", "svg")]
    with matplotlib.rc_context(RC):
        panel.figure.savefig(paths[0], format="pdf", metadata={"CreationDate": None})
    paths[1].write_text(svg(panel), encoding="utf-8")
    return paths
