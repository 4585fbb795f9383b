"""Lines with intervals against depth, length or turn: the plots of probes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from megaarch.report.plots import (
    HEIGHT,
    WIDTH,
    Looks,
    Reference,
    axes,
    draw_reference,
    margin,
    name_ends,
    ticks,
)
from megaarch.report.style import Panel, canvas


class Point(NamedTuple):
    x: float
    value: float
    low: float
    high: float


def lines(
    name: str,
    title: str,
    series: Mapping[str, Sequence[Point]],
    look: Looks,
    x: str,
    y: str,
    reference: Reference = None,
) -> Panel:
    """A line with its interval for each name. x, y: what the axes say."""
    panel = Panel(name, title, canvas(WIDTH, HEIGHT))
    ax = axes(panel, 50, margin(list(series)) + 8)
    ends = {}
    for label, points in series.items():
        style = look[label]
        places = [p.x for p in points]
        ax.fill_between(
            places,
            [p.low for p in points],
            [p.high for p in points],
            color=style.colour,
            alpha=0.15,
            linewidth=0,
        )
        last = points[-1]
        ax.plot(
            places,
            [p.value for p in points],
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            gid=panel.gid(label, f"{label}: {last.value:.3g} at the end"),
        )
        ends[label] = last.x, last.value
    ticks(ax.yaxis, 6)
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if reference:
        draw_reference(ax, reference, "horizontal")
    name_ends(ax, ends, look)
    return panel
