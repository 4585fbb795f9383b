"""Runs one cell of a study: trains it to its budget, scores it and keeps its record; or one trial of
a sweep on it."""

import shutil
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megaarch.checkpoint.record import Progress
from megaarch.config import catalogue
from megaarch.config.fingerprint import changed_settings
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.evaluation import tasks, yardsticks
from megaarch.evaluation.heldout_scores import Heldout
from megaarch.evaluation.items import Item
from megaarch.evaluation.rank_classification import target_bits
from megaarch.evaluation.scorer import Scorer
from megaarch.ingest.prepared_data import Prepared
from megaarch.study.cells import StudyCell
from megaarch.study.environment import machine
from megaarch.study.folder import StudyFolder
from megaarch.study.progress_bar import ProgressBar
from megaarch.study.rate_law import place_of
from megaarch.study.results import (
    CellRecord,
    CellResult,
    CurvePoint,
    Divergence,
    Environment,
    LossPoint,
    Mask,
    Text,
    Trial,
    read_points,
)
from megaarch.study.start import inherited, parent_diverged, parent_record
from megaarch.study.sweep_grid import RATE
from megaarch.training.metrics import HELD_OUT
from megaarch.training.trainer import Trainer

LOSS_POINTS = 200
VALIDATION_PAIRS = 512


@dataclass(frozen=True)
class Setup:
    """A cell, or a trial, and the surroundings that it runs in.

    grid: its processes, all of which run it; the main one writes. lanes: how many cells run side by side, itself
    among them.
    """

    folder: StudyFolder
    cell: StudyCell
    bar: ProgressBar
    grid: Grid
    heartbeat: Heartbeat | None = None
    lanes: int = 1

    @property
    def prepared(self) -> Prepared:
        """What it trains on."""
        return self.folder.text_of(self.cell)

    @cached_property
    def held(self) -> dict[str, list[Item]]:
        """Held-out items by use."""
        return self.folder.held_out(self.cell.settings.model.vocabulary_size)

    def trainer(self, **more) -> Trainer:
        return Trainer(
            self.cell.settings,
            self.prepared,
            grid=self.grid,
            heartbeat=self.heartbeat,
            watch=self.bar.update,
            **more,
        )

    def scorer(self, model) -> Scorer:
        vocabulary, rows = (
            self.prepared.tokenizer.vocabulary,
            self.folder.study.evaluation.batch_rows,
        )
        return Scorer(model, self.cell.settings, vocabulary, rows, self.folder.room)

    def validation_bits(self, scorer: Scorer) -> float | None:
        """Returns the bits per byte by which a sweep chooses: of what the cell is trained to predict."""
        pairs = self.prepared.heldout_pairs
        if catalogue.OBJECTIVES[scorer.objective].of_pairs and pairs:
            return target_bits(scorer, self.prepared.tokenizer, pairs[:VALIDATION_PAIRS])
        items = self.held["validation"][: self.folder.study.evaluation.documents]
        return yardsticks.continuation_bits(scorer, items)


def run(setup: Setup) -> CellRecord | None:
    """Trains and scores a cell, or continues one that was interrupted. Returns its record; None on
    other processes than the main one."""
    cell, prepared, grid = setup.cell, setup.prepared, setup.grid
    evaluation, held = setup.folder.study.evaluation, setup.held
    record = CellRecord(key=cell.key, signature=setup.folder.identity(cell))
    if parent_diverged(cell):
        said = f"starts from {cell.parent}, which diverged"
        return _diverged(setup, record, Divergence(said=said, parent=cell.parent))
    if grid.is_main:
        record.write(cell.folder)

    def curve_point(model, _: Progress) -> float:
        return yardsticks.curve_point(setup.scorer(model), held["validation"], evaluation)

    shares = tuple(np.linspace(0, 1, evaluation.points + 1))
    trainer = setup.trainer(hold_out=curve_point, shares=shares)
    try:
        progress = trainer.run(more=True)
    except FloatingPointError as error:  # a result too: the study goes on and says so
        step, limit = trainer.progress.step + 1, cell.settings.training.skip_limit
        return _diverged(setup, record, Divergence(said=str(error), step=step, skip_limit=limit))
    setup.bar.set_text("scoring held-out text")
    scorer = setup.scorer(trainer.engine)
    heldout = yardsticks.evaluate(scorer, held["test"], evaluation)
    trained = tasks.trained_on(cell.settings.data)
    if (before := parent_record(cell)) and before.result:
        trained |= {name for name, task in before.result.heldout.tasks.items() if task.trained_on}
    heldout.tasks = tasks.score(scorer, prepared.tokenizer, evaluation, trained)
    if not grid.is_main:
        return None
    found = result(cell, trainer, progress, heldout, prepared)
    environment = Environment(
        **dict(machine()),
        threads=torch.get_num_threads(),
        lanes=setup.lanes,
        fingerprint=prepared.fingerprint,
        tokenizer=prepared.tokenizer.fingerprint,
    )
    record = record.model_copy(update={"result": found, "environment": environment})
    record.write(cell.folder)
    setup.bar.set_text(f"done  {summary(record)}")
    return record


def _diverged(setup: Setup, record: CellRecord, gone: Divergence) -> CellRecord | None:
    """Keeps and returns the record of a cell that diverged, or whose parent did; None on other processes than the
    main one."""
    if not setup.grid.is_main:
        return None
    record = record.model_copy(update={"diverged": gone})
    record.write(setup.cell.folder)
    setup.bar.set_text(summary(record))
    return record


