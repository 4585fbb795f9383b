"""`compare --dry-run`: what a study will take, from one timed step of each cell."""

import math
import tempfile
import time
from pathlib import Path

from megaarch import config
from megaarch.data.prepare import prepare
from megaarch.study.grid import GridCell, expand
from megaarch.training.trainer import Trainer

STATE_BYTES = 12  # fp32 weights and AdamW's two moments
TIMED_STEPS = 3


def dry_run(raw: config.Raw, directory: Path) -> str:
    """A table of steps, tokens, epochs, disk and hours for each cell. Trains nothing for good."""
    settings = config.resolve(raw)
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    lines = [f"{'cell':<26}{'steps':>8}{'tokens':>11}{'epochs':>8}{'disk MiB':>10}{'hours':>9}"]
    total = 0.0
    for cell in expand(raw, directory):
        steps, tokens, epochs, disk, hours = estimate(cell, prepared)
        total += hours
        lines.append(
            f"{cell.key:<26.25}{steps:>8,}{tokens:>11.3e}{epochs:>8.2f}{disk / 2**20:>10.1f}"
            f"{hours:>9.3f}"
        )
    lines.append(f"{'all cells, training alone':<63}{total:>9.3f}")
    return "\n".join(lines)


def estimate(cell: GridCell, prepared) -> tuple[int, float, float, float, float]:
    """Steps, seen tokens, epochs, bytes of checkpoints and hours of one cell."""
    with tempfile.TemporaryDirectory() as folder:
        settings = cell.settings
        logging = settings.logging.model_copy(update={"directory": folder})
        training = settings.training.model_copy(update={"start_from": None})
        trainer = Trainer(
            settings.model_copy(update={"logging": logging, "training": training}), prepared
        )
        trainer.train_step(trainer.steps[0])  # warm-up
        before = trainer.progress
        started = time.perf_counter()
        for step in range(1, TIMED_STEPS + 1):
            trainer.train_step(trainer.steps[step])
        seconds = (time.perf_counter() - started) / TIMED_STEPS
        kind, amount = trainer.limit.kind, trainer.limit.amount
        each = (getattr(trainer.progress, kind) - getattr(before, kind)) / TIMED_STEPS
        steps = math.ceil(amount / each)
        tokens = (trainer.progress.seen_tokens - before.seen_tokens) / TIMED_STEPS * steps
        rows = steps * settings.training.global_batch_size
        disk = trainer.parameters * STATE_BYTES * max(training.keep_checkpoints, 1)
        return steps, tokens, rows / trainer.rows.per_epoch, disk, steps * seconds / 3600
