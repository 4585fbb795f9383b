"""Where a run begins: at its newest checkpoint, at the weights of another run, or at step 0."""

import logging
from pathlib import Path
from typing import NamedTuple

from torch.optim import Optimizer

from megaarch.checkpoint import checkpoint
from megaarch.checkpoint.record import (
    NO_PROGRESS,
    PROGRESS,
    SAMPLES,
    CheckpointRecord,
    Progress,
    read_record,
)
from megaarch.config.fingerprint import RESUMABLE, changed_settings
from megaarch.config.fingerprint import fingerprint as settings_fingerprint
from megaarch.config.schema import Model, Settings, Training
from megaarch.distributed.mesh import Grid
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.files import fit
from megaarch.model import weight_transfer
from megaarch.model.positions import position_scheme, scheme_fault
from megaarch.model.weight_transfer import Origins
from megaarch.training.limit import Limit
from megaarch.training.lr_schedule import limit_change

APART = 0x9E3779B97F4A7C15  # odd, so that no two generations of a seed share one
log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins: a checkpoint of its own, or of the run whose weights it starts from; path and
    record are None at step 0."""

    path: Path | None = None
    record: CheckpointRecord | None = None
    own: bool = False
    generation: int = 0

    @property
    def is_unscored(self) -> bool:
        """Whether a run of its own was saved, and ended before it scored held-out text at that step."""
        return self.own and self.record is not None and self.record.unscored

    def data_seed(self, seed: int) -> int:
        """Returns the seed of samples. A run that starts from weights draws others than all before it: with
        theirs it would read again what they have read, which is worth less, and for some objectives the
        very same samples."""
        return (seed + self.generation * APART) % 2**64


def find_start(settings: Settings, grid: Grid) -> Start:
    """Finds where a run begins. Every process calls it. UserError where there is a run that is not to be
    continued, or none to start from."""
    training, directory = settings.training, Path(settings.logging.directory)
    if (path := checkpoint.newest(directory, grid)) is not None:
        if not training.resume:
            raise UserError(
                f"training.resume: {directory} holds a run, up to {path.name}: remove it, or give "
                "another logging.directory"
            )
        record = read_record(path)
        return Start(path, record, True, record.generation)
    if not training.start_from:
        return Start()
    try:
        parent = checkpoint.find(Path(training.start_from), grid)
    except UserError as error:
        raise UserError(f"training.start_from: {error}") from None
    record = read_record(parent)
    return Start(parent, record, False, record.generation + (not training.start_optimizer))


def resume(
    start: Start,
    settings: Settings,
    fingerprint: str | None,
    tokenizer: str | None,
    engine: Engine,
    optimizer: Optimizer,
) -> tuple[Progress, Progress]:
    """Loads what a run begins with; returns its totals up to there and, of these, those that it has
    inherited (`training.start_optimizer`). Every process calls it.

    fingerprint, tokenizer: fingerprints of the data and of its tokenizer. UserError where the run
    cannot continue, or begin, from what is there.
    """
    training, path, saved = settings.training, start.path, start.record
    if path is None or saved is None:
        return NO_PROGRESS, NO_PROGRESS
    if start.own:
        _check_continued(path, saved, settings, fingerprint)
        checkpoint.load(path, engine, optimizer)
        limit = {name: saved.settings.training.get(name) for name in ("steps", "budget")}
        before = fit(training.model_dump() | limit, Training, path / PROGRESS)
        changes = limit_change(before, training, saved.progress), _unread_start(saved, training)
        for change in filter(None, changes if engine.grid.is_main else ()):
            log.warning("%s: %s", path, change)
        return saved.progress, saved.inherited or NO_PROGRESS
    origins = check_parent(path, saved, settings, tokenizer)
    if training.start_optimizer:
        _load_with_optimizer(path, engine, optimizer)
        return saved.progress, saved.progress
    checkpoint.load(path, engine, None, origins)
    return NO_PROGRESS, NO_PROGRESS


def _load_with_optimizer(path: Path, engine: Engine, optimizer: Optimizer) -> None:
    """Loads weights and the optimizer's state; its options stay those of the settings."""
    options = getattr(optimizer, "defaults", {})
    own = [{name: group[name] for name in options} for group in optimizer.param_groups]
    checkpoint.load(path, engine, optimizer)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def _unread_start(saved: CheckpointRecord, training: Training) -> str:
    """Says that a run which continues does not start from `training.start_from`, where that is not what it
    began with; else ""."""
    given, before = training.start_from, saved.settings.training.get("start_from")
    if not given or (before and Path(given).resolve() == Path(before).resolve()):
        return ""
    began = f"from {before}" if before else "with weights of its own"
    return (
        f"the run began {began} and continues, so that training.start_from={given} is not read: to start "
        "from it, give another logging.directory"
    )


