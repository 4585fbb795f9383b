"""A study from its configuration to results.json: prepare, tune, run every cell, report."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from megaarch import config
from megaarch.config.schema import Data, Study
from megaarch.distributed.mesh import processes
from megaarch.errors import UserError
from megaarch.ingest.manifest import PreparedManifest
from megaarch.ingest.prepare import Prepared
from megaarch.study import cell as cells
from megaarch.study import lanes, lock, preflight, rates, yardsticks
from megaarch.study.display import Board
from megaarch.study.environment import command, environment
from megaarch.study.grid import GridCell, expand, title
from megaarch.study.items import Item, unfaithful


def compare(raw: config.Raw, directory: Path, console: Console) -> dict[str, Any]:
    """Run a study's missing cells and write `results.json`; returns it.

    Cells that are finished are kept, an interrupted one continues, and one whose settings, data
    or yardsticks have changed is a ConfigError that names what.
    """
    expand(raw, directory)  # every mistake in the grid shows before anything is written
    with lock.alone(directory, "study"):
        return _compare(raw, directory, console)


def remember(raw: config.Raw, directory: Path) -> None:
    """Keeps the configuration as study.yaml: what jobs of their own, and readers, go by."""
    text = yaml.safe_dump(raw, sort_keys=False)
    path = directory / "study.yaml"
    if path.exists() and path.read_text() == text:
        return
    directory.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def recall(directory: Path) -> config.Raw:
    """What `remember` kept. ValueError where the folder is no study's."""
    path = directory / "study.yaml"
    if not path.exists():
        raise UserError(
            f"{directory} is no study's folder: give one that megaarch compare or submit has made"
        )
    return config.read_yaml(path)


def _compare(raw: config.Raw, directory: Path, console: Console) -> dict[str, Any]:
    settings = config.resolve(raw)
    study, base = settings.study, settings.data
    found = rates.read(study.rates) if study.rates else None
    chosen = found["best"] if found else {}
    grid = expand(raw, directory, chosen)
    console.print(f"Preparing the text of {base.source} ...")
    prepared = lanes.text_of(grid[0], base)
    lanes.held_out(base, settings.model.vocabulary_size, study.evaluation)  # or says what lacks
    _say_data(prepared.manifest, console)
    if warning := unfaithful(prepared.heldout, prepared.tokenizer):
        console.print(warning, style="yellow", markup=False)
    preflight.check(grid, study, base)
    for name, own in {cell.name: lanes.text_of(cell, base) for cell in grid}.items():
        if own.manifest.key != prepared.manifest.key:
            _say_own_data(name, own.manifest, console)
    identities: dict[str, dict[str, Any]] = {}
    for cell in grid:
        known = None
        if not study.tune:  # a sweep may yet change the rates
            about = (cell, lanes.text_of(cell, base), study.evaluation, identities.get(cell.parent))
            identities[cell.key], known = cells.identity(*about), cells.finished(*about)
        if not known:
            _one_process(cell)
    remember(raw, directory)  # whatever would refuse it has spoken
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
    return _results(study, base, grid, records, found, directory)


def gather(raw: config.Raw, directory: Path) -> dict[str, Any]:
    """`results.json` of the cells that are finished, where each ran as a job of its own (task.py);
    its warnings name the others. ValueError where none is."""
    settings = config.resolve(raw)
    study, base = settings.study, settings.data
    grid = expand(raw, directory)
    found = rates.read(study.rates) if study.rates else None
    if study.tune:
        found = rates.record(rates.finished(grid, study, base), grid, study)
        _write(directory / "rates.json", found)
    grid = expand(raw, directory, found["best"] if found else {})
    records = {
        cell.key: record
        for cell in grid
        if (record := cells.finished(cell, lanes.text_of(cell, base), study.evaluation))
    }
    if not records:
        raise UserError(f"{directory}: no cell is finished; see megaarch status {directory}")
    return _results(study, base, grid, records, found, directory)


