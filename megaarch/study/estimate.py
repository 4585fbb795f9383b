"""`compare --dry-run`: what a study will take, counted on each cell's first rows; and hours, from a
timed step of the cells whose layout is this one process."""

import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.schema import Settings, Training
from megaarch.data import tokens_per_batch
from megaarch.data.dataset import Rows
from megaarch.distributed.mesh import processes
from megaarch.ingest.prepared_data import Prepared
from megaarch.model.fused_projections import projections
from megaarch.model.parameter_count import parameter_shapes
from megaarch.study import preflight, sweep_grid
from megaarch.study.cells import StudyCell
from megaarch.study.describe import describe
from megaarch.study.folder import StudyFolder
from megaarch.training import adafactor
from megaarch.training.train_state import Limit
from megaarch.training.trainer import Trainer

TIMED_STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """The cost of one cell. tokens: seen. disk: bytes of the checkpoints that stay. hours: None
    where it runs in several processes."""

    steps: int
    tokens: float
    epochs: float
    disk: float
    hours: float | None


def dry_run(raw: config.Raw, directory: Path) -> str:
    """A table of steps, tokens, epochs, disk and hours for each cell. Trains nothing for good."""
    folder = StudyFolder.open(raw, directory)
    study = folder.study
    folder.held_out()  # a fault of the study's own text shows once, and not for each cell
    preflight.check(folder)
    lines = [f"{'cell':<26}{'steps':>8}{'tokens':>11}{'epochs':>8}{'disk MiB':>10}{'hours':>9}"]
    total, swept, several = 0.0, 0.0, 0
    for cell in folder.cells:
        found = estimate(cell, folder.text_of(cell))
        total += found.hours or 0.0
        several += found.hours is None
        if study.tune and cell.seed == study.seeds[0]:
            grid = sweep_grid.of_architecture(study.tune, cell.settings.model.architecture)
            swept += (found.hours or 0.0) * study.tune.budget * len(grid)
        lines.append(
            f"{cell.key:<26.25}{found.steps:>8,}{found.tokens:>11.3e}{found.epochs:>8.2f}"
            f"{found.disk / 2**20:>10.1f}{'-' if found.hours is None else f'{found.hours:.3f}':>9}"
        )
    if several < len(folder.cells):
        what = "cells of one process" if several else "all cells"
        lines.append(f"{f'{what}, training alone':<63}{total:>9.3f}")
        if study.tune:
            lines.append(f"{'their sweep before that':<63}{swept:>9.3f}")
    if several:
        lines.append(
            "-: its layout is of several processes, and this is one. For the hours of such cells: "
            "megaarch plan CONFIG --gpus N --gpu NAME"
        )
    return "\n".join(lines)


def estimate(cell: StudyCell, prepared: Prepared) -> Estimate:
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
    alone = processes(settings.parallel) == 1
    return Estimate(
        steps=steps,
        tokens=steps * spent["seen_tokens"],
        epochs=steps * each / rows.per_epoch,
        disk=checkpoints(training, steps) * checkpoint_bytes(settings),
        hours=steps * _step_seconds(cell, prepared) / 3600 if alone else None,
    )


def checkpoints(training: Training, steps: int) -> int:
    """Returns how many checkpoints stay of a run of so many steps: the newest, and those of
    `keep_every`."""
    every = training.save_every or steps
    saved = [*range(every, steps, every), steps]
    newest = min(training.keep_checkpoints or len(saved), len(saved))
    older, keep_every = saved[:-newest], training.keep_every
    return newest + sum(step % keep_every == 0 for step in older if keep_every)


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
