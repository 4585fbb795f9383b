"""Learning rates by sweep: the same rates and trial budget for every cell, counted apart."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from megaarch.config.fingerprint import changed_settings, fingerprint
from megaarch.config.schema import Study, Tune
from megaarch.files import write_json
from megaarch.study import workers
from megaarch.study.cells import StudyCell
from megaarch.study.display import ProgressDisplay
from megaarch.study.environment import command, machine
from megaarch.study.folder import StudyFolder, finished_trial, trial_cell
from megaarch.study.results import Sweep, Trial

FREE = ("training.learning_rate", "training.budget", "training.seed")  # what a trial need not share
Entry = TypeVar("Entry")


def trials(cells: list[StudyCell], study: Study) -> list[tuple[StudyCell, float]]:
    """The sweep's trials: each cell of the first seed at each rate; none where nothing is swept."""
    if study.tune is None:
        return []
    first = [cell for cell in cells if cell.seed == study.seeds[0]]
    return [(cell, rate) for cell in first for rate in study.tune.learning_rates]


def finished(folder: StudyFolder, cells: list[StudyCell]) -> list[Trial]:
    """Returns what the finished trials of these cells found."""
    share, evaluation = folder.tune.budget, folder.study.evaluation
    found = [
        finished_trial(trial_cell(cell, rate, share), folder.text_of(cell), evaluation)
        for cell, rate in trials(cells, folder.study)
    ]
    return [trial for trial in found if trial]


def run(folder: StudyFolder, cells: list[StudyCell], display: ProgressDisplay) -> list[Trial]:
    """Runs the trials of these cells."""
    todo = [workers.Job(folder, cell, rate) for cell, rate in trials(cells, folder.study)]
    ended = workers.run(todo, folder.study.lanes, display)
    found = {(job.cell.key, job.rate): record.trial for job, record in ended if record.trial}
    return [found[job.cell.key, job.rate] for job in todo]


def best(trials: list[Trial]) -> dict[str, float]:
    """The rate of the lowest held-out value: of each cell by its `rate_key`, and by its name
    alone, as a mean over sizes and budgets, for cells that the sweep did not hold. A cell whose every
    rate diverged has none: the configuration's stays."""
    chosen = {}
    for field in ("cell", "rate_key"):
        values: dict[str, dict[float, list[float]]] = {}
        for trial in trials:
            value = np.inf if trial.heldout is None else trial.heldout
            of_name = values.setdefault(getattr(trial, field), {})
            of_name.setdefault(trial.learning_rate, []).append(value)
        for name, of_name in values.items():
            means = {rate: float(np.mean(found)) for rate, found in of_name.items()}
            lowest = min(means, key=lambda rate: means[rate])
            if np.isfinite(means[lowest]):
                chosen[name] = lowest
    return chosen


def record(trials: list[Trial], cells: list[StudyCell], tune: Tune) -> Sweep:
    """The record of a sweep, for `study.rates` of other configurations."""
    return Sweep(
        grid=sorted(tune.learning_rates),
        trial_budget_share=tune.budget,
        command=command(),
        best=best(trials),
        trials=trials,
        settings={
            key: shared_settings(cell) for cell in cells for key in (cell.name, cell.rate_key)
        },
        **dict(machine()),
    )


def choose(folder: StudyFolder, trials: list[Trial]) -> StudyFolder:
    """Writes rates.json and returns the study with the rates that these trials chose."""
    found = record(trials, folder.cells, folder.tune)
    folder.directory.mkdir(parents=True, exist_ok=True)
    write_json(folder.directory / "rates.json", found.as_json())
    return folder.with_rates(found)


def chosen(folder: StudyFolder) -> StudyFolder:
    """Returns a study that has run, with the rates that its finished trials chose."""
    return choose(folder, finished(folder, folder.cells)) if folder.study.tune else folder


def shared_settings(cell: StudyCell) -> dict[str, Any]:
    """The settings that a trial and the cell that takes its rate must share."""
    return {k: v for k, v in fingerprint(cell.settings).items() if not k.startswith(FREE)}


def verdict(cell: StudyCell, rate: float | None, sweep: Sweep | None) -> dict[str, Any]:
    """Whether `rate` is a sweep's choice for this cell, lies at the edge of its grid, and the FLOPs
    of the trials that chose it: three fields of a CellResult."""
    if sweep is None:
        return {"tuned": False, "learning_rate_at_edge": False, "trial_flops": None}

    def of_cell(table: Mapping[Any, Entry]) -> Entry | None:
        return table.get(cell.rate_key, table.get(cell.name))

    swept = of_cell(sweep.settings)
    alike = swept is not None and not changed_settings(swept, shared_settings(cell))
    tuned = alike and of_cell(sweep.best) == rate
    flops: dict[str | None, list[float]] = {}
    for trial in sweep.trials:
        for name in (trial.rate_key, trial.cell):
            flops.setdefault(name, []).append(trial.flops)
    spent = of_cell(flops)
    return {
        "tuned": tuned,
        "learning_rate_at_edge": tuned and rate in (sweep.grid[0], sweep.grid[-1]),
        "trial_flops": float(np.median(spent)) if tuned and spent else None,
    }
