"""One cell of a study, or one trial of a sweep, in the layout of its own settings.

    srun megaarch compare STUDY --cell NAME      (torchrun and mpirun likewise)

This is what runs where cells are jobs of a cluster; `run_study.gather` then makes results.json of
what they leave in the study's folder. Every process of the layout runs it; the main one writes.
"""

from pathlib import Path

from rich.console import Console

from megaarch import config
from megaarch.distributed import launch
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.errors import UserError
from megaarch.parallel.validate import join
from megaarch.study import sweep, sweep_grid, workers
from megaarch.study.cells import StudyCell, find
from megaarch.study.folder import StudyFolder, save_config
from megaarch.study.progress_bar import ProgressDisplay
from megaarch.study.results import CellRecord, Trial
from megaarch.study.start import parent_diverged, parent_record
from megaarch.training.trainer import device_of


def run_cell(raw: config.Raw, directory: Path, which: str) -> CellRecord | None:
    """Runs the cell `which` (its number in the study, its key, or a name that only one cell has),
    or continues it; returns its record, None on other processes than the main one.

    ConfigError where the layout does not fit the processes; UserError where its parent or its
    trials are not finished.
    """
    folder = StudyFolder.open(raw, directory)
    cell = find(folder.cells, which)
    if cell.parent:
        parent = parent_record(cell)
        if not (parent and (parent.result or parent.diverged)):
            raise UserError(f"cell {cell.key} starts from {cell.parent}, which is not finished")
    return _run(folder, cell)


def run_trial(raw: config.Raw, directory: Path, number: int) -> Trial | None:
    """Runs trial `number` of the study's sweep (sweep.trials); returns what it found, None where the cell's parent
    diverged. ConfigError as `run_cell`."""
    folder = StudyFolder.open(raw, directory)
    trials = sweep.trials(raw, directory, folder.cells)
    if not 0 <= number < len(trials):
        raise UserError(f"--trial {number}: the study has {len(trials)} trials, numbered from 0")
    record = _run(folder, trials[number])
    assert record
    return record.trial


def prepare(raw: config.Raw, directory: Path) -> None:
    """Prepares the text of every cell, so that the jobs to come find it prepared."""
    folder = StudyFolder.open(raw, directory)
    for cell in folder.cells:
        folder.text_of(cell)
    folder.held_out()


def _run(folder: StudyFolder, cell: StudyCell) -> CellRecord | None:
    grid = join(cell.settings, device_of(cell.settings))

    def enter() -> None:
        if grid.is_main:
            save_config(folder.raw, folder.directory)
        folder.text_of(cell)

    with Heartbeat(grid, cell.settings.training) as heartbeat:
        launch.first(enter)
        with ProgressDisplay(Console(stderr=True, quiet=not grid.is_main)) as display:
            if cell.choice is None:
                if folder.study.tune and not parent_diverged(cell):
                    folder = _tuned(folder, cell)
                    cell = find(folder.cells, cell.key)
                if record := workers.kept(folder, cell, display.show):
                    return record if grid.is_main else None
            return workers.perform(folder, cell, display.show, grid, heartbeat)


def _tuned(folder: StudyFolder, cell: StudyCell) -> StudyFolder:
    """The study with what the cell's trials chose. UserError where one of them is not finished."""
    alike = [c for c in folder.cells if c.rate_key == cell.rate_key]
    if not sweep_grid.holds(folder.study, cell.size):  # its rate is by the law of its name
        alike = [c for c in folder.cells if c.name == cell.name]
    found = sweep.finished(folder, alike)
    trials = sweep.trials(folder.raw, folder.directory, alike)
    wanted = sum(not parent_diverged(trial) for trial in trials)
    if len(found) < wanted:
        raise UserError(
            f"cell {cell.key}: {wanted - len(found)} of its {wanted} trials are not finished: run "
            "them first (compare --trial)"
        )
    return folder.with_choices(sweep.record(found, alike, folder.tune))
