"""Attention masks drawn from their parts: queries down, keys across.

Several stacks share one drawing, as one mask over [encoder; decoder] tokens: the encoder's block
at the top left, the decoder's at the bottom right, and cross-attention to the left of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import Rectangle

from megaarch.attention.mask import CAUSAL, FULL
from megaarch.report.style import LIGHT, RC, Panel, canvas
from megaarch.study.results import CellResult, Mask

SIDE, LEFT = 210, 18  # points: of the drawing, and beside its masks
STEPS = 128  # most stairs of a causal part
GRID_LIMIT = 40  # tokens up to which single cells show


@dataclass(frozen=True)
class Placed:
    """A mask and where its first query and key stand in the drawing."""

    mask: Mask
    row: int
    column: int


def crosses(mask: Mask) -> bool:
    return "cross" in mask.title.lower()


def kind(mask: Mask, shape: int) -> str:
    """full, causal or cross: the colour of a part of this shape."""
    return "cross" if crosses(mask) else "full" if shape == FULL else "causal"


def kinds(cells: Sequence[CellResult]) -> list[str]:
    """The kinds of parts that the masks of these cells have."""
    masks = [mask for cell in cells for mask in cell.masks]
    there = {kind(mask, shape) for mask in masks for shape, *_ in mask.parts}
    return [name for name in ("full", "causal", "cross") if name in there]


def mask_panel(masks: list[Mask], label: str, name: str) -> Panel:
    """One small drawing with all masks of a cell."""
    placed = place(masks)
    rows = max(p.row + p.mask.queries for p in placed)
    columns = max(p.column + p.mask.keys for p in placed)
    height = min(1.6 * SIDE, (SIDE - 2 - LEFT) * rows / columns)
    panel = Panel(name, label, canvas(SIDE, height + 18))
    with matplotlib.rc_context(RC):
        frame = LEFT / SIDE, 2 / (height + 18), 1 - (LEFT + 2) / SIDE, height / (height + 18)
        ax = panel.figure.add_axes(frame)
        ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal", anchor="NW")
        ax.spines[:].set_visible(False)
        ax.grid(False)
        for p in placed:
            extent = (p.column, p.row), p.mask.keys, p.mask.queries
            ax.add_patch(Rectangle(*extent, color=LIGHT["faint"], linewidth=0))
        draw_parts(ax, placed, panel.gid(label, says(masks)))
        if max(rows, columns) <= GRID_LIMIT:
            rule_cells(ax, placed)
        small = {"fontsize": 8, "color": LIGHT["muted"]}
        ax.annotate(f"{columns} keys →", (0, 1), (0, 4), "axes fraction", "offset points", **small)
        where = {"xy": (0, 1), "xytext": (4 - LEFT, 0), "textcoords": "offset points"}
        ax.annotate(
            f"← {rows} queries", xycoords="axes fraction", rotation=90, va="top", **where, **small
        )
    return panel


def place(masks: list[Mask]) -> list[Placed]:
    """Self-attentions along the diagonal; cross-attention beside the stack that asks."""
    placed, row, column = [], 0, 0
    for mask in masks:
        if not crosses(mask):
            placed.append(Placed(mask, row, column))
            row, column = row + mask.queries, column + mask.keys
    for mask in masks:
        if crosses(mask):
            own = [p for p in placed if not crosses(p.mask)]
            asking = [p for p in own if p.mask.queries == mask.queries]
            asked = [p for p in own if p.mask.keys == mask.keys]
            placed.append(
                Placed(mask, asking[-1].row if asking else row, asked[0].column if asked else 0)
            )
    return placed


def draw_parts(ax: Axes, placed: list[Placed], gid: str) -> None:
    shapes, colours = [], []
    for p in placed:
        for shape, *ranges in p.mask.parts:
            if shape in (FULL, CAUSAL):
                shapes.append(outline(shape, *ranges) + np.array((p.column, p.row)))
                colours.append(LIGHT[kind(p.mask, shape)])
    ax.add_collection(PolyCollection(shapes, facecolors=colours, linewidths=0, gid=gid))


def outline(shape: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
    """Corners [points, 2] of a part, as (key, query): a rectangle, or stairs."""
    if shape == FULL:
        return np.array([(k0, q0), (k1, q0), (k1, q1), (k0, q1)], dtype=float)
    q, k = q1 - q0, k1 - k0
    top = np.unique(np.linspace(0, q, min(q, STEPS) + 1).round().astype(int))
    corners = [(k0, q0)]
    for first, last in pairwise(top):
        edge = k0 + int(np.clip(last + k - q, 0, k))
        corners += [(edge, q0 + first), (edge, q0 + last)]
    return np.array([*corners, (k0, q1)], dtype=float)


def rule_cells(ax: Axes, placed: list[Placed]) -> None:
    lines = []
    for p in placed:
        left, top = p.column, p.row
        right, bottom = left + p.mask.keys, top + p.mask.queries
        lines += [((x, top), (x, bottom)) for x in range(left, right + 1)]
        lines += [((left, y), (right, y)) for y in range(top, bottom + 1)]
    ax.add_collection(LineCollection(lines, colors=LIGHT["page"], linewidths=0.7))


def says(masks: list[Mask]) -> str:
    return "; ".join(f"{mask.title}: {mask.queries} queries, {mask.keys} keys" for mask in masks)
