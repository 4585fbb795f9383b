"""`compare --dry-run`: what a study will take, counted on each cell's first rows; and hours, from a
timed step of the cells whose layout is this one process."""

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.schema import Settings, Study, Training
from megaarch.data import tokens_per_batch
from megaarch.data.dataset import Rows
from megaarch.distributed.mesh import processes
from megaarch.ingest.prepared_data import Prepared
from megaarch.model.fused_projections import projections
from megaarch.model.parameter_count import parameter_shapes
from megaarch.study import preflight
from megaarch.study.cells import StudyCell, generations
from megaarch.study.describe import describe
from megaarch.study.folder import StudyFolder
from megaarch.training import adafactor
from megaarch.training.limit import Limit
from megaarch.training.trainer import Trainer

TIMED_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """The cost of one cell. tokens: seen. disk: bytes of the checkpoints that stay. checkpoint: of one.
    hours: None where it runs in several processes."""

    steps: int
    tokens: float
    epochs: float
    disk: float
    checkpoint: float
    hours: float | None


def dry_run(raw: config.Raw, directory: Path) -> str:
    """A table of steps, tokens, epochs, disk and hours for each cell. Trains nothing for good."""
    folder = StudyFolder.open(raw, directory)
    study = folder.study
    folder.held_out()  # a fault of the study's own text shows once, and not for each cell
    preflight.check(folder)
    width = max(24, *(len(cell.key) for cell in folder.cells)) + 2
    lines = [
        f"{'cell':<{width}}{'steps':>8}{'tokens':>11}{'epochs':>8}{'disk MiB':>10}{'hours':>9}"
    ]
    total, swept, several = 0.0, 0.0, 0
    costs: dict[str, Cost] = {}
    for cell in folder.cells:
        found = costs[cell.key] = cost_of(cell, folder.text_of(cell))
        total += found.hours or 0.0
        several += found.hours is None
        if study.tune:
            swept += (found.hours or 0.0) * study.tune.budget * trials(cell, study)
        lines.append(
            f"{cell.key:<{width}}{found.steps:>8,}{found.tokens:>11.3e}{found.epochs:>8.2f}"
            f"{found.disk / 2**20:>10.1f}{'-' if found.hours is None else f'{found.hours:.3f}':>9}"
        )
    disk = f"{disk_peak(folder, costs) / 2**20:>10.1f}"
    lines.append(f"{'disk at its fullest':<{width + 27}}{disk}")
    if several < len(folder.cells):
        what = "cells of one process" if several else "all cells"
        lines.append(f"{f'{what}, training alone':<{width + 37}}{total:>9.3f}")
        if study.tune:
            lines.append(f"{'their sweep before that':<{width + 37}}{swept:>9.3f}")
    if several:
        lines.append(
            "-: its layout is of several processes, and this is one. For the hours of such cells: "
            "megaarch plan CONFIG --gpus N --gpu NAME"
        )
    return "\n".join(lines)


def cost_of(cell: StudyCell, prepared: Prepared) -> Cost:
    """Counts of one cell, and its hours where it is a single process."""
    settings = cell.settings
    training, limit = settings.training, Limit.of(settings.training)
    rows = Rows(settings.model, settings.data, prepared, training.seed)
    row = describe(settings, cell.key, rows)
    each = float(tokens_per_batch.rows_a_step(training, rows)[0])
    spent = {
        "step": 1,
        "flops": each * row.flops_per_row,
        "seen_tokens": each * row.seen_tokens_per_row,
        "target_tokens": each * row.target_tokens_per_row,
    }
    steps = max(
        1, round((limit.amount - cell.inherited) / spent[limit.kind])
    )  # as many as Limit.reached allows
    alone, size = processes(settings.parallel) == 1, checkpoint_bytes(settings)
    return Cost(
        steps=steps,
        tokens=steps * spent["seen_tokens"],
        epochs=steps * each / rows.per_epoch,
        disk=checkpoints(training, steps) * size,
        checkpoint=size,
        hours=steps * _step_seconds(cell, prepared) / 3600 if alone else None,
    )


def checkpoints(training: Training, steps: int) -> int:
    """Returns how many checkpoints stay of a run of so many steps: the newest, and those of
    `keep_every`."""
    saved = _saved(training, steps)
    newest = min(training.keep_checkpoints or len(saved), len(saved))
    older, keep_every = saved[:-newest], training.keep_every
    return newest + sum(step % keep_every == 0 for step in older if keep_every)


def most_checkpoints(training: Training, steps: int) -> int:
    """Returns how many checkpoints such a run has at most: one that leaves does so once the next is
    complete."""
    stay = checkpoints(training, steps)
    return stay + (stay < len(_saved(training, steps)))


def _saved(training: Training, steps: int) -> list[int]:
    every = training.save_every or steps
    return [*range(every, steps, every), steps]


def disk_peak(folder: StudyFolder, costs: Mapping[str, Cost]) -> float:
    """The most bytes of checkpoints at a time: of cells that are done, and of as many as `study.lanes` runs
    side by side, or of as many trials of a sweep, which leave theirs once they are done."""
    study = folder.study

    def side_by_side(sizes: Iterable[float]) -> float:
        return sum(sorted(sizes)[-study.lanes :])

    def most(cell: StudyCell, share: float = 1.0) -> float:
        steps = max(1, round(costs[cell.key].steps * share))
        return most_checkpoints(cell.settings.training, steps) * costs[cell.key].checkpoint

    done, peaks = 0.0, []
    for generation in generations(folder.cells):
        if study.tune:
            tried = [cell for cell in generation for _ in range(trials(cell, study))]
            peaks.append(done + side_by_side(most(cell, study.tune.budget) for cell in tried))
        beside = side_by_side(most(cell) - costs[cell.key].disk for cell in generation)
        done += sum(costs[cell.key].disk for cell in generation)
        peaks.append(done + beside)
    return max(peaks)


def trials(cell: StudyCell, study: Study) -> int:
    """Returns how many trials a sweep makes of a cell."""
    return len(cell.tried(study))


def checkpoint_bytes(settings: Settings) -> float:
    """The size of one checkpoint: fp32 weights, and what the optimizer keeps of them."""
    axes = catalogue.position_axes(settings.data.objective)
    optimizer = settings.training.optimizer
    shapes = parameter_shapes(settings.model, axes)
    kept = 0
    for name, shape in shapes.items():
        if optimizer == "adafactor":
            kept += adafactor.kept(shape, projections(name, settings.model))
        else:
            kept += catalogue.OPTIMIZERS[optimizer].states * prod(shape)
    return 4.0 * (sum(map(prod, shapes.values())) + kept)


def _step_seconds(cell: StudyCell, prepared: Prepared) -> float:
    """The mean of a few steps, after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        settings = cell.settings
        logging = settings.logging.model_copy(update={"directory": folder})
        training = settings.training.model_copy(update={"start_from": None})
        trainer = Trainer(
            settings.model_copy(update={"logging": logging, "training": training}), prepared
        )
        trainer.step(trainer.steps[0])
        started = time.perf_counter()
        for step in range(1, TIMED_STEPS + 1):
            trainer.step(trainer.steps[step])
        return (time.perf_counter() - started) / TIMED_STEPS
