"""What every plot stands on: axes with margins in points, ticks, units, names at the ends of curves and rows,
a reference.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from scipy.optimize import isotonic_regression

from megaarch.report import notation
from megaarch.report.style import LIGHT, Look, Panel, canvas, drawable

WIDTH, HEIGHT = 370, 260  # points
SMALL_WIDTH, SMALL_HEIGHT = 230, 165
BOTTOM, TOP = 36, 10  # below and above axes
LETTER = 5.3  # points, about the width of one letter
LINE_GAP = 12.0  # points between names at the ends of curves
TICK_STEPS = [1, 2, 2.5, 5, 10]
OFFSET: dict[str, Any] = {"textcoords": "offset points"}
Looks = Mapping[str, Look]
Reference = tuple[str, float] | None  # name, value


def reference(name: str, value: float | None) -> Reference:
    return None if value is None else (name, value)


def axes(panel: Panel, left: float, right: float, bottom: float = BOTTOM, top: float = TOP) -> Axes:
    """Axes with margins in points."""
    width, height = panel.figure.get_size_inches() * 72
    inner = (width - left - right) / width, (height - bottom - top) / height
    return panel.figure.add_axes((left / width, bottom / height, *inner))


def tall(names: int) -> Figure:
    """A canvas for curves, as high as their names at their ends need."""
    return canvas(WIDTH, max(HEIGHT, BOTTOM + TOP + LINE_GAP * names))


def ticks(axis: Any, most: int, whole: bool = False) -> None:
    """At most so many intervals between ticks. whole: at whole numbers alone."""
    axis.set_major_locator(MaxNLocator(most, steps=TICK_STEPS, integer=whole))


def shown(label: str) -> str:
    """A label that fits a margin."""
    return drawable(notation.shortened(label, 26, 11, "…"))


def margin(labels: Sequence[str]) -> float:
    return LETTER * max(len(shown(label)) for label in labels) + 14


def flops_scale(largest: float) -> tuple[float, str]:
    """(divisor, unit) for an axis of FLOPs."""
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**exponent, f"{notation.ten(exponent)} FLOPs"


def seconds_scale(largest: float) -> tuple[float, str]:
    """(divisor, unit) for an axis of time."""
    for seconds, unit in ((2 * 3600, "hours"), (120, "minutes")):
        if largest >= seconds:
            return seconds / 2, unit
    return 1.0, "seconds"


def draw_reference(ax: Axes, reference: tuple[str, float], direction: str) -> None:
    """A dotted line across the axes, with its name and value at its end."""
    name, value = reference
    style = {"color": LIGHT["muted"], "linewidth": 1, "linestyle": (0, (1, 2))}
    text = {"text": f"{name} {value:.2f}", "fontsize": 8.5, "color": LIGHT["muted"], **OFFSET}
    if direction == "horizontal":
        ax.axhline(value, **style)
        place = {"xy": (1, value), "xycoords": ("axes fraction", "data")}
        ax.annotate(**text, **place, xytext=(-2, 3), ha="right")
    else:
        ax.axvline(value, **style)
        place = {"xy": (value, 1), "xycoords": ("data", "axes fraction")}
        ax.annotate(**text, **place, xytext=(0, 4), ha="center")


def name_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], look: Looks) -> None:
    """The names of the curves in the right margin, none on another, tied to their ends."""
    points = ax.bbox.height / ax.figure.dpi * 72
    labels = sorted(ends, key=lambda label: ends[label][1])
    ax.autoscale_view()  # which is put off until something asks for the limits
    to_axes = ax.transScale + ax.transLimits
    wanted = [to_axes.transform(ends[label])[1] * points for label in labels]
    for label, place in zip(labels, spread(wanted, LINE_GAP, points), strict=True):
        colour = look[label].colour
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
        ax.annotate(
            shown(label),
            ends[label],
            (1.045, place / points),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops={**line, "shrinkA": 1, "shrinkB": 3},
        )


def spread(wanted: Sequence[float], gap: float, room: float = math.inf) -> list[float]:
    """Places at least `gap` apart between 0 and `room`, in the order of `wanted` (ascending), near what is
    wanted."""
    steps = gap * np.arange(len(wanted))
    free = isotonic_regression(np.subtract(wanted, steps)).x
    return (np.clip(free, 0, room - gap * (len(wanted) - 1)) + steps).tolist()


def name_rows(ax: Axes, labels: Sequence[str], look: Looks, marks: Sequence[str]) -> None:
    names = [f"{shown(label)} {mark}".rstrip() for label, mark in zip(labels, marks, strict=True)]
    ax.set_yticks(range(len(labels)), names)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    for tick, label in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_color(look[label].colour)


def thinned(ticks: Sequence[float], apart: float = 1.35) -> list[float]:
    """Ticks at least a factor `apart`, so that their labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > apart * kept[-1]:
            kept.append(tick)
    return kept


def budget_ticks(ax: Axes, budgets: Sequence[float]) -> None:
    """A logarithmic axis of FLOPs, named at powers of ten, or at some of these budgets where fewer than two powers lie
    among them."""
    ax.set_xscale("log")
    low, high = min(budgets), max(budgets)
    if math.floor(math.log10(high)) - math.ceil(math.log10(low)) < 1:
        apart = max(1.35, (high / low) ** (1 / 3))
        ax.xaxis.set_major_locator(FixedLocator(thinned(sorted(budgets), 0.99 * apart)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: notation.power(value)))
    else:
        label = FuncFormatter(lambda value, _: notation.ten(round(math.log10(value))))
        ax.xaxis.set_major_formatter(label)
    ax.xaxis.set_minor_formatter(NullFormatter())
