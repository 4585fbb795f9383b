"""Learning rates by sweep: the same rates and trial budget for every cell, counted apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megaarch.settings import Data, Study
from megaarch.signature import signature
from megaarch.study import lanes
from megaarch.study.display import Board
from megaarch.study.environment import command, environment
from megaarch.study.grid import GridCell, rate_key, title

Trials = list[dict[str, Any]]
FREE = ("training.learning_rate", "training.budget", "training.seed")  # what a trial need not share


def sweep(grid: list[GridCell], study: Study, base: Data, board: Board) -> Trials:
    """One trial for each cell of the first seed and each rate."""
    todo = [
        lanes.Job(f"{title(cell, study)} {rate:.3g}", cell, study, base, rate)
        for cell in grid
        if cell.seed == study.seeds[0]
        for rate in study.tune.learning_rates
    ]
    found = {(job.cell.key, job.rate): trial for job, trial in lanes.run(todo, study.lanes, board)}
    return [found[job.cell.key, job.rate] for job in todo]


def best(trials: Trials) -> dict[str, float]:
    """The rate of the lowest held-out value: of each cell by its `rate_key`, and by its name
    alone, as a mean over sizes and budgets, for cells that the sweep did not hold."""
    chosen = {}
    for field in ("cell", "rate_key"):
        for name in dict.fromkeys(trial[field] for trial in trials):
            values: dict[float, list[float]] = {}
            for trial in trials:
                if trial[field] == name:
                    value = trial["heldout"]
                    values.setdefault(trial["learning_rate"], []).append(
                        np.inf if value is None else value
                    )
            chosen[name] = min(values, key=lambda rate: np.mean(values[rate]))
    return chosen


def record(trials: Trials, grid: list[GridCell], study: Study) -> dict[str, Any]:
    """What a sweep leaves behind as rates.json, for `study.rates` of other configurations."""
    return {
        "grid": sorted(study.tune.learning_rates),
        "trial_budget_share": study.tune.budget,
        "command": command(),
        "best": best(trials),
        "trials": trials,
        "settings": {cell.name: shared_settings(cell) for cell in grid},
        **environment(),
    }


def read(path: str) -> dict[str, Any]:
    """A sweep's file. ValueError where it cannot be used."""
    try:
        found = json.loads(Path(path).read_text())
        if not all(isinstance(found[key], dict) for key in ("best", "settings")):
            raise KeyError("best")
        sorted(found["grid"]), list(found["trials"])
    except OSError as error:
        raise ValueError(f"study.rates: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"study.rates: {path} is not the rates.json of a sweep") from None
    return found


def shared_settings(cell: GridCell) -> dict[str, Any]:
    """The settings that a trial and the cell that takes its rate must share."""
    return {k: v for k, v in signature(cell.settings).items() if not k.startswith(FREE)}


def verdict(cell: GridCell, rate: float, found: dict[str, Any] | None) -> dict[str, bool]:
    """Whether `rate` is a sweep's choice for this cell, and lies at the edge of its grid."""
    if found is None:
        return {"tuned": False, "learning_rate_at_edge": False}
    chosen = found["best"].get(rate_key(cell), found["best"].get(cell.name))
    tuned = chosen == rate and found["settings"].get(cell.name) == shared_settings(cell)
    edges = (found["grid"][0], found["grid"][-1])
    return {"tuned": tuned, "learning_rate_at_edge": tuned and rate in edges}