def summary(record: CellRecord) -> str:
    """A cell that has ended in a few words."""
    if gone := record.diverged:
        return f"not run  {gone.said}" if gone.parent else f"diverged  {gone.said}"
    result = record.get_result()
    heldout = result.heldout
    bits, choice = heldout.continuation_bits_per_byte, heldout.choice_accuracy
    return (
        f"{result.steps} steps  "
        + ("no value" if bits is None else f"{bits:.3f} bits per byte")
        + (f"  choice {choice:.2f}" if choice is not None else "")
        + ("" if heldout.comparable else "  (pseudo-likelihood)")
    )


def trial(setup: Setup) -> CellRecord:
    """One trial of a sweep: the validation value at its end, in bits per byte of continuations, or of the targets of
    a cell of pairs.

    One that was interrupted continues; what other settings left there is removed, and the checkpoints of
    one that is done. There is none where the cell's parent diverged. All processes of the cell's layout call this.
    """
    cell, choice, grid = setup.cell, setup.cell.choice, setup.grid
    assert choice is not None
    mark, kept = setup.folder.identity(cell), cell.folder / "checkpoints"
    if parent_diverged(cell):
        return CellRecord(signature=mark)
    if found := setup.folder.finished_trial(cell):
        if grid.is_main:
            shutil.rmtree(kept, ignore_errors=True)
        return CellRecord(signature=mark, trial=found)
    if grid.is_main:
        record = CellRecord.read(cell.folder)
        if record and changed_settings(record.signature, mark):
            shutil.rmtree(cell.folder)
        CellRecord(signature=mark).write(cell.folder)
    grid.barrier()
    trainer = setup.trainer()
    value = None
    try:
        trainer.run(more=True)
        value = setup.validation_bits(setup.scorer(trainer.engine))
    except FloatingPointError as error:  # a rate that diverges has lost, and the sweep goes on
        setup.bar.set_text(str(error))
    parameters, budget = place_of(cell)
    found = Trial(
        cell=cell.name,
        key=cell.key,
        rate_key=cell.rate_key,
        learning_rate=choice[RATE],
        more={axis: value for axis, value in choice.items() if axis != RATE},
        heldout=value,
        flops=trainer.progress.flops,
        parameters=parameters,
        budget=budget,
    )
    record = CellRecord(signature=mark, trial=found)
    if grid.is_main:
        record.write(cell.folder)
        shutil.rmtree(kept, ignore_errors=True)
    setup.bar.set_text("done  diverged" if value is None else f"done  {value:.4f} bits per byte")
    return record


def result(
    cell: StudyCell, trainer: Trainer, progress: Progress, heldout: Heldout, prepared: Prepared
) -> CellResult:
    """The cell's entry in results.json."""
    settings, model = cell.settings, cell.settings.model
    own, points = progress.since(trainer.inherited), losses(cell, trainer.inherited)
    last = [point.loss for point in points[-max(1, len(points) // 20) :]]
    last = [loss for loss in last if loss is not None]  # of a skipped step
    thinned = sorted(
        {int(i) for i in np.linspace(0, len(points) - 1, min(len(points), LOSS_POINTS))}
    )
    rows = trainer.rows
    inherited_flops, inherited_tokens = inherited(cell)
    counts = {name: getattr(prepared.manifest, name) for name in Text.OF_A_CELL}
    return CellResult(
        name=cell.name,
        key=cell.key,
        preset=model.preset,
        architecture=model.architecture,
        objective=settings.data.objective,
        size=cell.size,
        budget=cell.budget,
        seed=cell.seed,
        parent=cell.parent,
        adaptation=cell.adaptation,
        parameters=trainer.parameters,
        non_embedding_parameters=place_of(cell)[0],
        flops=own.flops,
        inherited_flops=inherited_flops,
        inherited_tokens=inherited_tokens,
        palm_flops=own.palm_flops,
        seen_tokens=own.seen_tokens,
        target_tokens=own.target_tokens,
        steps=own.step,
        train_seconds=own.seconds,
        tokens_per_second=own.seen_tokens / max(own.seconds, 1e-9),
        padding_share=1 - own.seen_tokens / max(own.slots, 1),
        truncated_share=rows.truncated_share,
        epochs=trainer.steps.samples(progress.step).start / rows.per_epoch,
        skipped_steps=own.skipped,
        final_loss=float(np.mean(last)) if last else None,
        precision=settings.training.precision,
        learning_rate=settings.training.learning_rate,
        heldout=heldout,
        curve=list(read_points(cell.folder / HELD_OUT, CurvePoint)),
        losses=[points[i] for i in thinned],
        masks=masks(trainer),
        settings=settings.model_dump(mode="json", by_alias=True, exclude={"study"}),
        data=Text.model_validate(counts),
    )


def losses(cell: StudyCell, inherited: Progress) -> list[LossPoint]:
    """The loss of each step, over the FLOPs and seconds of the cell's own run."""
    points = list(read_points(cell.folder / "metrics.jsonl", LossPoint))
    for point in points:
        point.flops -= inherited.flops
        point.seconds -= inherited.seconds
    return points


def masks(trainer: Trainer) -> list[Mask]:
    """The parts of the run's first row, for the report to draw."""
    batch = trainer.steps.batch(range(1))
    names = catalogue.ARCHITECTURES[trainer.settings.model.architecture].streams
    drawn = []
    for name, stream in zip(names, batch.streams, strict=True):
        for kind, parts in (("self-attention", stream.parts), ("cross-attention", stream.cross)):
            if parts is not None:
                title = f"{name} {kind}" if len(names) > 1 else kind
                rows = [list(part) for part in parts.row(0)]
                drawn.append(Mask(title=title, queries=parts.queries, keys=parts.keys, parts=rows))
    return drawn
