"""The kinds of plot a report has: curves, dots with intervals, bars, losses, sizes.

Each function draws one panel. Curves carry their names at their ends; there are no legends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megaarch.report import notation
from megaarch.report.cells import MergedCell, value_of
from megaarch.report.panel import Score
from megaarch.report.style import LIGHT, Look, Panel, canvas, drawable

WIDTH, HEIGHT = 390, 270  # points
SMALL_WIDTH, SMALL_HEIGHT = 230, 165
LETTER = 5.3  # points, about the width of one letter
LINE_GAP = 12.0  # points between names at the ends of curves
FEW_POINTS = 4  # a curve of no more points is shown whole
TICK_STEPS = [1, 2, 2.5, 5, 10]
OFFSET: dict[str, Any] = {"textcoords": "offset points"}

Looks = Mapping[str, Look]
Points = list[tuple[float, float]]
Reference = tuple[str, float] | None  # name, value


class Entry(NamedTuple):
    """A row of `dots`. mark: behind its name."""

    label: str
    value: float
    interval: list[float] | None
    mark: str


def axes(panel: Panel, left: float, right: float, bottom: float = 36, top: float = 10) -> Axes:
    """Axes with margins in points."""
    width, height = panel.figure.get_size_inches() * 72
    inner = (width - left - right) / width, (height - bottom - top) / height
    return panel.figure.add_axes((left / width, bottom / height, *inner))


def ticks(axis: Any, most: int) -> None:
    """At most so many intervals between ticks."""
    axis.set_major_locator(MaxNLocator(most, steps=TICK_STEPS))


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


def points_of(cell: MergedCell, curve: str, x: str, y: str) -> Points:
    """Points of a curve; its FLOPs begin with those of the weights that the cell starts from."""
    before = (cell.inherited_flops or 0.0) if x == "flops" else 0.0
    pairs = [(getattr(point, x), getattr(point, y)) for point in getattr(cell, curve)]
    return [(before + a, b) for a, b in pairs if b is not None]


def series_of(
    cells: Sequence[MergedCell], curve: str, x: str, y: str
) -> tuple[dict[str, Points], float]:
    """Label -> points, for cells that have some; and the largest x."""
    series = {cell.label: points_of(cell, curve, x, y) for cell in cells}
    series = {label: points for label, points in series.items() if points}
    return series, max((a for points in series.values() for a, _ in points), default=1)


def curves(
    name: str, title: str, cells: Sequence[MergedCell], look: Looks, x: str, reference: Reference
) -> Panel:
    """Held-out bits per byte against `x`: "flops" or "seconds"."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 44, margin([cell.label for cell in cells]) + 8)
    series, largest = series_of(cells, "curve", x, "heldout")
    if x == "flops":
        divisor, unit = flops_scale(largest)
        x_label = f"useful training compute ({unit})"
    else:
        divisor, unit = seconds_scale(largest)
        x_label = f"training time ({unit})"
    for label, points in series.items():
        style = look[label]
        says = f"{label}: {points[-1][1]:.3f} bits per byte at the end"
        ax.plot(
            [a / divisor for a, _ in points],
            [b for _, b in points],
            color=style.colour,
            linestyle=style.dash,
            gid=panel.gid(label, says),
            marker=style.marker,
        )
    low, high, start = vertical_range(list(series.values()), reference)
    ax.set(xlabel=x_label, ylabel="held-out bits per byte")
    ax.set(ylim=(low, high), xlim=(-0.02 * largest / divisor, 1.01 * largest / divisor))
    ticks(ax.xaxis, 5)
    ticks(ax.yaxis, 6)
    if reference and low < reference[1] < high:
        draw_reference(ax, reference, "horizontal")
    if start is not None:
        panel.caption = f"Before training, above the frame: {start:.2f} or less."
    name_ends(ax, ends_of(series, divisor), look)
    return panel


def vertical_range(
    series: Sequence[Points], reference: Reference
) -> tuple[float, float, float | None]:
    """(low, high, start): a range that shows how curves differ.

    Where the value before training would flatten everything after it, it is left above the frame
    and returned as `start`.
    """
    values = [y for points in series for _, y in points]
    later = [y for points in series for _, y in points[1:]] or values
    low, high = min(values), max(values)
    start = None
    enough = all(len(points) > FEW_POINTS for points in series)
    if enough and low + 1.5 * (max(later) - low) < high:
        start, high = high, max(later)
        if reference and reference[1] < start:
            high = max(high, reference[1])
    space = 0.06 * (high - low or 1)
    return low - space, high + space, start


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


def ends_of(series: Mapping[str, Points], divisor: float) -> dict[str, tuple[float, float]]:
    """Where each curve ends."""
    return {label: (points[-1][0] / divisor, points[-1][1]) for label, points in series.items()}


