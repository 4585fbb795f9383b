"""The kinds of plot a report has: curves, dots with intervals, bars, losses, ranges, lines.

Each function draws one panel. Curves carry their names at their ends; there are no legends.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megaarch.report import notation
from megaarch.report.axes import (
    LETTER,
    OFFSET,
    SMALL_HEIGHT,
    SMALL_WIDTH,
    WIDTH,
    Looks,
    Reference,
    axes,
    draw_reference,
    flops_scale,
    margin,
    name_ends,
    name_rows,
    seconds_scale,
    shown,
    tall,
    thinned,
    ticks,
)
from megaarch.report.merged_cells import MergedCell, value_of
from megaarch.report.style import LIGHT, Panel, canvas
from megaarch.report.yardsticks import Score

MOST_APART = (
    1.6  # a factor of x between the first and the last curve, less than between two lengths
)
FEW_POINTS = 4  # a curve of no more points is shown whole
Points = list[tuple[float, float]]


class Entry(NamedTuple):
    """A row of `dots`. mark: behind its name."""

    label: str
    value: float
    interval: list[float] | None
    mark: str = ""


def entries(
    scores: Mapping[str, Score], marks: Mapping[str, str], lowest_first: bool = False
) -> list[Entry]:
    """Rows of the scores that have a value, the largest first; equal ones in the order of the scores. marks:
    of some."""
    rows = [
        Entry(label, score.value, score.interval, marks.get(label, ""))
        for label, score in scores.items()
        if score.value is not None
    ]
    return sorted(rows, key=lambda row: row.value if lowest_first else -row.value)


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
    panel = Panel(name, title, tall(len(cells)))
    ax = axes(panel, 44, margin([cell.label for cell in cells]) + 8)
    series, largest = series_of(cells, "curve", x, "heldout")
    if x == "flops":
        divisor, unit = flops_scale(largest)
        x_label = f"useful training compute ({unit})"
    else:
        divisor, unit = seconds_scale(largest)
        x_label = f"training time ({unit})"
    for label, points in series.items():
        xs, ys = [a / divisor for a, _ in points], [b for _, b in points]
        draw_curve(ax, panel, label, xs, ys, look, f"{ys[-1]:.3f} bits per byte at the end")
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


def draw_curve(
    ax: Axes,
    panel: Panel,
    label: str,
    xs: Sequence[float],
    ys: Sequence[float],
    look: Looks,
    says: str,
) -> None:
    gid = panel.gid(label, f"{label}: {says}")
    ax.plot(xs, ys, linestyle=look[label].dash, gid=gid, **look[label].marks)


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


def ends_of(series: Mapping[str, Points], divisor: float) -> dict[str, tuple[float, float]]:
    """Where each curve ends."""
    return {label: (points[-1][0] / divisor, points[-1][1]) for label, points in series.items()}


def dots(
    name: str, title: str, rows: Sequence[Entry], look: Looks, unit: str, reference: Reference
) -> Panel:
    """A dot and its interval for each row, first row on top."""
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
            linewidth=2,
            solid_capstyle="round",
            markevery=[1],
            markersize=6,
            gid=panel.gid(label, says),
            **style.marks,
        )
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "center",
        }
        ax.annotate(f"{value:.3f}", (1, place), (40, 0), **where, **OFFSET)
    if reference:
        draw_reference(ax, reference, "vertical")
    name_rows(ax, labels, look, [row.mark for row in rows])
    ax.set_xlabel(unit)
    ticks(ax.xaxis, 5)
    ax.margins(x=0.06)
    return panel


def reference_in_view(rows: Sequence[Entry], value: float) -> bool:
    """Whether a reference can be drawn without flattening what it refers to."""
    ends = [end for row in rows for end in (row.interval or (row.value,))]
    low, high = min(ends), max(ends)
    return max(high, value) - min(low, value) <= 2.5 * max(high - low, 1e-9)


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
    alone = len(cells) == 1
    small = SMALL_WIDTH, SMALL_HEIGHT
    panel = Panel(name, title, canvas(*small) if alone else tall(len(cells)))
    right = 12 if alone else margin([cell.label for cell in cells]) + 8
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


class Point(NamedTuple):
    x: float
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, x: float, value: float, interval: Sequence[float] | None) -> "Point":
        low, high = interval or (value, value)
        return cls(x, value, low, high)


def ranges(
    name: str,
    title: str,
    series: Mapping[str, Sequence[Point]],
    look: Looks,
    x: str,
    y: str,
    written: Callable[[float], str],
    apart: float = 1.0,
) -> Panel:
    """A curve with its intervals for each name over a logarithmic axis, of which only the places of points are
    named. x, y: what the axes say. written: numbers of x. apart: the factor in x between curves, so that their
    intervals stand side by side."""
    panel = Panel(name, title, tall(len(series)))
    ax = axes(panel, 52, margin(list(series)) + 8)
    ends, apart = {}, min(apart, MOST_APART ** (1 / max(len(series), 1)))
    for shift, (label, points) in enumerate(series.items()):
        xs = [p.x * apart ** (shift - len(series) / 2) for p in points]
        ys = [p.value for p in points]
        reach = [(max(0.0, p.value - p.low), max(0.0, p.high - p.value)) for p in points]
        values = ", ".join(f"{p.value:.3f} at {written(p.x)}" for p in points)
        intervals = tuple(zip(*reach, strict=True))
        ax.errorbar(xs, ys, intervals, fmt="none", ecolor=look[label].colour, alpha=0.45)
        draw_curve(ax, panel, label, xs, ys, look, f"{values} ({y})")
        ends[label] = xs[-1], ys[-1]
    low, high = ax.get_ylim()
    if low < 0 < high:
        ax.axhline(0, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
    ax.set_xscale("log")
    ax.set(xlabel=x, ylabel=y)
    places = sorted({p.x for points in series.values() for p in points})
    ax.xaxis.set_major_locator(FixedLocator(thinned(places)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    name_ends(ax, ends, look)
    return panel


def quality(
    name: str,
    title: str,
    cells: Sequence[MergedCell],
    look: Looks,
    size: Callable[[MergedCell], float | None],
    says: str,
    written: Callable[[float], str],
    least: int = 1,
) -> list[Panel]:
    """Held-out bits per byte against a size of each cell, one curve a name that has `least` points; no panel where
    none has. says, written: as `ranges` has x."""
    series: dict[str, list[tuple[float, MergedCell]]] = {}
    for cell in cells:
        if cell.bits_per_byte is not None and (x := size(cell)) is not None:
            series.setdefault(cell.name, []).append((x, cell))
    points, own = {}, {}
    for label, found in series.items():
        if len(found) >= least:
            found.sort(key=lambda pair: pair[0])
            own[label] = look[found[0][1].label]
            points[label] = [Point.of(x, value_of(c), c.heldout.interval()) for x, c in found]
    if not points:
        return []
    return [ranges(name, title, points, own, says, "held-out bits per byte", written)]


def lines(
    name: str,
    title: str,
    series: Mapping[str, Sequence[Point]],
    look: Looks,
    x: str,
    y: str,
    reference: Reference = None,
    logarithmic: bool = False,
    thin: Mapping[str, Sequence[Points]] | None = None,
) -> Panel:
    """A line with its interval for each name that has points. x, y: what the axes say. logarithmic: the y axis, within
    the values; intervals end at the frame. thin: further curves of a name, e.g. of its seeds."""
    panel = Panel(name, title, tall(len(series)))
    series = {label: points for label, points in series.items() if points}
    ax = axes(panel, 50, margin(list(series)) + 8)
    ends = {}
    for label, points in series.items():
        xs, ys, low, high = map(list, zip(*points, strict=True))
        ax.fill_between(xs, low, high, color=look[label].colour, alpha=0.15, linewidth=0)
        draw_curve(ax, panel, label, xs, ys, look, f"{ys[-1]:.3g} at the end")
        ends[label] = xs[-1], ys[-1]
    more = [(label, curve) for label, curves in (thin or {}).items() for curve in curves]
    for label, curve in more:
        ax.plot(*zip(*curve, strict=True), color=look[label].colour, linewidth=0.8, alpha=0.7)
    values = [p.value for points in series.values() for p in points]
    values += [y for _, curve in more for _, y in curve]
    if logarithmic and values:
        ax.set_yscale("log")
        ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ticks(ax.yaxis, 6)
    ax.set(xlabel=x, ylabel=y)
    ticks(ax.xaxis, 8, whole=True)
    if reference:
        draw_reference(ax, reference, "horizontal")
    name_ends(ax, ends, look)
    return panel
