"""The kinds of plot a report has: curves, dots with intervals, bars, losses, sizes.

Each function draws one panel. Curves carry their names at their ends; there are no legends.
"""

import math
from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megaarch.report import notation
from megaarch.report.cells import bits, inherited, interval_of
from megaarch.report.notation import finite
from megaarch.report.style import LIGHT, Look, Panel, canvas

WIDTH, HEIGHT = 390, 270  # points
SMALL_WIDTH, SMALL_HEIGHT = 230, 165
LETTER = 5.3  # points, about the width of one letter
LINE_GAP = 12.0  # points between names at the ends of curves
FEW_POINTS = 4  # a curve of no more points is shown whole
TICK_STEPS = [1, 2, 2.5, 5, 10]

Looks = dict[str, Look]
Entry = tuple[str, float, list[float] | None, str]  # label, value, interval, mark
Reference = tuple[str, float] | None


def axes(panel: Panel, left: float, right: float, bottom: float = 36, top: float = 10) -> Axes:
    """Axes with margins in points."""
    width, height = panel.figure.get_size_inches() * 72
    return panel.figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - bottom - top) / height,
        )
    )


def shown(label: str) -> str:
    """A label that fits a margin and begins no mathematics."""
    label = label if len(label) <= 26 else label[:14] + "…" + label[-11:]
    return label.replace("$", r"\$")


def margin(labels: list[str]) -> float:
    return LETTER * max(len(shown(label)) for label in labels) + 14


def x_scale(kind: str, largest: float) -> tuple[float, str]:
    """(divisor, axis label) for an axis of FLOPs or of seconds."""
    if kind == "flops":
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        return 10.0**exponent, f"useful training compute ({notation.ten(exponent)} FLOPs)"
    for seconds, unit in ((2 * 3600, "hours"), (120, "minutes")):
        if largest >= seconds:
            return seconds / 2, f"training time ({unit})"
    return 1.0, "training time (seconds)"


def points_of(cell: dict, list_name: str, x: str, y: str) -> list[tuple[float, float]]:
    """Points of a curve; its FLOPs begin with those of the weights that the cell starts from."""
    before = inherited(cell) if x == "flops" else 0.0
    pairs = [(finite(point.get(x)), finite(point.get(y))) for point in cell[list_name]]
    return [(before + a, b) for a, b in pairs if a is not None and b is not None]


