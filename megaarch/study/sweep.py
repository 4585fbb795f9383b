"""Learning rates by sweep, and with them batches and depths: the same grid and trial budget for every cell
of an architecture, counted apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megaarch import config
from megaarch.config.fingerprint import changed_settings, fingerprint
from megaarch.config.schema import Size, Tune
from megaarch.files import write_json
from megaarch.study import rate_law, sweep_grid, workers
from megaarch.study.cells import StudyCell, expand, study_of
from megaarch.study.environment import command, machine
from megaarch.study.folder import StudyFolder
from megaarch.study.progress_bar import ProgressDisplay
from megaarch.study.results import Extrapolation, RateLaw, Sweep, Trial
from megaarch.study.sweep_grid import BATCH, DECIDES, RATE, Choice

FREE = ("training.learning_rate", "training.budget", "training.seed")  # what a trial need not share
# what may differ between a cell and the smaller ones whose law gives it a rate
OF_A_SIZE = {f"model.{name}" for name in Size.model_fields} | {
    *("model.encoder_layers", "model.decoder_layers", "model.kv_heads", "model.head_size")
}
Entry = TypeVar("Entry")
UNTUNED = {"tuned": False, "learning_rate_at_edge": False, "trial_flops": None}


def trials(raw: config.Raw, directory: Path, cells: list[StudyCell]) -> list[StudyCell]:
    """Returns the sweep's trials: each cell of the first seed with each choice that is tried on it (`StudyCell.tried`),
    whose settings it has; none where nothing is swept. ConfigError names a cell that cannot have a choice."""
    study = study_of(raw)
    if study.tune is None:
        return []
    wanted = [(cell, choice) for cell in cells for choice in cell.tried(study)]
    keys = {cell.rate_key for cell, _ in wanted}
    tried = {
        (sweep_grid.label(choice), cell.key): cell
        for choice in sweep_grid.distinct([choice for _, choice in wanted])
        for cell in expand(raw, directory, dict.fromkeys(keys, choice))
    }
    return [
        tried[sweep_grid.label(choice), cell.key].trial(choice, study.tune.budget)
        for cell, choice in wanted
    ]


def finished(folder: StudyFolder, cells: list[StudyCell]) -> list[Trial]:
    """Returns what the finished trials of these cells found."""
    found = map(folder.finished_trial, trials(folder.raw, folder.directory, cells))
    return [trial for trial in found if trial]


def run(folder: StudyFolder, cells: list[StudyCell], display: ProgressDisplay) -> list[Trial]:
    """Runs the trials of these cells."""
    todo = trials(folder.raw, folder.directory, cells)
    found = {tried.folder: record.trial for tried, record in workers.run(folder, todo, display)}
    return [trial for tried in todo if (trial := found[tried.folder])]


def best(trials: list[Trial]) -> dict[str, Choice]:
    """The choice of the lowest held-out value: of each cell by its `rate_key`, and by its name
    alone, as a mean over sizes and budgets, for cells that the sweep did not hold and that have no law
    (study/rate_law.py). A cell whose every trial diverged has none: the configuration's settings stay."""
    chosen: dict[str, Choice] = {}
    for field in ("cell", "rate_key"):
        values: dict[str, dict[tuple, list[float]]] = {}
        for trial in trials:
            value = np.inf if trial.heldout is None else trial.heldout
            of_name = values.setdefault(getattr(trial, field), {})
            of_name.setdefault(tuple(trial.choice.items()), []).append(value)
        for name, of_name in values.items():
            means = {choice: float(np.mean(found)) for choice, found in of_name.items()}
            lowest = min(means, key=lambda choice: means[choice])
            if np.isfinite(means[lowest]):
                chosen[name] = dict(lowest)
    return chosen


