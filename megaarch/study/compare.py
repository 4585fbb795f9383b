"""A study from its configuration to results.json: prepare, tune, run every cell, report."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaarch import config
from megaarch.settings import Data, Study
from megaarch.study import cell as cells
from megaarch.study import lanes, yardsticks
from megaarch.study.display import Board
from megaarch.study.environment import environment
from megaarch.study.grid import GridCell, expand
from megaarch.study.items import Item


def compare(raw: config.Raw, directory: Path, console: Console) -> dict[str, Any]:
    """Run a study's missing cells and write `results.json`; returns it.

    Cells that are finished are kept, an interrupted one continues, and a finished one whose
    settings have changed is a ConfigError that names them.
    """
    settings = config.resolve(raw)
    study = settings.study
    grid = expand(raw, directory)  # every mistake in the grid shows before anything runs
    if study.rates:
        grid = expand(raw, directory, chosen_rates(study.rates))
    if not study.tune:  # a sweep may yet change the rates
        for cell in grid:
            cells.finished(cell)
    console.print(f"Preparing the text of {settings.data.source} ...")
    base, size = settings.data, settings.model.vocabulary_size
    prepared = lanes.text_of(grid[0], base)
    held = lanes.held_out(base, size, study.evaluation)
    _say_data(prepared.manifest, console)
    trials: list[dict[str, Any]] = []
    with Board(console) as board:
        if study.tune:
            trials = tune(grid, study, base, board)
            _write(directory / "rates.json", rates_file(trials, study, settings.data.source))
            grid = expand(raw, directory, best_rates(trials))
        records = run(grid, study, base, board)
    results = assemble(study, settings, prepared, held, grid, records, trials)
    _write(directory / "results.json", results)
    return results


def run(grid: list[GridCell], study: Study, base: Data, board: Board) -> list[dict[str, Any]]:
    """The records of all cells, in the order of the grid; those that are not finished are run."""
    records = {cell.key: cells.finished(cell) for cell in grid}
    missing = [cell for cell in grid if records[cell.key] is None]
    for cell in grid:
        if records[cell.key]:
            summary = cells.summary(records[cell.key]["result"])
            board.show(_title(cell, study), 1.0, f"done before  {summary}")
    todo = [lanes.Job(_title(cell, study), cell, study, base) for cell in missing]
    for job, record in lanes.run(todo, study.lanes, board):
        records[job.cell.key] = record
    return [records[cell.key] for cell in grid]


def _title(cell: GridCell, study: Study) -> str:
    several = len(study.sizes) > 1 or len(study.budgets) > 1 or len(study.seeds) > 1
    return cell.key if several else cell.name


def tune(grid: list[GridCell], study: Study, base: Data, board: Board) -> list[dict[str, Any]]:
    """The same learning rates and trial budget for every cell; counted apart."""
    todo = [
        lanes.Job(f"{_title(cell, study)} {rate:.3g}", cell, study, base, rate)
        for cell in grid
        if cell.seed == study.seeds[0]
        for rate in study.tune.learning_rates
    ]
    found = {(job.cell.key, job.rate): trial for job, trial in lanes.run(todo, study.lanes, board)}
    return [found[job.cell.key, job.rate] for job in todo]


def best_rates(trials: list[dict[str, Any]]) -> dict[str, float]:
    """Each cell's learning rate of the lowest held-out value, over its sizes and budgets."""
    names = dict.fromkeys(trial["cell"] for trial in trials)
    best = {}
    for name in names:
        mine = [trial for trial in trials if trial["cell"] == name]
        rates = dict.fromkeys(trial["learning_rate"] for trial in mine)
        best[name] = min(
            rates, key=lambda r: np.mean([t["heldout"] for t in mine if t["learning_rate"] == r])
        )
    return best


def rates_file(trials: list[dict], study: Study, source: Any) -> dict[str, Any]:
    """What a sweep leaves behind, for `study.rates` of other configurations."""
    grid = sorted(study.tune.learning_rates)
    return {
        "source": str(source),
        "grid": grid,
        "trial_budget_share": study.tune.budget,
        "command": command(),
        "best": best_rates(trials),
        "trials": trials,
        **environment(),
    }


def read_rates(path: str) -> dict[str, Any]:
    """A sweep's file. ValueError where it cannot be used."""
    try:
        found = json.loads(Path(path).read_text())
        if not isinstance(found["best"], dict) or not isinstance(found["grid"], list):
            raise KeyError("best")
    except OSError as error:
        raise ValueError(f"study.rates: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"study.rates: {path} is not the rates.json of a sweep") from None
    return found


def chosen_rates(path: str) -> dict[str, float]:
    """Learning rate by cell name."""
    return read_rates(path)["best"]


def assemble(study: Study, settings, prepared, held, grid, records, trials) -> dict[str, Any]:
    """results.json: everything that the report needs, and nothing that it must look up."""
    sweep = (
        {"best": best_rates(trials), "grid": sorted(study.tune.learning_rates)}
        if trials
        else (read_rates(study.rates) if study.rates else {"best": {}, "grid": []})
    )
    same_text = bool(trials) or sweep.get("source") == str(settings.data.source)
    vocabulary = prepared.tokenizer.vocabulary
    counts = np.zeros(vocabulary.size)
    for dataset, _ in prepared.train:
        counts += np.bincount(dataset.stream(0, dataset.tokens), minlength=vocabulary.size)

    def unigram(items: list[Item], most: int) -> float:
        return yardsticks.unigram_bits_per_byte(counts, items[:most], vocabulary.text)

    entries = []
    for cell, record in zip(grid, records, strict=True):
        rate = record["result"]["learning_rate"]
        chosen = sweep["best"].get(cell.name) == rate and same_text
        entries.append(
            record["result"]
            | {
                "tuned": chosen,
                "learning_rate_at_edge": chosen and rate in (sweep["grid"][0], sweep["grid"][-1]),
                "environment": record["environment"],
            }
        )
    return {
        "format": 1,
        "study": study.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "command": command(),
        "budget": {"match": study.match, "amounts": study.budgets},
        "data": prepared.manifest | {"source": str(settings.data.source)},
        "unigram_bits_per_byte": unigram(held["test"], study.evaluation.documents),
        "curve_unigram_bits_per_byte": unigram(
            held["validation"], study.evaluation.curve_documents
        ),
        "chance": 1 / yardsticks.CHOICES,
        "cells": entries,
        "tuning": trials or sweep.get("trials", []),
        "warnings": [],
    }


def command() -> str:
    """The command that this process was given."""
    return shlex.join(["megaarch", *sys.argv[1:]])


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