def curves(
    name: str, title: str, cells: list[dict], look: Looks, x: str, reference: Reference
) -> Panel:
    """Held-out bits per byte against `x`: "flops" or "seconds"."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 44, margin([cell["label"] for cell in cells]) + 8)
    series = {cell["label"]: points_of(cell, "curve", x, "heldout") for cell in cells}
    series = {label: points for label, points in series.items() if points}
    largest = max((a for points in series.values() for a, _ in points), default=1)
    divisor, x_label = x_scale(x, largest)
    for label, points in series.items():
        style = look[label]
        says = f"{label}: {points[-1][1]:.3f} bits per byte at the end"
        xs, ys = [a / divisor for a, _ in points], [b for _, b in points]
        ax.plot(
            xs,
            ys,
            color=style.colour,
            linestyle=style.dash,
            gid=panel.gid(label, says),
            marker=style.marker,
        )
    low, high, start = vertical_range(list(series.values()), reference)
    ax.set(xlabel=x_label, ylabel="held-out bits per byte")
    ax.set(ylim=(low, high), xlim=(-0.02 * largest / divisor, 1.01 * largest / divisor))
    tidy(ax)
    if reference and low < reference[1] < high:
        horizontal_reference(ax, reference)
    if start is not None:
        panel.caption = f"Before training, above the frame: {start:.2f} or less."
    ends = {label: (points[-1][0] / divisor, points[-1][1]) for label, points in series.items()}
    name_ends(ax, ends, {label: look[label].colour for label in ends})
    return panel


def vertical_range(
    series: list[list[tuple[float, float]]], reference: Reference
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


def tidy(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))


def horizontal_reference(ax: Axes, reference: tuple[str, float]) -> None:
    name, value = reference
    ax.axhline(value, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
    ax.annotate(
        f"{name} {value:.2f}",
        (1, value),
        (-2, 3),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        fontsize=8.5,
        color=LIGHT["muted"],
    )


def name_ends(ax: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str]) -> None:
    """The names of the curves in the right margin, none on another, tied to their ends."""
    _, _, _, height = ax.get_position().bounds
    points = height * ax.figure.get_size_inches()[1] * 72
    low, high = ax.get_ylim()
    labels = sorted(ends, key=lambda label: ends[label][1])
    wanted = [(ends[label][1] - low) / (high - low) * points for label in labels]
    for label, place in zip(labels, spread(wanted, LINE_GAP), strict=True):
        arrow = {
            "arrowstyle": "-",
            "color": colours[label],
            "linewidth": 0.6,
            "shrinkA": 1,
            "shrinkB": 3,
            "alpha": 0.6,
        }
        ax.annotate(
            shown(label),
            ends[label],
            (1.045, place / points),
            textcoords="axes fraction",
            va="center",
            color=colours[label],
            arrowprops=arrow,
        )


def spread(wanted: list[float], gap: float) -> list[float]:
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
    rows: list[Entry],
    look: Looks,
    unit: str,
    reference: Reference,
    always: bool = False,
) -> Panel:
    """A dot and its interval for each row, first row on top. The reference is drawn where it is
    near, or `always`."""
    panel = Panel(name, title, canvas(WIDTH, max(150, 58 + 24 * len(rows))))
    labels = [label for label, *_ in rows]
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
        ax.annotate(
            f"{value:.3f}",
            (1, place),
            (40, 0),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            va="center",
        )
    if reference and (always or reference_in_view(rows, reference[1])):
        vertical_reference(ax, reference)
    name_rows(ax, labels, look, {label: mark for label, *_, mark in rows})
    ax.set_xlabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    ax.margins(x=0.06)
    return panel


def reference_in_view(rows: list[Entry], value: float) -> bool:
    """Whether a reference can be drawn without flattening what it refers to."""
    ends = [end for _, middle, interval, _ in rows for end in (interval or (middle, middle))]
    low, high = min(ends), max(ends)
    return max(high, value) - min(low, value) <= 2.5 * max(high - low, 1e-9)


def vertical_reference(ax: Axes, reference: tuple[str, float]) -> None:
    name, value = reference
    ax.axvline(value, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
    ax.annotate(
        f"{name} {value:.2f}",
        (value, 1),
        (0, 4),
        ("data", "axes fraction"),
        "offset points",
        ha="center",
        fontsize=8.5,
        color=LIGHT["muted"],
    )


def name_rows(
    ax: Axes, labels: list[str], look: Looks, marks: Mapping[str, str] | None = None
) -> None:
    names = [f"{shown(label)} {(marks or {}).get(label, '')}".rstrip() for label in labels]
    ax.set_yticks(range(len(labels)), names)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    for tick, label in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_color(look[label].colour)


def bars(
    name: str, title: str, rows: list[tuple[str, str, float | None]], look: Looks, unit: str
) -> Panel:
    """A bar from zero for each (label, mask kind, value), first row on top."""
    panel = Panel(name, title, canvas(WIDTH, max(150, 48 + 27 * len(rows))))
    ax = axes(panel, margin([label for label, *_ in rows]), 52)
    for place, (label, kind, value) in enumerate(rows):
        says = f"{label}: {value or 0:,.4g} {unit}"
        [bar] = ax.barh([place], [value or 0], height=0.34, color=look[label].colour)
        bar.set_gid(panel.gid(label, says))
        text = notation.MISSING if value is None else notation.three_digits(value)
        ax.annotate(text, (value or 0, place), (5, 0), textcoords="offset points", va="center")
        ax.annotate(
            kind,
            (0, place),
            (1, 7),
            textcoords="offset points",
            va="bottom",
            fontsize=7.5,
            color=LIGHT["muted"],
        )
    name_rows(ax, [label for label, *_ in rows], look)
    ax.set_xlabel(unit)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    return panel


def losses(name: str, title: str, cells: list[dict], look: Looks) -> Panel:
    """Training loss of the cells of one objective, with its running mean."""
    panel = Panel(name, title, canvas(SMALL_WIDTH, SMALL_HEIGHT))
    labels = [cell["label"] for cell in cells]
    ax = axes(panel, 32, 12 if len(cells) == 1 else margin(labels) + 4, bottom=34, top=6)
    series = {cell["label"]: points_of(cell, "losses", "flops", "loss") for cell in cells}
    series = {label: points for label, points in series.items() if points}
    largest = max((a for points in series.values() for a, _ in points), default=1)
    divisor, _ = x_scale("flops", largest)
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
    exponent = round(math.log10(divisor))
    ax.set_xlabel(f"compute ({notation.ten(exponent)} FLOPs)", fontsize=8.5)
    ax.set_ylabel("nats per target", fontsize=8.5)
    ax.tick_params(labelsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    if len(series) > 1:
        ends = {label: (points[-1][0] / divisor, points[-1][1]) for label, points in series.items()}
        name_ends(ax, ends, {label: look[label].colour for label in ends})
    return panel


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and its neighbours, a twentieth of the run in all."""
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def sizes(name: str, title: str, series: dict[str, list[dict]], look: Looks) -> Panel:
    """Held-out bits per byte against parameters, one curve a name, at one budget."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 44, margin(list(series)) + 8)
    ends, colours, ticks = {}, {}, set()
    for label, cells in series.items():
        cells = sorted(cells, key=lambda cell: cell["parameters"])
        xs, ys = [cell["parameters"] for cell in cells], [bits(cell) for cell in cells]
        style = look[cells[0]["label"]]
        says = "; ".join(f"{cell['label']}: {bits(cell):.3f} bits per byte" for cell in cells)
        ax.errorbar(xs, ys, half_intervals(cells), fmt="none", ecolor=style.colour, alpha=0.45)
        ax.plot(xs, ys, color=style.colour, marker=style.marker, gid=panel.gid(label, says))
        ends[label], colours[label] = (xs[-1], ys[-1]), style.colour
        ticks.update(xs)
    ax.set_xscale("log")
    ax.set(xlabel="parameters", ylabel="held-out bits per byte")
    ax.xaxis.set_major_locator(FixedLocator(thinned(sorted(ticks))))
    ax.xaxis.set_minor_locator(NullLocator())
    counted: Callable = lambda value, _: notation.count(value)  # noqa: E731
    ax.xaxis.set_major_formatter(FuncFormatter(counted))
    name_ends(ax, ends, colours)
    return panel


def thinned(ticks: list[float]) -> list[float]:
    """Ticks at least a factor of 1.35 apart, so that their labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.35 * kept[-1]:
            kept.append(tick)
    return kept


def half_intervals(cells: list[dict]) -> list[list[float]]:
    ends = [interval_of(cell) or [bits(cell)] * 2 for cell in cells]
    values = [bits(cell) for cell in cells]
    low = [max(0.0, value - end[0]) for value, end in zip(values, ends, strict=True)]
    high = [max(0.0, end[1] - value) for value, end in zip(values, ends, strict=True)]
    return [low, high]