def record(trials: list[Trial], cells: list[StudyCell], tune: Tune) -> Sweep:
    """The record of a sweep, for `study.rates` of other configurations."""
    chosen, swept = best(trials), {trial.rate_key for trial in trials}
    held = [cell for cell in cells if cell.rate_key in swept]
    more = {name: {k: v for k, v in of.items() if k != RATE} for name, of in chosen.items()}
    return Sweep(
        grid=sorted(tune.learning_rates),
        trial_budget_share=tune.budget,
        command=command(),
        best={name: choice[RATE] for name, choice in chosen.items()},
        more={name: of for name, of in more.items() if of},
        laws=rate_law.laws(trials),
        match=cells[0].training_budget.match,
        trials=trials,
        settings={
            key: shared_settings(cell) for cell in held for key in (cell.name, cell.rate_key)
        },
        **dict(machine()),
    )


def choose(folder: StudyFolder, trials: list[Trial]) -> StudyFolder:
    """Writes rates.json and returns the study with what these trials chose."""
    found = record(trials, folder.cells, folder.tune)
    folder.directory.mkdir(parents=True, exist_ok=True)
    write_json(folder.directory / "rates.json", found.as_json())
    return folder.with_choices(found)


def chosen(folder: StudyFolder) -> StudyFolder:
    """Returns a study that has run, with what its finished trials chose."""
    return choose(folder, finished(folder, folder.cells)) if folder.study.tune else folder


def shared_settings(cell: StudyCell) -> dict[str, Any]:
    """The settings that a trial and the cell that takes its choice must share."""
    return {k: v for k, v in fingerprint(cell.settings).items() if not k.startswith(FREE)}


def verdict(cell: StudyCell, rate: float | None, sweep: Sweep | None) -> dict[str, Any]:
    """Fields of a CellResult: whether `rate` is a sweep's choice for this cell, which of its choices lie at the edge of
    their grids, and the FLOPs of the trials that chose, their median."""
    if sweep is None:
        return UNTUNED
    if law := rate_law.law_of(cell, sweep):
        return UNTUNED | {"extrapolation": _extrapolation(cell, rate, sweep, law)}

    def of_cell(table: Mapping[Any, Entry]) -> Entry | None:
        return table.get(cell.rate_key, table.get(cell.name))

    swept, choice = of_cell(sweep.settings), of_cell(sweep.chosen) or {}
    free = {path for axis in choice for path in DECIDES[axis]}
    own = shared_settings(cell)
    alike = swept is not None and not changed_settings(
        *({k: v for k, v in of.items() if k not in free} for of in (swept, own))
    )
    batch = choice.get(BATCH, cell.settings.training.global_batch_tokens)
    has_it = rate == choice.get(RATE) and batch == cell.settings.training.global_batch_tokens
    if not (alike and has_it):
        return UNTUNED
    mine = [trial for trial in sweep.trials if trial.rate_key == cell.rate_key]
    mine = mine or [trial for trial in sweep.trials if trial.cell == cell.name]
    edges = [axis for axis in choice if axis != RATE and _at_edge(axis, choice, mine)]
    found = {
        "tuned": not cell.keeps_rate,
        "learning_rate_at_edge": not cell.keeps_rate and rate in (sweep.grid[0], sweep.grid[-1]),
        "trial_flops": float(np.median([t.flops for t in mine])) if mine else None,
    }
    return found | ({"more_at_edge": edges} if edges else {})


def _extrapolation(
    cell: StudyCell, rate: float | None, sweep: Sweep, law: RateLaw
) -> Extrapolation | None:
    """Returns how far a law reaches to give a cell its rate; None where the cell has another, or differs from what
    was swept in more than its size and budget."""
    own, swept = shared_settings(cell), sweep.settings.get(cell.name, {})
    differing = {name for name in own.keys() | swept.keys() if own.get(name) != swept.get(name)}
    batch = differing & {BATCH, "training.global_batch_size"}
    # a division of the layers that was chosen with the rate moves the parameters a little
    has_it = rate is not None and abs(rate / rate_law.rate_of(cell, law) - 1) < 0.05
    if not has_it or differing - batch - OF_A_SIZE:
        return None
    return Extrapolation(
        places=law.places,
        scatter=law.scatter,
        times=rate_law.place_of(cell)[0] / law.largest,
        same_batch=not batch,
    )


def _at_edge(axis: str, choice: Choice, trials: list[Trial]) -> bool:
    tried = [trial.more[axis] for trial in trials if axis in trial.more]
    return len(set(tried)) > 1 and choice[axis] in (min(tried), max(tried))
