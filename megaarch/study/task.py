"""One cell of a study, or one trial of a learning rate, in the layout of its own settings.

    srun megaarch compare STUDY --cell NAME      (torchrun and mpirun likewise)

This is what runs where cells are jobs of a cluster; `compare.gather` then makes results.json of
what they leave in the study's folder. Every process of the layout runs it; the main one writes.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from megaarch import config
from megaarch.distributed import launch
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.errors import UserError
from megaarch.ingest.prepare import Prepared
from megaarch.parallel.validate import join
from megaarch.study import cell as cells
from megaarch.study import compare, lanes, rates
from megaarch.study.display import Board
from megaarch.study.grid import GridCell, expand, rate_key, title
from megaarch.training.trainer import device_of


def run_cell(raw: config.Raw, directory: Path, which: str) -> dict[str, Any] | None:
    """Runs the cell `which` (its number in the grid, its key, or a name that only one cell has),
    or continues it; returns its record, None on other processes than the main one.

    ConfigError where the layout does not fit the processes; ValueError where its parent or its
    trials are not finished.
    """
    study, grid = config.resolve(raw).study, expand(raw, directory)
    cell = find(grid, which)
    if cell.parent and not (cells.read_record(directory / "cells" / cell.parent) or {}).get(
        "result"
    ):
        raise UserError(f"cell {cell.key} starts from {cell.parent}, which is not finished")
    if study.rates:
        grid = expand(raw, directory, rates.read(study.rates)["best"])
    return _run(raw, directory, find(grid, cell.key), title(cell, study))


def run_trial(raw: config.Raw, directory: Path, number: int) -> dict[str, Any] | None:
    """Runs trial `number` of the study's sweep (rates.trials); returns what it found, None on
    other processes than the main one. ConfigError as `run_cell`."""
    study, grid = config.resolve(raw).study, expand(raw, directory)
    trials = rates.trials(grid, study) if study.tune else []
    if not 0 <= number < len(trials):
        raise UserError(f"--trial {number}: the study has {len(trials)} trials, numbered from 0")
    cell, rate = trials[number]
    return _run(raw, directory, cell, f"{title(cell, study)} {rate:.3g}", rate)


def prepare(raw: config.Raw, directory: Path) -> None:
    """Prepares the text of every cell, so that the jobs to come find it prepared."""
    settings = config.resolve(raw)
    for cell in expand(raw, directory):
        lanes.text_of(cell, settings.data)
    size = settings.model.vocabulary_size
    lanes.held_out(settings.data, size, settings.study.evaluation)


def find(grid: list[GridCell], which: str) -> GridCell:
    """The cell that `which` names. ValueError where it names none or several."""
    if which.isdecimal() and int(which) < len(grid):
        return grid[int(which)]
    found = [cell for cell in grid if which == cell.key]
    found = found or [cell for cell in grid if which == cell.name]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(cell.key for cell in found or grid)
    what = f"{len(found)} cells of that name" if found else "no such cell"
    raise UserError(
        f"--cell {which}: {what}; give a number from 0 to {len(grid) - 1}, or one of {keys}"
    )


def _run(
    raw: config.Raw, directory: Path, cell: GridCell, name: str, rate: float | None = None
) -> dict[str, Any] | None:
    settings = config.resolve(raw)
    study, base = settings.study, settings.data
    grid = join(cell.settings, device_of(cell.settings))

    def ready() -> Prepared:
        if grid.is_main:
            compare.remember(raw, directory)
        return lanes.text_of(cell, base)

    with Heartbeat(grid, cell.settings.training) as heartbeat:
        prepared = launch.first(ready)
        with Board(Console(stderr=True, quiet=not grid.is_main)) as board:
            if rate is None:
                if study.tune:
                    cell = _tuned(raw, directory, cell)
                if record := cells.finished(cell, prepared, study.evaluation):
                    board.show(name, 1.0, f"done before  {cells.summary(record['result'])}")
                    return record if grid.is_main else None
            return lanes.perform(
                lanes.Job(name, cell, study, base, rate), board.show, grid, heartbeat
            )


def _tuned(raw: config.Raw, directory: Path, cell: GridCell) -> GridCell:
    """The cell at the rate that its trials chose. ValueError where one of them is not finished."""
    settings = config.resolve(raw)
    grid = [c for c in expand(raw, directory) if rate_key(c) == rate_key(cell)]
    found = rates.finished(grid, settings.study, settings.data)
    wanted = len(rates.trials(grid, settings.study))
    if len(found) < wanted:
        raise UserError(
            f"cell {cell.key}: {wanted - len(found)} of its {wanted} trials are not finished: run "
            "them first (compare --trial)"
        )
    return find(expand(raw, directory, rates.best(found)), cell.key)
