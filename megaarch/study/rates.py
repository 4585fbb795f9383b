"""Learning rates by sweep: the same rates and trial budget for every cell, counted apart."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from megaarch.config.fingerprint import changed_settings, fingerprint
from megaarch.config.schema import Data, Study
from megaarch.errors import UserError
from megaarch.files import Schema, fit, read_json
from megaarch.study import cell as cells
from megaarch.study import lanes
from megaarch.study.cell import Trial
from megaarch.study.display import Board
from megaarch.study.environment import command, environment
from megaarch.study.grid import GridCell, rate_key, title

Trials = list[dict[str, Any]]
FREE = ("training.learning_rate", "training.budget", "training.seed")  # what a trial need not share


def trials(grid: list[GridCell], study: Study) -> list[tuple[GridCell, float]]:
    """The sweep's trials: each cell of the first seed at each rate."""
    first = [cell for cell in grid if cell.seed == study.seeds[0]]
    return [(cell, rate) for cell in first for rate in study.tune.learning_rates]


def finished(grid: list[GridCell], study: Study, base: Data) -> Trials:
    """What the trials that are done have found."""
    share, evaluation = study.tune.budget, study.evaluation
    found = [
        cells.finished_trial(cell, rate, share, lanes.text_of(cell, base), evaluation)
        for cell, rate in trials(grid, study)
    ]
    return [trial for trial in found if trial]


def sweep(grid: list[GridCell], study: Study, base: Data, board: Board) -> Trials:
    """Runs the trials of these cells."""
    todo = [
        lanes.Job(f"{title(cell, study)} {rate:.3g}", cell, study, base, rate)
        for cell, rate in trials(grid, study)
    ]
    found = {(job.cell.key, job.rate): trial for job, trial in lanes.run(todo, study.lanes, board)}
    return [found[job.cell.key, job.rate] for job in todo]


def best(trials: Trials) -> dict[str, float]:
    """The rate of the lowest held-out value: of each cell by its `rate_key`, and by its name
    alone, as a mean over sizes and budgets, for cells that the sweep did not hold. None of its own
    where every rate diverged: the configuration's stays."""
    chosen = {}
    for field in ("cell", "rate_key"):
        for name in dict.fromkeys(trial[field] for trial in trials):
            values: dict[float, list[float]] = {}
            for trial in trials:
                if trial[field] == name:
                    value = trial["heldout"]
                    diverged = value is None or not np.isfinite(value)
                    values.setdefault(trial["learning_rate"], []).append(
                        np.inf if diverged else value
                    )
            means = {rate: np.mean(found) for rate, found in values.items()}
            if np.isfinite(min(means.values())):
                chosen[name] = min(means, key=means.get)
    return chosen


def record(trials: Trials, grid: list[GridCell], study: Study) -> dict[str, Any]:
    """What a sweep leaves behind as rates.json, for `study.rates` of other configurations."""
    return {
        "grid": sorted(study.tune.learning_rates),
        "trial_budget_share": study.tune.budget,
        "command": command(),
        "best": best(trials),
        "trials": trials,
        "settings": {
            key: shared_settings(cell) for cell in grid for key in (cell.name, rate_key(cell))
        },
        **environment(),
    }


class _Sweep(Schema):
    best: dict[str, float]
    settings: dict[str, dict[str, Any]]
    grid: Annotated[list[float], Field(min_length=1)]
    trials: list[Trial]


def read(path: str) -> dict[str, Any]:
    """A sweep's file. ValueError where it cannot be used."""
    try:
        found = read_json(path)
        fit(found, _Sweep, path)
    except OSError as error:
        raise UserError(f"study.rates: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"study.rates: {path} is not the rates.json of a sweep: {error}") from None
    return found


def shared_settings(cell: GridCell) -> dict[str, Any]:
    """The settings that a trial and the cell that takes its rate must share."""
    return {k: v for k, v in fingerprint(cell.settings).items() if not k.startswith(FREE)}


def verdict(cell: GridCell, rate: float, found: dict[str, Any] | None) -> dict[str, Any]:
    """Whether `rate` is a sweep's choice for this cell, lies at the edge of its grid, and the FLOPs
    of the trials that chose it."""
    if found is None:
        return {"tuned": False, "learning_rate_at_edge": False, "trial_flops": None}

    def of_cell(table: dict[str, Any]) -> Any:
        return table.get(rate_key(cell), table.get(cell.name))

    swept = of_cell(found["settings"])
    alike = swept is not None and not changed_settings(swept, shared_settings(cell))
    tuned = alike and of_cell(found["best"]) == rate
    edges = (found["grid"][0], found["grid"][-1])
    return {
        "tuned": tuned,
        "learning_rate_at_edge": tuned and rate in edges,
        "trial_flops": _trial_flops(cell, found["trials"]) if tuned else None,
    }


def _trial_flops(cell: GridCell, trials: Trials) -> float | None:
    for field, name in (("rate_key", rate_key(cell)), ("cell", cell.name)):
        own = [trial["flops"] for trial in trials if trial[field] == name]
        if own:
            return float(np.median(own))
    return None