def _check_continued(
    path: Path, saved: CheckpointRecord, settings: Settings, fingerprint: str | None
) -> None:
    """Raises UserError where a run under `settings` cannot continue the checkpoint at `path`."""
    if saved.weights_only:
        raise UserError(
            f"{path} holds weights alone and cannot be continued: give another "
            f"logging.directory, and start from it with training.start_from={path}"
        )
    if saved.fingerprint != fingerprint:
        raise UserError(
            f"{path} was trained on other data: its fingerprint is {saved.fingerprint} "
            f"and this data's is {fingerprint}; restore the data or use another "
            "logging.directory"
        )
    differences = changed_settings(
        settings_fingerprint(saved.raw_settings(), RESUMABLE),
        settings_fingerprint(settings, RESUMABLE),
    )
    if differences:
        raise UserError(
            f"{path} was trained with other settings: {'; '.join(differences.values())}; restore "
            "them, use another logging.directory, or start a new run from these weights "
            "with training.start_from"
        )
    if saved.samples_version() != SAMPLES:
        raise UserError(
            f"{path} was trained on samples of version {saved.samples_version()} of "
            f"{saved.settings.data.objective}, and this megaarch makes version {SAMPLES}: continue "
            "it with the megaarch that wrote it, or start a new run from these weights in another "
            f"logging.directory with training.start_from={path}"
        )


def _check_optimizer(
    found: Path, saved: CheckpointRecord, training: Training, origins: Origins
) -> None:
    """Raises UserError where a run under `training` cannot go on with this optimizer's state."""
    where, theirs = "training.start_optimizer", saved.settings.training.get("optimizer")
    if saved.weights_only:
        raise UserError(f"{where}: {found} holds weights alone: leave it out")
    if theirs != training.optimizer:
        raise UserError(
            f"{where}: {found} has the state of {theirs}, and training.optimizer is "
            f"{training.optimizer}: make them equal, or leave it out"
        )
    if moved := [name for name, origin in origins.items() if origin.name != name]:
        raise UserError(
            f"{where}: {found} has no state of {moved[0]}, which starts from other weights "
            f"({len(moved)} parameters): leave it out"
        )
    if (limit := Limit.of(training)).reached(saved.progress):
        raise UserError(
            f"{where}: {found} has already come to {limit}, for training.steps and training.budget "
            "count what the parent has spent too: raise them"
        )


def parent_settings(found: Path, saved: CheckpointRecord, settings: Settings) -> Settings:
    """Returns `settings` with the model and the objective of a checkpoint."""
    model = fit(saved.settings.model, Model, found / PROGRESS)
    data = settings.data.model_copy(update={"objective": saved.settings.data.objective})
    return settings.model_copy(update={"model": model, "data": data})


def check_parent(
    found: Path, saved: CheckpointRecord, settings: Settings, tokenizer: str | None
) -> Origins:
    """Returns where the model's parameters come from. UserError where tokens or positions mean
    something else to these weights, where they cannot become the model's, or where the run cannot
    take their optimizer's state along (`training.start_optimizer`)."""
    if saved.tokenizer.fingerprint != tokenizer:
        raise UserError(
            f"training.start_from: {found} was trained with another tokenizer: set "
            f"data.tokenizer={saved.tokenizer.path}"
        )
    parent = parent_settings(found, saved, settings)
    fault = scheme_fault(
        *(position_scheme(each.model, each.data.objective) for each in (parent, settings))
    )
    if fault:
        raise UserError(
            f"training.start_from: positions mean something else to the weights of {found}: {fault}"
        )
    try:
        origins = weight_transfer.origins(parent, settings)
    except UserError as error:
        raise UserError(f"training.start_from: {found}: {error}") from None
    if settings.training.start_optimizer:
        _check_optimizer(found, saved, settings.training, origins)
    return origins
