"""A study from its configuration to results.json: prepare, tune, run every cell, report."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaarch import config
from megaarch.data.prepare import prepare
from megaarch.settings import Study
from megaarch.study import cell as cells
from megaarch.study import yardsticks
from megaarch.study.display import CellLine
from megaarch.study.environment import environment
from megaarch.study.grid import GridCell, expand
from megaarch.study.items import Item, cut


def split_items(documents: list[str], tokenizer, study: Study) -> dict[str, list[Item]]:
    """Held-out items by use. Every third document serves validation (the curve, tuning), the
    others the test: what chose a learning rate does not judge the model."""
    items = cut(documents, tokenizer, study.evaluation)
    parts = {
        "validation": [item for item in items if item.document % 3 == 0],
        "test": [item for item in items if item.document % 3 != 0],
    }
    for name, found in parts.items():
        if not found:
            raise ValueError(
                f"the held-out text has no item for {name}: give more text, raise data.held_out, "
                "or lower study.evaluation.prefix_tokens"
            )
    return parts


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
    for cell in grid:
        cells.finished(cell)
    console.print(f"Preparing the text of {settings.data.source} ...")
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    held = split_items(prepared.heldout, prepared.tokenizer, study)
    _say_data(prepared.manifest, console)
    trials: list[dict[str, Any]] = []
    if study.tune:
        trials = tune(grid, study, prepared, held, console)
        _write(directory / "rates.json", rates_file(trials, study, settings.data.source))
        grid = expand(raw, directory, best_rates(trials))
    records = []
    for cell in grid:
        record = cells.finished(cell)
        if record is None:
            with CellLine(cell.name if len(study.seeds) == 1 else cell.key, console) as line:
                record = cells.run(cell, prepared, held, study.evaluation, line)
                line.say(_summary(record["result"]))
        records.append(record)
    results = assemble(study, settings, prepared, held, grid, records, trials)
    _write(directory / "results.json", results)
    return results


def tune(grid: list[GridCell], study: Study, prepared, held, console: Console) -> list[dict]:
    """The same grid of learning rates and trial budget for every cell; counted apart."""
    trials = []
    for cell in grid:
        if cell.seed != study.seeds[0]:
            continue
        for rate in study.tune.learning_rates:
            with CellLine(f"{cell.name} {rate:.3g}", console) as line:
                trial = cells.tuned_value(
                    cell, rate, study.tune.budget, prepared, held, study.evaluation, line
                )
                line.say(f"held-out {trial['heldout']:.4f} bits per byte")
            trials.append(trial)
    return trials


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
    sweep = {"best": best_rates(trials), "grid": sorted(study.tune.learning_rates)} if trials else (
        read_rates(study.rates) if study.rates else {"best": {}, "grid": []})  # fmt: skip
    same_text = bool(trials) or sweep.get("source") == str(settings.data.source)
    vocabulary = prepared.tokenizer.vocabulary
    counts = np.zeros(vocabulary.size)
    for dataset, _ in prepared.train:
        counts += np.bincount(dataset.stream(0, dataset.tokens), minlength=vocabulary.size)
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
        "budget": {"match": study.match, "amounts": study.budgets},
        "data": prepared.manifest | {"source": str(settings.data.source)},
        "unigram_bits_per_byte": yardsticks.unigram_bits_per_byte(
            counts, held["test"][: study.evaluation.documents], vocabulary.text
        ),
        "chance": 1 / yardsticks.CHOICES,
        "cells": entries,
        "tuning": trials or sweep.get("trials", []),
        "warnings": [],
    }


def _say_data(manifest: dict[str, Any], console: Console) -> None:
    console.print(
        f"  {manifest['train_documents']:,} documents, {manifest['train_tokens']:,} tokens to train "
        f"on; {manifest['heldout_documents']:,} documents held out "
        f"({manifest['dropped_paragraphs']} paragraphs that also stand in train dropped)"
    )


def _summary(result: dict[str, Any]) -> str:
    held = result["heldout"]
    choice = held["choice_accuracy"]
    return (
        f"{result['steps']} steps  {held['continuation_bits_per_byte']:.3f} bits per byte"
        + (f"  choice {choice:.2f}" if choice is not None else "")
        + ("" if held["comparable"] else "  (pseudo-likelihood)")
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
