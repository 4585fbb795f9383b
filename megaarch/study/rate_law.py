"""Learning rates of cells that no sweep held: a power law through the best rates of the smaller ones that one held.

    log rate = constant + a log(parameters without embeddings) + b log(budget)

Fitted to each cell name by itself, so that no architecture is trained at the rate of another. The form is that of
Li et al. 2025 ("Step Law", arXiv:2503.04715: parameters and tokens); of sizes whose budgets grow with them it is the
power law in compute of Bi et al. 2024 (DeepSeek LLM, section 3.1).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from megaarch.config import catalogue
from megaarch.model.parameter_count import non_embedding_parameter_count
from megaarch.study.cells import StudyCell
from megaarch.study.results import RateLaw, Sweep, Trial
from megaarch.study.sweep_grid import RATE, Choice

# A direction in which the swept places differ less than this share of how they differ most is not fitted: its
# exponent would be that of the trials' noise.
FLAT = 0.2
LEAST_RANGE = math.log(1.5)  # of sizes or budgets that have an exponent
FEWEST = 3  # places


class Place(NamedTuple):
    """Where trials of one cell stand, with the best rate there. budget: of a trial, in the study's unit."""

    rate_key: str | None
    parameters: float
    budget: float
    rate: float


def best_rate(trials: Sequence[Trial]) -> float | None:
    """Returns the best rate of trials that differ in nothing else: the lowest point of the parabola in log rate through
    the lowest value and its neighbours. None where the lowest is the first or the last that was tried, for the best
    one may lie beyond. A trial that diverged has lost."""
    tried = sorted(trials, key=lambda trial: trial.learning_rate)
    values = [math.inf if trial.heldout is None else trial.heldout for trial in tried]
    lowest = min(range(len(tried)), key=lambda i: values[i], default=0)
    if not 0 < lowest < len(tried) - 1:
        return None
    below, at, above = values[lowest - 1 : lowest + 2]
    x = [math.log(trial.learning_rate) for trial in tried[lowest - 1 : lowest + 2]]
    if math.isinf(below) or math.isinf(above):
        return tried[lowest].learning_rate
    left, right = (at - below) / (x[1] - x[0]), (above - at) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature == 0:
        return tried[lowest].learning_rate
    return math.exp((x[0] + x[1]) / 2 - left / (2 * curvature))


def places(trials: Iterable[Trial]) -> list[Place]:
    """Returns where the trials of one cell name stand; not those whose best rate is not enclosed."""
    groups: dict[tuple[str | None, float], list[Trial]] = {}
    for trial in trials:
        if trial.parameters and trial.budget:
            groups.setdefault((trial.rate_key, trial.budget), []).append(trial)
    found = []
    for (rate_key, budget), group in groups.items():
        values = [math.inf if trial.heldout is None else trial.heldout for trial in group]
        winner = group[values.index(min(values))]
        rate = best_rate([trial for trial in group if trial.more == winner.more])
        if rate is not None:
            # divisions of an encoder-decoder's layers differ a little in their parameters
            found.append(Place(rate_key, winner.parameters or 0.0, budget, rate))
    return found


def fit(trials: Iterable[Trial]) -> RateLaw | None:
    """Returns the law of one cell name's trials; None where fewer than FEWEST places have an enclosed best rate, or so
    few that their law goes through all of them."""
    found = places(trials)
    if len(found) < FEWEST:
        return None
    x = np.log([[place.parameters, place.budget] for place in found])
    y = np.log([place.rate for place in found])
    centred = np.where(np.ptp(x, axis=0) > LEAST_RANGE, x - x.mean(0), 0.0)
    slopes, _, rank, _ = np.linalg.lstsq(centred, y - y.mean(), rcond=FLAT)
    errors, free = y - y.mean() - centred @ slopes, len(found) - 1 - int(rank)
    if not free:
        return None
    return RateLaw(
        places=len(found),
        scatter=float(np.exp(np.sqrt(errors @ errors / free))),
        constant=float(y.mean() - x.mean(0) @ slopes),
        parameters=float(slopes[0]),
        budget=float(slopes[1]),
        largest=max(place.parameters for place in found),
        largest_place=max(found, key=lambda place: (place.parameters, place.budget)).rate_key,
    )


def laws(trials: Iterable[Trial]) -> dict[str, RateLaw]:
    """Returns the law of each cell name that has one."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.cell, []).append(trial)
    found = {name: fit(group) for name, group in groups.items()}
    return {name: law for name, law in found.items() if law}


def law_of(cell: StudyCell, sweep: Sweep) -> RateLaw | None:
    """Returns the law that gives a cell its rate; None where the sweep held the cell (though all its trials
    diverged), has no law for it, or counts budgets in another unit."""
    held = any(trial.rate_key == cell.rate_key for trial in sweep.trials)
    if held or sweep.match != cell.training_budget.match:
        return None
    return sweep.laws.get(cell.name)


def rate_of(cell: StudyCell, law: RateLaw) -> float:
    """Returns the rate that a law gives a cell, to three digits."""
    parameters, budget = place_of(cell)
    log = law.constant + law.parameters * math.log(parameters) + law.budget * math.log(budget)
    return float(f"{math.exp(log):.3g}")


def place_of(cell: StudyCell) -> tuple[int, float]:
    """Returns a cell's parameters without embeddings, and its budget."""
    axes = catalogue.position_axes(cell.settings.data.objective)
    parameters = non_embedding_parameter_count(cell.settings.model, axes)
    return parameters, cell.training_budget.amount


def choices(sweep: Sweep, cells: Iterable[StudyCell]) -> dict[str, Choice]:
    """Returns what the laws choose, by rate key, for the cells that have one; all but the rate is as at the largest
    place that was swept."""
    found: dict[str, Choice] = {}
    for cell in cells:
        if law := law_of(cell, sweep):
            more = sweep.more.get(law.largest_place or "", {})
            found[cell.rate_key] = {RATE: rate_of(cell, law), **more}
    return found
