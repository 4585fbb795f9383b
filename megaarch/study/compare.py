"""A study from its configuration to results.json: prepare, tune, run every cell, report."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaarch import config
from megaarch.data.prepare import Prepared
from megaarch.settings import Data, Study
from megaarch.study import cell as cells
from megaarch.study import lanes, rates, yardsticks
from megaarch.study.display import Board
from megaarch.study.environment import command, environment
from megaarch.study.grid import GridCell, expand, title
from megaarch.study.items import Item


def compare(raw: config.Raw, directory: Path, console: Console) -> dict[str, Any]:
    """Run a study's missing cells and write `results.json`; returns it.

    Cells that are finished are kept, an interrupted one continues, and one whose settings, data
    or yardsticks have changed is a ConfigError that names what.
    """
    expand(raw, directory)  # every mistake in the grid shows before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        return _compare(raw, directory, console)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the folder's lock. ValueError where another process runs this study."""
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{directory}: another process is running this study; wait for it, or give "
                "another --output"
            ) from None
        yield


def _compare(raw: config.Raw, directory: Path, console: Console) -> dict[str, Any]:
    settings = config.resolve(raw)
    study, base = settings.study, settings.data
    found = rates.read(study.rates) if study.rates else None
    chosen = found["best"] if found else {}
    grid = expand(raw, directory, chosen)
    console.print(f"Preparing the text of {base.source} ...")
    prepared = lanes.text_of(grid[0], base)
    held = lanes.held_out(base, settings.model.vocabulary_size, study.evaluation)
    _say_data(prepared.manifest, console)
    unigram = unigram_of(prepared, held, study)
    for cell in grid:
        if not study.tune:  # a sweep may yet change the rates
            cells.finished(cell, lanes.text_of(cell, base), study.evaluation)
    trials: rates.Trials = []
    records: dict[str, dict[str, Any]] = {}
    with Board(console) as board:
        for generation in generations(grid):
            if study.tune:
                trials += rates.sweep(generation, study, base, board)
                found = rates.record(trials, grid, study)
                _write(directory / "rates.json", found)
                keys = {cell.key for cell in generation}
                grid = expand(raw, directory, found["best"])
                generation = [cell for cell in grid if cell.key in keys]
            records |= run(generation, study, base, board)
    results = {
        "format": 1,
        "study": study.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "command": command(),
        "budget": {"match": study.match, "amounts": study.budgets},
        "data": prepared.manifest | {"source": str(base.source)},
        **unigram,
        "chance": 1 / yardsticks.CHOICES,
        "cells": [entry(cell, records[cell.key], found) for cell in grid],
        "tuning": found["trials"] if found else [],
        "warnings": [],
    }
    _write(directory / "results.json", results)
    return results


def generations(grid: list[GridCell]) -> Iterator[list[GridCell]]:
    """Cells in the order in which they can run: those without a parent, then their children, ..."""
    left, done = list(grid), {None}
    while left:
        ready = [cell for cell in left if cell.parent in done]
        done |= {cell.key for cell in ready}
        left = [cell for cell in left if cell not in ready]
        yield ready


def run(grid: list[GridCell], study: Study, base: Data, board: Board) -> dict[str, dict[str, Any]]:
    """The record of each cell by its key; those that are not finished are run."""
    records = {
        cell.key: cells.finished(cell, lanes.text_of(cell, base), study.evaluation) for cell in grid
    }
    for cell in grid:
        if records[cell.key]:
            summary = cells.summary(records[cell.key]["result"])
            board.show(title(cell, study), 1.0, f"done before  {summary}")
    missing = [cell for cell in grid if records[cell.key] is None]
    todo = [lanes.Job(title(cell, study), cell, study, base) for cell in missing]
    for job, record in lanes.run(todo, study.lanes, board):
        records[job.cell.key] = record
    return records


def entry(cell: GridCell, record: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """A cell's entry in results.json."""
    result = record["result"]
    judged = rates.verdict(cell, result["learning_rate"], found)
    return result | judged | {"environment": record["environment"]}


def unigram_of(prepared: Prepared, held: dict[str, list[Item]], study: Study) -> dict[str, float]:
    """Bits per byte of a unigram model of the training tokens: on the test's and the curve's items."""
    vocabulary = prepared.tokenizer.vocabulary
    counts = np.zeros(vocabulary.size)
    for dataset, _ in prepared.train:
        for block in dataset.blocks():
            counts += np.bincount(block, minlength=vocabulary.size)

    def bits(items: list[Item]) -> float:
        return yardsticks.unigram_bits_per_byte(counts, items, vocabulary.text)

    return {
        "unigram_bits_per_byte": bits(held["test"][: study.evaluation.documents]),
        "curve_unigram_bits_per_byte": bits(held["validation"][: study.evaluation.curve_documents]),
    }


def _say_data(manifest: dict[str, Any], console: Console) -> None:
    console.print(
        f"  {manifest['train_documents']:,} documents, {manifest['train_tokens']:,} tokens to train "
        f"on; {manifest['heldout_documents']:,} documents held out "
        f"({manifest['dropped_paragraphs']} paragraphs that also stand in train dropped)"
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
