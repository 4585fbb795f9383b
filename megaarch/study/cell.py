"""One cell of a study: train it to its budget, score it, keep its record.

cells/NAME/SIZE-BUDGET-seedN/   cell.json      settings and, once finished, the result
                                heldout.jsonl  the held-out value along the run
                                metrics.jsonl, checkpoints/, tensorboard/
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.fingerprint import changed, signature
from megaarch.config.schema import Evaluation, Settings
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.files import Schema, fit, read_json
from megaarch.ingest.prepare import Prepared
from megaarch.model.count import non_embedding_parameter_count
from megaarch.study import yardsticks
from megaarch.study.display import Line
from megaarch.study.environment import environment, share
from megaarch.study.grid import GridCell, rate_key
from megaarch.study.items import Item
from megaarch.study.score import Scorer
from megaarch.training.metrics import cut_back, read_lines
from megaarch.training.progress import Progress
from megaarch.training.trainer import Trainer

LOSS_POINTS = 200


class _Scores(Schema):
    continuation_bits_per_byte: float
    choice_accuracy: float | None
    comparable: bool


class _Text(Schema):
    excluded_documents: int
    excluded_paragraphs: int


class _Result(Schema):
    data: _Text | None = None


class _Finished(_Result):
    steps: int
    learning_rate: float
    heldout: _Scores


class Trial(Schema):
    """What a trial of a sweep has found. heldout: bits per byte, None where its rate diverged."""

    cell: str
    rate_key: str
    learning_rate: float
    heldout: float | None
    flops: float


class _Record(Schema):
    """What is read of cell.json; a cell that is not finished has neither result nor trial."""

    signature: dict[str, Any]
    result: _Result = None
    trial: Trial = None
    environment: dict[str, Any] = Field(default_factory=dict)


def read_record(directory: Path) -> dict[str, Any] | None:
    """cell.json of a cell's folder, or None."""
    path = directory / "cell.json"
    if not path.exists():
        return None
    try:
        record = read_json(path)
        fit(record, _Record, path)
    except ValueError as error:
        raise UserError(f"{error}: remove its folder to run the cell again") from None
    return record


