"""Batches in tokens: `training.global_batch_tokens` kept by rows.

A run's mean row has r seen tokens, so a step has G / r rows in the mean, a fraction. Step k ends at row
round(k·G / r): steps differ by a row at most, and their sum never drifts. Micro-batches have fixed shapes
that hold the largest step; what a step does not need of them stays empty.
"""

import math
from fractions import Fraction

import numpy as np

from megaarch.config.schema import Settings, Training
from megaarch.data.dataset import Rows
from megaarch.errors import UserError

FEWEST, MOST = 64, 2048  # rows whose tokens are counted
ENOUGH = 0.002  # error of the mean row at which no more are counted
TOLERANCE = 0.01  # of a step's tokens, in the mean over steps


def tokens_per_row(rows: Rows) -> tuple[Fraction, float]:
    """Returns the mean seen tokens of a run's rows, from its first ones, and their relative standard
    error. A function of the data and the settings alone, so the same on every rank and on resume."""
    seen: list[int] = []
    while True:
        seen += [_seen(rows, i) for i in range(len(seen), len(seen) + FEWEST)]
        error = float(np.std(seen) / np.mean(seen)) / math.sqrt(len(seen))
        if error <= ENOUGH or len(seen) >= MOST:
            return Fraction(sum(seen), len(seen)), error


def _seen(rows: Rows, i: int) -> int:
    return sum(len(stream.tokens) for example in rows[i] for stream in example.streams)


def rows_a_step(training: Training, rows: Rows) -> tuple[Fraction, float]:
    """Returns the mean rows of a step, and their relative standard error. UserError as `rows_of`."""
    if training.global_batch_tokens is None:
        return Fraction(training.global_batch_size), 0.0
    per_row, error = tokens_per_row(rows)
    return rows_of(training, per_row), error


def rows_of(training: Training, per_row: Fraction) -> Fraction:
    """Returns the mean rows of a step of `training.global_batch_tokens`. per_row: seen tokens of a row.
    UserError for less than one."""
    assert training.global_batch_tokens is not None
    wanted = training.global_batch_tokens / per_row
    if wanted < 1:
        raise UserError(
            f"training.global_batch_tokens: {training.global_batch_tokens} tokens are less than the "
            f"{float(per_row):.0f} of a row: raise it, or shorten the rows"
        )
    return wanted


def in_rows(settings: Settings, wanted: Fraction) -> Settings:
    """Returns settings whose batch is one of rows and has room for the largest step, in micro-batches
    that are as even as can be and no larger than those given. wanted: mean rows of a step."""
    training, parallel = settings.training, settings.parallel
    if training.global_batch_tokens is None:
        return settings
    ranks = parallel.data_ranks
    most = math.ceil(wanted)
    count = -(-most // (training.micro_batch_size * ranks))
    deep = parallel.pipeline_parallel  # schedules want as many micro-batches as ranks, or multiples
    count = -(-count // deep) * deep
    size = -(-most // (count * ranks))
    given = {
        "micro_batch_size": size,
        "global_batch_size": size * count * ranks,
        "global_batch_tokens": None,
    }
    return settings.model_copy(update={"training": training.model_copy(update=given)})


def uncertain(error: float) -> str | None:
    """A sentence where the tokens of a step cannot be kept; None where they can."""
    if 2 * error <= TOLERANCE:
        return None
    return (
        f"training.global_batch_tokens: rows differ so much that {MOST} of them tell their mean to "
        f"{2 * error:.1%} only, and the tokens of a step are kept no better"
    )