def name_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], look: Looks) -> None:
    """The names of the curves in the right margin, none on another, tied to their ends."""
    points = ax.bbox.height / ax.figure.dpi * 72
    low, high = ax.get_ylim()
    labels = sorted(ends, key=lambda label: ends[label][1])
    wanted = [(ends[label][1] - low) / (high - low) * points for label in labels]
    for label, place in zip(labels, spread(wanted, LINE_GAP), strict=True):
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


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted` (ascending), near what is wanted.

    Clusters that overlap are joined and centred on their mean (pool adjacent violators).
    """
    clusters: list[list[float]] = []
    for place in wanted:
        clusters.append([place])
        while len(clusters) > 1:
            upper, lower = clusters[-1], clusters[-2]
            distance = sum(upper) / len(upper) - sum(lower) / len(lower)
            if distance >= gap * (len(upper) + len(lower)) / 2:
                break
            clusters[-2:] = [lower + upper]
    return [
        sum(cluster) / len(cluster) + gap * (i - (len(cluster) - 1) / 2)
        for cluster in clusters
        for i in range(len(cluster))
    ]


def dots(
    name: str,
    title: str,
    rows: Sequence[Entry],
    look: Looks,
    unit: str,
    reference: Reference,
    always: bool = False,
) -> Panel:
    """A dot and its interval for each row, first row on top. The reference is drawn where it is
    near, or `always`."""
    panel = Panel(name, title, canvas(WIDTH, max(150, 58 + 24 * len(rows))))
    labels = [row.label for row in rows]
    ax = axes(panel, margin(labels) + 2 * LETTER, 44, top=18)
    for place, (label, value, interval, _) in enumerate(rows):
        style = look[label]
        low, high = interval or (value, value)
        says = f"{label}: {value:.3f}" + (f", from {low:.3f} to {high:.3f}" if interval else "")
        ax.plot(
            [low, value, high],
            [place] * 3,
            color=style.colour,
            linewidth=2,
            solid_capstyle="round",
            marker=style.marker,
            markevery=[1],
            markersize=6,
            gid=panel.gid(label, says),
        )
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "center",
        }
        ax.annotate(f"{value:.3f}", (1, place), (40, 0), **where, **OFFSET)
    if reference and (always or reference_in_view(rows, reference[1])):
        draw_reference(ax, reference, "vertical")
    name_rows(ax, labels, look, [row.mark for row in rows])
    ax.set_xlabel(unit)
    ticks(ax.xaxis, 5)
    ax.margins(x=0.06)
    return panel


def lengths(
    name: str, title: str, series: Mapping[str, list[tuple[int, Score]]], look: Looks, unit: str
) -> Panel | None:
    """Each cell's score and interval by the length of what was scored, in tokens; None without any."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 52, margin(list(series)) + 8)
    ends, places = {}, set()
    for shift, (label, scores) in enumerate(series.items()):
        known = [(n, s.value, s.interval) for n, s in scores if s.value is not None]
        if not known:
            continue
        style = look[label]
        xs = [n * 1.03 ** (shift - len(series) / 2) for n, *_ in known]  # intervals side by side
        ys = [value for _, value, _ in known]
        reach = [(v - i[0], i[1] - v) if i else (0.0, 0.0) for _, v, i in known]
        both = tuple([max(0.0, end) for end in side] for side in zip(*reach, strict=True))
        says = f"{label}: " + ", ".join(f"{v:.3f} at {n}" for n, v, _ in known)
        ax.errorbar(xs, ys, both, fmt="none", ecolor=style.colour, alpha=0.45)
        ax.plot(
            xs,
            ys,
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            gid=panel.gid(label, says),
        )
        ends[label] = xs[-1], ys[-1]
        places.update(n for n, *_ in known)
    if not ends:
        return None
    low, high = ax.get_ylim()
    if low < 0 < high:
        ax.axhline(0, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
    ax.set_xscale("log")
    ax.set(xlabel="tokens of the continuation", ylabel=unit)
    ax.xaxis.set_major_locator(FixedLocator(sorted(places)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    name_ends(ax, ends, look)
    return panel


def reference_in_view(rows: Sequence[Entry], value: float) -> bool:
    """Whether a reference can be drawn without flattening what it refers to."""
    ends = [end for row in rows for end in (row.interval or (row.value,))]
    low, high = min(ends), max(ends)
    return max(high, value) - min(low, value) <= 2.5 * max(high - low, 1e-9)


def name_rows(ax: Axes, labels: Sequence[str], look: Looks, marks: Sequence[str]) -> None:
    names = [f"{shown(label)} {mark}".rstrip() for label, mark in zip(labels, marks, strict=True)]
    ax.set_yticks(range(len(labels)), names)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    for tick, label in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_color(look[label].colour)


def bars(
    name: str, title: str, rows: Sequence[tuple[str, str, float | None]], look: Looks, unit: str
) -> Panel:
    """A bar from zero for each (label, mask kind, value), first row on top."""
    panel = Panel(name, title, canvas(WIDTH, max(150, 48 + 27 * len(rows))))
    labels = [label for label, *_ in rows]
    ax = axes(panel, margin(labels), 52)
    for place, (label, kind, value) in enumerate(rows):
        says = f"{label}: {value or 0:,.4g} {unit}"
        [bar] = ax.barh([place], [value or 0], height=0.34, color=look[label].colour)
        bar.set_gid(panel.gid(label, says))
        text = notation.MISSING if value is None else notation.three_digits(value)
        ax.annotate(text, (value or 0, place), (5, 0), va="center", **OFFSET)
        small: dict[str, Any] = {"fontsize": 7.5, "color": LIGHT["muted"], "va": "bottom"}
        ax.annotate(shown(kind), (0, place), (1, 7), **small, **OFFSET)
    name_rows(ax, labels, look, [""] * len(labels))
    ax.set_xlabel(unit)
    ax.set_xlim(left=0)
    ticks(ax.xaxis, 4)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    return panel


def losses(name: str, title: str, cells: Sequence[MergedCell], look: Looks) -> Panel:
    """Training loss of the cells of one objective, with its running mean."""
    panel = Panel(name, title, canvas(SMALL_WIDTH, SMALL_HEIGHT))
    right = 12 if len(cells) == 1 else margin([cell.label for cell in cells]) + 4
    ax = axes(panel, 32, right, bottom=34, top=6)
    series, largest = series_of(cells, "losses", "flops", "loss")
    divisor, unit = flops_scale(largest)
    for label, points in series.items():
        xs, ys = [a / divisor for a, _ in points], [b for _, b in points]
        style = look[label]
        ax.plot(xs, ys, color=style.colour, linewidth=0.7, alpha=0.35)
        says = f"{label}: {ys[-1]:.3f} nats per target at the end"
        ax.plot(
            xs,
            running_mean(ys),
            color=style.colour,
            gid=panel.gid(label, says),
            linestyle=style.dash if style.dash != "--" else "-",
            marker="o" if len(xs) == 1 else None,
        )
    ax.set_xlabel(f"compute ({unit})", fontsize=8.5)
    ax.set_ylabel("nats per target", fontsize=8.5)
    ax.tick_params(labelsize=8.5)
    ticks(ax.xaxis, 4)
    ticks(ax.yaxis, 5)
    if len(series) > 1:
        name_ends(ax, ends_of(series, divisor), look)
    return panel


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a twentieth of the run in all."""
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def parameters(cell: MergedCell) -> float:
    return cell.parameters or 0.0


def sizes(
    name: str,
    title: str,
    series: Mapping[str, list[MergedCell]],
    look: Looks,
    size: Callable[[MergedCell], float] = parameters,
    says: str = "parameters",
    written: Callable[[float], str] = notation.count,
) -> Panel:
    """Held-out bits per byte against a size of each cell, one curve a name, at one budget. says, written: the
    axis and its numbers."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 44, margin(list(series)) + 8)
    ends, of_series, places = {}, {}, set()
    for label, cells in series.items():
        cells = sorted(cells, key=size)
        xs, ys = [size(cell) for cell in cells], list(map(value_of, cells))
        style = of_series[label] = look[cells[0].label]
        shows = "; ".join(f"{c.label}: {c.bits_per_byte:.3f} bits per byte" for c in cells)
        ax.errorbar(xs, ys, half_intervals(cells), fmt="none", ecolor=style.colour, alpha=0.45)
        ax.plot(xs, ys, color=style.colour, marker=style.marker, gid=panel.gid(label, shows))
        ends[label] = xs[-1], ys[-1]
        places.update(xs)
    ax.set_xscale("log")
    ax.set(xlabel=says, ylabel="held-out bits per byte")
    ax.xaxis.set_major_locator(FixedLocator(thinned(sorted(places))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    name_ends(ax, ends, of_series)
    return panel


def thinned(ticks: Sequence[float]) -> list[float]:
    """Ticks at least a factor of 1.35 apart, so that their labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.35 * kept[-1]:
            kept.append(tick)
    return kept


def half_intervals(cells: Sequence[MergedCell]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below and above each value."""
    values = list(map(value_of, cells))
    ends = [c.heldout.interval() or (v, v) for c, v in zip(cells, values, strict=True)]
    low = [max(0.0, value - end[0]) for value, end in zip(values, ends, strict=True)]
    high = [max(0.0, end[1] - value) for value, end in zip(values, ends, strict=True)]
    return low, high
