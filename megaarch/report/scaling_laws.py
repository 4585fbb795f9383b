"""Scaling laws of a study in its report: a figure, a table and who is better at which budget."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megaarch.errors import UserError
from megaarch.report import notation
from megaarch.report.axes import Looks, axes, budget_ticks, margin, name_ends, tall
from megaarch.report.merged_cells import MergedCell
from megaarch.report.style import Panel
from megaarch.scaling import display, points
from megaarch.scaling.crossing import comparisons
from megaarch.scaling.law import Fit, fit
from megaarch.study.results import Results

STEPS = 60  # budgets at which a law is drawn


def fits(results: Results) -> dict[str, Fit]:
    """Maps the name of each cell whose points decide a law to the law."""
    try:
        found = points.runs_of_study(results)
    except UserError:
        return {}
    made = {name: _fit(name, runs) for name, runs in found.items()}
    return {name: one for name, one in made.items() if one is not None}


@lru_cache(maxsize=64)
def _fit(name: str, runs: tuple[points.Run, ...]) -> Fit | None:
    try:
        return fit(points.of(name, runs))  # as `megaarch fit` does
    except UserError:
        return None


def panels(results: Results, cells: Sequence[MergedCell], looks: Looks) -> list[Panel]:
    """The loss of each architecture at its best size against the budget, with its 95% band and points."""
    found = fits(results)
    if not found:
        return []
    look = {name: looks[next(c.label for c in cells if c.name == name)] for name in found}
    panel = Panel("laws", "Each at its best size, by its law", tall(len(found)))
    ax = axes(panel, 44, margin(list(found)) + 8)
    ends = {}
    for name, one in found.items():
        style, flops = look[name], one.points.flops
        budgets = np.geomspace(flops.min(), flops.max(), STEPS)
        loss = one.law.best_loss(budgets)
        band = [
            one.interval(value, one.resamples.best_loss(budget))
            for value, budget in zip(loss, budgets, strict=True)
        ]
        low, high = np.array(band).T
        ax.fill_between(budgets, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ax.plot(
            flops, one.points.loss, linestyle="", marker=style.marker, color=style.colour, alpha=0.5
        )
        says = f"{name}: {loss[-1]:.3f} bits per byte at {notation.power(budgets[-1])} FLOPs"
        ax.plot(budgets, loss, color=style.colour, linestyle=style.dash, gid=panel.gid(name, says))
        ends[name] = float(budgets[-1]), float(loss[-1])
    ax.set(xlabel="training FLOPs", ylabel="held-out bits per byte")
    budget_ticks(ax, [budget for one in found.values() for budget in one.points.flops.tolist()])
    name_ends(ax, ends, look)
    panel.caption = (
        "Points are runs of all sizes, each of one schedule; a band is the law's 95% interval."
    )
    if not display.caveats(found):
        panel.caption += " Bands of laws that differ may overlap: hard documents are hard for each."
    return [panel]


def table(results: Results, looks: Looks, cells: Sequence[MergedCell]) -> dict[str, Any] | None:
    """Rows of each law with its intervals, and a sentence for each two; None without a law."""
    found = fits(results)
    if not found:
        return None
    colours = {c.name: looks[c.label].variable for c in reversed(cells)}
    pairs, shown = comparisons(found), notation.power
    return {
        "rows": [_row(name, one, colours[name]) for name, one in found.items()],
        "sentences": [
            *(display.sentence(pair, shown) for pair in pairs),
            *display.notes(found, pairs, shown, notation.count),
        ],
        "caveats": display.caveats(found),
    }


def _row(name: str, one: Fit, colour: str) -> dict[str, Any]:
    digits = notation.three_digits
    numbers = [
        (digits(getattr(one.law, key)), f"{digits(low)} to {digits(high)}")
        for key, (low, high) in one.intervals().items()
    ]
    largest = one.points.flops.max()
    best, again = one.law.allocation(largest)[0], one.resamples.allocation(largest)[0]
    low, high = one.interval(best, again)
    numbers.append((notation.count(best), f"{notation.count(low)} to {notation.count(high)}"))
    return {"name": name, "colour": colour, "points": len(one.points), "numbers": numbers}
