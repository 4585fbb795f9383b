"""Checkpoints: complete or absent, verified, layout-free (torch.distributed.checkpoint).

run/checkpoints/step-00000100/   state/       weights and optimizer, by parameter name (storage.py)
                                 progress.json  totals, settings, data fingerprint
                                 manifest.json  size and checksum of every file
run/checkpoints/latest           the name of the newest complete one; moved last

Every process reads files as large as its share of the state: those that it wrote, to seal them,
and an equal part of all, to verify a checkpoint that is taken up.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from megaarch.checkpoint import manifest, storage
from megaarch.checkpoint.lazy import Lazy, Weights, like
from megaarch.checkpoint.manifest import Manifest
from megaarch.checkpoint.record import PROGRESS, CheckpointRecord, read_record
from megaarch.checkpoint.retention import ASIDE, complete, prune, sweep
from megaarch.distributed.mesh import ALONE, Grid
from megaarch.engine.base import Engine
from megaarch.errors import StorageError, UserError, in_brief
from megaarch.files import replacing
from megaarch.model.weight_transfer import Origin, Origins
from megaarch.parallel import gradients
from megaarch.parallel.parallelize import shard_of

log = logging.getLogger(__name__)
WANTED = "give the folder of a trained run, or of one of its checkpoints"
# one process without a process group is a layout like any other
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def save_weights(run: Path, weights: Weights, record: CheckpointRecord) -> Path:
    """A checkpoint without an optimizer's state: for `training.start_from` and scoring, and not to
    be continued. weights: whole tensors by parameter name, each looked up once, as it is written."""
    path = place(run, record.progress.step)
    aside = begin(path)
    with written(path):
        storage.save(
            {"model": like(weights)},
            aside / "state",
            read=lambda name: weights[name.removeprefix("model.")],
        )
    put(aside, path, manifest.seal(aside), record.model_copy(update={"weights_only": True}))
    return path


def place(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / "checkpoints" / f"step-{step:08d}"


def begin(path: Path, grid: Grid = ALONE) -> Path:
    """The empty folder, beside `path`, that all processes write to."""
    aside = path.with_suffix(ASIDE)
    with grid.on_main() as main:
        if main:
            sweep(path.parent)
            aside.mkdir(parents=True)
    return aside


def state_of(engine: Engine, optimizer: Optimizer) -> storage.State:
    """What a checkpoint's state/ holds: this process's shards."""
    weights, state = engine.state(optimizer)
    return {"model": weights, "optimizer": state}


def put(
    aside: Path,
    path: Path,
    sealed: Manifest,
    record: CheckpointRecord,
    keep: int = 0,
    keep_every: int = 0,
    grid: Grid = ALONE,
) -> None:
    """Put a checkpoint in force that every process has sealed its files of; `latest` moves last,
    and then old ones go. grid: all its processes call this. sealed: what `seal` gave. keep, keep_every:
    which ones stay (retention.py)."""
    shares = grid.gather(sealed, grid.host_group)
    with grid.on_main() as main:
        if main:
            manifest.bind(
                aside, {name: entry for share in shares for name, entry in share.items()}, record
            )
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
            manifest.flush(path.parent)
            with replacing(path.parent / "latest") as mark:
                mark.write_text(path.name + "\n")
            prune(path.parent, path, keep, keep_every)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raises what torch reports of a rank that could not write a checkpoint as one sentence (OSError)."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        told = f"checkpoint {path} could not be written: rank {rank}: {in_brief(cause)}"
        raise StorageError(told) from error


def newest(run: Path, grid: Grid = ALONE) -> Path | None:
    """The newest complete checkpoint of a run, or None; a damaged one is named, skipped, the one
    before it used. UserError where there are only damaged ones.

    grid: all its processes call this, verify a share each, and get the same.
    """
    there, fault = [], None
    with grid.on_main() as main:
        if main:
            there = complete(run / "checkpoints")
    there = grid.share(there, grid.host_group)
    for path in reversed(there):
        fault = manifest.find_fault(path, grid)
        if fault is None:
            return path
        if path != there[0] and main:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, fault)
    if fault:
        raise UserError(
            f"checkpoint {there[0]} is damaged ({fault}), and there is none before it: bring it "
            "back, or remove the folder to start anew"
        )
    return None


def find(given: Path, grid: Grid = ALONE) -> Path:
    """Returns a complete checkpoint: `given`, or the newest of the run whose folder that is. UserError where
    there is none.

    grid: all its processes call this, verify a share each, and get the same.
    """
    if not (given / manifest.MANIFEST).exists():
        if (found := newest(given, grid)) is None:
            raise UserError(f"{given} has no complete checkpoint: {WANTED}")
        return found
    if fault := manifest.find_fault(given, grid):
        raise UserError(
            f"checkpoint {given} is damaged ({fault}): give the run's folder, and the newest sound one "
            "is taken"
        )
    return given


def checkpoints(given: Path) -> list[Path]:
    """Returns the checkpoint that this folder is, or those of the run whose folder it is, oldest first."""
    return [given] if (given / manifest.MANIFEST).exists() else complete(given / "checkpoints")


def locate(given: Path) -> Path:
    """Returns what `find` does where no checkpoint is damaged, and reads none. UserError where there is
    none."""
    if not (there := checkpoints(given)):
        raise UserError(f"{given} has no complete checkpoint: {WANTED}")
    return there[-1]


def latest_settings(run: Path) -> dict[str, Any] | None:
    """Returns the settings that a run's latest checkpoint, or the checkpoint `run`, was saved with, whether
    or not the rest of it is sound (that takes reading all of it: `newest`), or None where there is no
    checkpoint. UserError where no record of one can be read; it names the newest."""
    damaged = None
    for path in reversed(checkpoints(run)):
        try:
            return read_record(path).raw_settings()
        except (OSError, ValueError) as error:
            damaged = damaged or f"checkpoint {path} is damaged ({error})"
    if damaged:
        raise UserError(f"{damaged}, and there is no sound one: bring its {PROGRESS} back")
    return None


def load(
    path: Path, engine: Engine, optimizer: Optimizer | None, origins: Origins | None = None
) -> None:
    """Read weights (and the optimizer's state) into place, whatever layout they are in. All processes of the
    engine call this.

    origins: where parameters come from that are not the
    checkpoint's own; None: they are. UserError where the checkpoint's parameters are not the
    model's; a pipeline rank holds some of them only.
    """
    grid = engine.grid
    weights, state = engine.state(optimizer)
    origins = {name: Origin(name) for name in weights} if origins is None else origins
    whole = {name: w for name, w in weights.items() if name in origins and origins[name].whole}
    wanted: storage.State = {"model": whole}
    if optimizer:
        wanted["optimizer"] = state
    with grid.on_main():
        stored = storage.read_index(path / "state")
        index = stored.renamed(origins)
        _compare(path, index, whole, partial=grid.size("pp") > 1)
        try:
            values = storage.read(wanted, path / "state", index)
            for name in weights.keys() & (origins.keys() - whole.keys()):
                _fill(weights[name], origins[name], path, stored)
        except StorageError as error:
            raise StorageError(f"rank {grid.global_rank}: {error}") from error
    engine.load_state(weights, state | values.get("optimizer", {}), optimizer)


def _fill(weight: torch.Tensor, origin: Origin, path: Path, stored: storage.Index) -> None:
    """Set this process's part of a weight to rows of a checkpoint's tensor, or to zero."""
    own = gradients.local(weight)
    if origin.name is None:
        own.zero_()
        return
    value = storage.read_tensor(path / "state", f"model.{origin.name}", stored)[origin.rows]
    shard = shard_of(weight) or tuple(map(range, value.shape))
    own.copy_(value[tuple(slice(part.start, part.stop) for part in shard)])


def read_weights(path: Path) -> Lazy:
    """Whole tensors on the CPU by parameter name, whatever layout wrote them; each is read when it is looked
    up, with an OSError where it cannot be."""
    return storage.read_whole(path / "state", "model.")


def _compare(
    path: Path, index: storage.Index, weights: dict[str, torch.Tensor], partial: bool
) -> None:
    there = {
        name.removeprefix("model."): tuple(tensor.size)
        for name, tensor in index.tensors.items()
        if name.startswith("model.")
    }
    here = {name: tuple(p.shape) for name, p in weights.items()}
    wanted = here if partial else {**there, **here}
    names = [n for n in wanted if there.get(n) != here.get(n)]
    if names:
        name = names[0]
        raise UserError(
            f"checkpoint {path} is of another model: {name} is {there.get(name, 'absent')} there "
            f"and {here.get(name, 'absent')} here ({len(names)} parameters differ)"
        )