def _results(
    study: Study,
    base: Data,
    grid: list[GridCell],
    records: dict[str, dict[str, Any]],
    found: dict[str, Any] | None,
    directory: Path,
) -> dict[str, Any]:
    size = grid[0].settings.model.vocabulary_size
    prepared = lanes.text_of(grid[0], base)
    missing = [cell.key for cell in grid if cell.key not in records]
    left_out = f"Not finished, so left out: {', '.join(missing)}." if missing else None
    warnings = [w for w in (unfaithful(prepared.heldout, prepared.tokenizer), left_out) if w]
    results = {
        "format": 1,
        "study": study.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "command": command(),
        "budget": {"match": study.match, "amounts": study.budgets},
        "data": prepared.manifest.model_dump() | {"source": str(base.source)},
        **unigram_of(prepared, lanes.held_out(base, size, study.evaluation), study),
        "chance": 1 / yardsticks.CHOICES,
        "cells": [entry(cell, records[cell.key], found) for cell in grid if cell.key in records],
        "tuning": found["trials"] if found else [],
        "warnings": warnings,
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
            cells.check_result(records[cell.key], cell)
            summary = cells.summary(records[cell.key]["result"])
            board.show(title(cell, study), 1.0, f"done before  {summary}")
    missing = [cell for cell in grid if records[cell.key] is None]
    todo = [lanes.Job(title(cell, study), cell, study, base) for cell in missing]
    for job, record in lanes.run(todo, study.lanes, board):
        records[job.cell.key] = record
    return records


def _one_process(cell: GridCell) -> None:
    """ConfigError where the cell's layout is of several."""
    if (number := processes(cell.settings.parallel)) > 1:
        raise config.ConfigError(
            [
                f"cell {cell.key}: its layout (parallel) is of {number} processes and compare is "
                "one: give the study to a cluster with megaarch submit, start the cell alone with "
                f"torchrun --nproc-per-node {number} -m megaarch compare CONFIG --cell {cell.name}"
                ", or leave parallel out"
            ]
        )


def entry(cell: GridCell, record: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """A cell's entry in results.json."""
    cells.check_result(record, cell)
    result = record["result"]
    judged = rates.verdict(cell, result["learning_rate"], found)
    return result | judged | {"environment": record["environment"]}


def unigram_of(prepared: Prepared, held: dict[str, list[Item]], study: Study) -> dict[str, Any]:
    """A unigram model of the training tokens: its bits per byte on the test's and on the curve's
    items, and what each of the test's cost it."""
    vocabulary = prepared.tokenizer.vocabulary
    counts = np.zeros(vocabulary.size)
    for dataset, _ in prepared.train:
        for block in dataset.blocks():
            counts += np.bincount(block, minlength=vocabulary.size)

    def scored(items: list[Item]) -> tuple[np.ndarray, float]:
        nats = yardsticks.unigram_nats(counts, items, vocabulary.text)
        return nats, yardsticks.bits(nats, np.array([item.span_bytes for item in items]))

    test = held["test"][: study.evaluation.documents]
    nats, bits = scored(test)
    _, of_curve = scored(held["validation"][: study.evaluation.curve_documents])
    return {
        "unigram_bits_per_byte": bits,
        "unigram_paired": yardsticks.paired(test, nats),
        "curve_unigram_bits_per_byte": of_curve,
    }


def _say_data(manifest: PreparedManifest, console: Console) -> None:
    console.print(
        f"  {manifest.train_documents:,} documents, {manifest.train_tokens:,} tokens to train "
        f"on; {manifest.heldout_documents:,} documents held out "
        f"({manifest.dropped_paragraphs} paragraphs that also stand in train dropped)"
    )


def _say_own_data(name: str, manifest: PreparedManifest, console: Console) -> None:
    console.print(
        f"  {name} trains on {manifest.source}: {manifest.train_tokens:,} tokens; left out "
        f"because the study holds them out: {manifest.excluded_documents} documents, "
        f"{manifest.excluded_paragraphs} paragraphs"
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
