"""A trained run, opened: the model of its newest checkpoint, or of the one that is given, in the layout of
the processes at hand."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaarch import config
from megaarch.checkpoint import checkpoint
from megaarch.checkpoint.record import CheckpointRecord
from megaarch.checkpoint.retention import complete
from megaarch.config.schema import Settings
from megaarch.distributed import launch
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import NativeEngine
from megaarch.errors import UserError
from megaarch.parallel import float8
from megaarch.parallel.validate import join
from megaarch.training import memory_check
from megaarch.training.trainer import device_of

DEEPSPEED = ("engine", "zero_stage", "offload", "deepspeed_config")


@dataclass(frozen=True)
class Opened:
    """A run's weights in an engine. run: its folder, or the checkpoint's that was given. settings: as trained,
    where `open_run` was not told otherwise, but for the batch, which takes no step."""

    run: Path
    engine: NativeEngine
    settings: Settings
    record: CheckpointRecord
    grid: Grid

    def as_trained(self) -> Settings:
        """Returns the settings of training, but for what the processes at hand decide."""
        return _settings(self.record.raw_settings(), (), self.run, {})


def open_run(
    run: Path,
    overrides: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    check: Callable[[Settings], None] = lambda settings: None,
) -> Opened:
    """Opens the run that `run` names (`run_folder`). One process holds the whole model; several take the
    run's layout, or what overrides say of it. torch runs it, whatever engine trained it.

    overrides: `--set` settings. training: settings of that section in place of the run's.
    check: raises a UserError for a layout that the caller does not serve, before anything is built.
    UserError where the folder has no complete checkpoint, or its model does not fit the memory or needs
    torchao, or a GPU's units for float8, that are not there.
    """
    run = run_folder(run)
    if not run.is_dir():
        raise UserError(f"{run} is no folder: give the folder of a run")
    raw = checkpoint.latest_settings(run)
    if raw is None:
        raise UserError(f"{run} has no complete checkpoint: {checkpoint.WANTED}")
    settings = _settings(raw, overrides, run, training or {})
    check(settings)
    device = device_of(settings)
    if device.type == "cuda":
        float8.check(settings.training, device)
    else:  # whose products of float8 are slow, and serve to score
        float8.check_package(settings.training)
    memory_check.check_weights(settings, device)
    grid = join(settings, device)
    path = checkpoint.find(run, grid)
    saved = checkpoint.read_record(path)
    settings = _settings(saved.raw_settings(), overrides, run, training or {})
    engine = NativeEngine(settings, grid)
    checkpoint.load(path, engine, None)
    return Opened(run, engine, settings, saved, grid)


def run_folder(given: Path) -> Path:
    """Returns the folder of a run or of a checkpoint: the given one, or of STUDY/NAME the run that lies in
    STUDY/cells/NAME/SIZE-BUDGET-seedN. UserError where a path in a study names no run, several, or one that
    has no complete checkpoint."""
    if checkpoint.checkpoints(given):
        return given
    path = given.resolve()

    def shown(run: Path) -> Path:
        return run if given.is_absolute() else Path(os.path.relpath(run))

    studies = (p for p in [path, *path.parents][:4] if (p / "cells").is_dir())
    study = next((p for p in studies if (p / "study.yaml").is_file()), None)
    if study is None:
        return given
    cells, named = study / "cells", path.relative_to(study).parts
    named = named[1:] if named[:1] == ("cells",) else named
    runs = sorted(p for p in cells.glob("*/*") if p.is_dir())
    found = [p for p in runs if p.relative_to(cells).parts[: len(named)] == named]
    if len(found) == 1 and named:
        if complete(found[0] / "checkpoints"):
            return shown(found[0])
        raise UserError(
            f"{shown(found[0])} has no complete checkpoint yet: megaarch status tells how far it is"
        )
    what = f"names {len(found) or 'no'} runs of the study {shown(study)}" if named else "is a study"
    listed = [f"\n  {shown(p)}" for p in found or runs if complete(p / "checkpoints")]
    if not listed:
        raise UserError(f"{given} {what}, and none has a complete checkpoint yet")
    raise UserError(f"{given} {what}: give one of them:{''.join(listed)}")


def _settings(
    raw: config.Raw, overrides: Sequence[str], run: Path, training: Mapping[str, Any]
) -> Settings:
    raw = copy.deepcopy({name: section for name, section in raw.items() if name != "study"})
    if launch.find()[1].world_size == 1:
        raw.pop("parallel", None)
    for name in DEEPSPEED:
        raw.get("parallel", {}).pop(name, None)
    raw["training"] |= training
    raw["logging"]["profile_from"] = 0  # no steps are traced, on ranks that may not be there
    for text in overrides:
        config.set_path(raw, *config.parse_override(text))
    # no step is taken: a batch of rows would have to divide among these ranks, one of tokens need not
    raw["training"].pop("global_batch_size", None)
    raw["training"]["global_batch_tokens"] = raw["training"].get("global_batch_tokens") or 1
    return config.resolve(raw, str(run))