def identity(
    cell: GridCell,
    prepared: Prepared,
    evaluation: Evaluation,
    parent: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that decides a cell's result: its settings, data, yardsticks, and all that decides its
    parent's. parent: the parent's identity; None: that with which it was run."""
    scoring = {f"study.evaluation.{k}": v for k, v in evaluation.model_dump().items()}
    about = {"data": prepared.fingerprint, "from": cell.parent}
    if cell.parent:
        parent = parent or (_parent_record(cell) or {"signature": {}})["signature"]
        about |= {f"from.{key}": value for key, value in parent.items() if key not in scoring}
    return signature(cell.settings) | scoring | about


def _parent_record(cell: GridCell) -> dict[str, Any] | None:
    return read_record(Path(cell.settings.training.start_from)) if cell.parent else None


def check_result(record: dict[str, Any], cell: GridCell) -> None:
    """ValueError where a finished cell's record lacks what a study shows of it."""
    fit(record["result"], _Finished, Path(cell.settings.logging.directory) / "cell.json")


def finished(
    cell: GridCell,
    prepared: Prepared,
    evaluation: Evaluation,
    parent: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The record of a cell that is done. ConfigError where what decides it has changed since.

    parent: the identity of its parent; None: that with which it was run. Where it was not, the cell
    is not done either.
    """
    record = read_record(Path(cell.settings.logging.directory))
    if record is None or (cell.parent and parent is None and not _parent_record(cell)):
        return None
    differences = changed(record["signature"], identity(cell, prepared, evaluation, parent))
    if differences:
        raise config.ConfigError(
            [
                f"cell {cell.key} was run with other settings: {'; '.join(differences)}. "
                "Restore them, give the cell another name, or remove its folder "
                f"{cell.settings.logging.directory}"
            ]
        )
    return record if "result" in record else None


def run(
    cell: GridCell,
    prepared,
    held: dict[str, list[Item]],
    evaluation: Evaluation,
    line: Line,
    grid: Grid,
    heartbeat: Heartbeat | None = None,
    lanes: int = 1,
) -> dict[str, Any] | None:
    """Train and score a cell, or continue one that was interrupted; returns its record.

    grid: all its processes call this; the main one writes, and the others get None. lanes: cells
    that run side by side with it, itself among them.
    """
    settings = cell.settings
    directory = Path(settings.logging.directory)
    record = {"key": cell.key, "signature": identity(cell, prepared, evaluation)}
    curve = directory / "heldout.jsonl"
    if grid.is_main:
        _write(directory / "cell.json", record)

    def hold_out(model, progress: Progress) -> None:
        scorer = Scorer(model, settings, prepared.tokenizer.vocabulary, evaluation.batch_rows)
        value = yardsticks.curve_point(scorer, held["validation"], evaluation)
        if grid.is_main:
            with curve.open("a") as file:
                file.write(json.dumps(_point(progress) | {"heldout": value}) + "\n")

    shares = tuple(np.linspace(0, 1, evaluation.points + 1))
    trainer = Trainer(
        settings,
        prepared,
        grid=grid,
        heartbeat=heartbeat,
        watch=line.step,
        hold_out=hold_out,
        shares=shares,
    )
    if grid.is_main:
        cut_back(curve, trainer.progress.step if trainer.progress.step else -1)
    progress = trainer.run(more=True)
    line.say("scoring held-out text")
    heldout = yardsticks.heldout_of(settings, trainer.engine, prepared, held["test"], evaluation)
    if not grid.is_main:
        return None
    about = {"fingerprint": prepared.fingerprint, "tokenizer": prepared.tokenizer.fingerprint}
    record |= {
        "result": result(cell, trainer, progress, heldout) | {"data": trained_on(prepared)},
        "environment": environment() | share(lanes) | about,
    }
    _write(directory / "cell.json", record)
    line.say(f"done  {summary(record['result'])}")
    return record


def summary(result: dict[str, Any]) -> str:
    """A finished cell in a few words."""
    held = result["heldout"]
    choice = held["choice_accuracy"]
    return (
        f"{result['steps']} steps  {held['continuation_bits_per_byte']:.3f} bits per byte"
        + (f"  choice {choice:.2f}" if choice is not None else "")
        + ("" if held["comparable"] else "  (pseudo-likelihood)")
    )


def trial(
    cell: GridCell,
    rate: float,
    share: float,
    prepared,
    held: dict[str, list[Item]],
    evaluation: Evaluation,
    line: Line,
    grid: Grid,
    heartbeat: Heartbeat | None = None,
) -> dict[str, Any]:
    """One trial of a learning rate: the validation value after `share` of the cell's budget.

    One that was interrupted continues; what other settings left there is removed. grid: all its
    processes call this.
    """
    settings = trial_settings(cell, rate, share)
    directory = Path(settings.logging.directory)
    mark = identity(replace(cell, settings=settings), prepared, evaluation)
    if found := finished_trial(cell, rate, share, prepared, evaluation):
        return found
    if grid.is_main:
        record = read_record(directory)
        if record and changed(record["signature"], mark):
            shutil.rmtree(directory)
        _write(directory / "cell.json", {"signature": mark})
    grid.barrier()
    trainer = Trainer(settings, prepared, grid=grid, heartbeat=heartbeat, watch=line.step)
    value = None
    try:
        trainer.run(more=True)
        scorer = Scorer(
            trainer.engine, settings, prepared.tokenizer.vocabulary, evaluation.batch_rows
        )
        items = held["validation"][: evaluation.documents]
        value = yardsticks.continuation_bits(scorer, items)
    except FloatingPointError as error:  # a rate that diverges has lost, and the sweep goes on
        line.say(str(error))
    found = {
        "cell": cell.name,
        "key": cell.key,
        "rate_key": rate_key(cell),
        "learning_rate": rate,
        "heldout": value,
        "flops": trainer.progress.flops,
    }
    if grid.is_main:
        _write(directory / "cell.json", {"signature": mark, "trial": found})
    line.say("done  diverged" if value is None else f"done  {value:.4f} bits per byte")
    return found


def finished_trial(
    cell: GridCell, rate: float, share: float, prepared: Prepared, evaluation: Evaluation
) -> dict[str, Any] | None:
    """What a trial that is done has found; None where it is not, or was of other settings."""
    settings = trial_settings(cell, rate, share)
    record = read_record(Path(settings.logging.directory))
    mark = identity(replace(cell, settings=settings), prepared, evaluation)
    return record.get("trial") if record and not changed(record["signature"], mark) else None


def trial_settings(cell: GridCell, rate: float, share: float) -> Settings:
    """Those of a cell with a rate to try and a share of its budget, in a folder of their own."""
    training, logging = cell.settings.training, cell.settings.logging
    folder = Path(logging.directory) / "tune" / f"rate-{rate:.3g}-share-{share:.3g}"
    budget = training.budget.model_copy(update={"amount": training.budget.amount * share})
    return cell.settings.model_copy(
        update={
            "training": training.model_copy(update={"learning_rate": rate, "budget": budget}),
            "logging": logging.model_copy(update={"directory": str(folder)}),
        }
    )


def result(cell: GridCell, trainer: Trainer, progress: Progress, heldout: dict[str, Any]) -> dict:
    """The cell's entry in results.json."""
    settings, model = cell.settings, cell.settings.model
    directory = Path(settings.logging.directory)
    losses = list(read_lines(directory / "metrics.jsonl"))
    last = [line["loss"] for line in losses[-max(1, len(losses) // 20) :]]
    last = [loss for loss in last if loss is not None]  # of a skipped step
    axes = catalogue.position_axes(settings.data.objective)
    rows = trainer.rows
    epochs = progress.step * settings.training.global_batch_size / rows.per_epoch
    return {
        "name": cell.name,
        "key": cell.key,
        "preset": model.preset,
        "architecture": model.architecture,
        "objective": settings.data.objective,
        "size": cell.size,
        "budget": cell.budget,
        "seed": cell.seed,
        "parent": cell.parent,
        "parameters": trainer.parameters,
        "non_embedding_parameters": non_embedding_parameter_count(model, axes),
        "flops": progress.flops,
        "inherited_flops": inherited_flops(cell),
        "palm_flops": progress.palm_flops,
        "seen_tokens": progress.seen_tokens,
        "target_tokens": progress.target_tokens,
        "steps": progress.step,
        "train_seconds": progress.seconds,
        "tokens_per_second": progress.seen_tokens / max(progress.seconds, 1e-9),
        "padding_share": 1 - progress.seen_tokens / max(progress.slots, 1),
        "truncated_share": rows.truncated_pairs / rows.pairs if rows.pairs else None,
        "epochs": epochs,
        "skipped_steps": progress.skipped,
        "final_loss": float(np.mean(last)) if last else None,
        "precision": settings.training.precision,
        "learning_rate": settings.training.learning_rate,
        "heldout": heldout,
        "curve": list(read_lines(directory / "heldout.jsonl")),
        "losses": [_loss_point(losses[i]) for i in _thin(len(losses))],
        "masks": masks(trainer),
        "settings": settings.model_dump(mode="json", by_alias=True, exclude={"study"}),
        "warnings": [],
    }


def inherited_flops(cell: GridCell) -> float:
    """What all its ancestors spent on the weights that a cell starts from."""
    before = (_parent_record(cell) or {}).get("result", {})
    return before.get("flops", 0.0) + before.get("inherited_flops", 0.0)


def trained_on(prepared: Prepared) -> dict[str, Any]:
    """Of the text that a cell trains on: where it is from, how much, and what was left out of it
    because the study holds it out."""
    kept = ("source", "train_documents", "train_tokens", "excluded_documents")
    return {key: prepared.manifest[key] for key in (*kept, "excluded_paragraphs")}


def masks(trainer: Trainer) -> list[dict[str, Any]]:
    """The parts of the run's first row, for the report to draw."""
    batch = trainer.steps.batch(range(1))
    names = catalogue.ARCHITECTURES[trainer.settings.model.architecture].streams
    drawn = []
    for name, stream in zip(names, batch.streams, strict=True):
        for kind, parts in (("self-attention", stream.parts), ("cross-attention", stream.cross)):
            if parts is not None:
                title = f"{name} {kind}" if len(names) > 1 else kind
                drawn.append(
                    {
                        "title": title,
                        "queries": parts.queries,
                        "keys": parts.keys,
                        "parts": [list(part) for part in parts.row(0)],
                    }
                )
    return drawn


def _point(progress: Progress) -> dict[str, Any]:
    return {"step": progress.step, "flops": progress.flops, "seconds": progress.seconds}


def _loss_point(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("step", "flops", "seconds", "loss")}


def _thin(length: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, length - 1, min(length, LOSS_POINTS))})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
