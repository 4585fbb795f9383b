"""A trained run, opened to generate: its model, settings and tokenizer."""

import copy
from collections.abc import Sequence
from pathlib import Path

from megaarch import config
from megaarch.config.schema import Settings
from megaarch.data.tokenizer import Tokenizer
from megaarch.distributed import launch
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import NativeEngine
from megaarch.errors import UserError
from megaarch.model.transformer import Transformer
from megaarch.parallel.validate import join
from megaarch.training import checkpoint, fits
from megaarch.training.record import Record
from megaarch.training.trainer import device_of

OF_TRAINING = {"compile": False, "float8": None, "float8_emulate": False}  # left out here
DEEPSPEED = ("engine", "zero_stage", "offload", "deepspeed_config")


def open_run(
    run: Path, overrides: Sequence[str] = (), tokenizer: str | None = None
) -> tuple[Transformer, Settings, Tokenizer, Grid]:
    """Returns the model of a run's newest checkpoint with its settings, tokenizer and processes.

    overrides, tokenizer and errors: as `Generator.of_run`.
    """
    if not run.is_dir():
        raise UserError(f"{run} is no folder: give the folder of a run")
    lacking = f"{run} has no complete checkpoint: give the folder of a trained run"
    raw = checkpoint.latest_settings(run)
    if raw is None:
        raise UserError(lacking)
    settings = _settings(raw, overrides, run)
    _check_layout(settings)
    device = device_of(settings)
    fits.check_weights(settings, device)
    grid = join(settings, device)
    path = checkpoint.newest(run, grid)
    if path is None:
        raise UserError(lacking)
    saved = checkpoint.read_record(path)
    settings = _settings(saved.raw_settings(), overrides, run)
    words = _tokenizer(saved, settings, tokenizer)
    engine = NativeEngine(settings, grid)
    checkpoint.load(path, engine, None, grid)
    model = engine.model
    if grid.mesh is None and model.compute_dtype is not None:
        model.to(model.compute_dtype)  # once, and not at every step
    return model, settings, words, grid


def _settings(raw: config.Raw, overrides: Sequence[str], run: Path) -> Settings:
    raw = copy.deepcopy({name: section for name, section in raw.items() if name != "study"})
    if launch.find()[1].world_size == 1:
        raw.pop("parallel", None)
    for name in DEEPSPEED:  # torch runs it, whatever trained it
        raw.get("parallel", {}).pop(name, None)
    raw["training"] |= OF_TRAINING
    for text in overrides:
        config.set_path(raw, *config.parse_override(text))
    return config.resolve(raw, str(run))


def _check_layout(settings: Settings) -> None:
    for name in ("pipeline_parallel", "context_parallel"):
        if getattr(settings.parallel, name) > 1:
            raise UserError(
                f"parallel.{name}: generation runs under tensor and sharded data parallelism alone: set it "
                "to 1, or run one process, which reads a checkpoint of any layout"
            )


def _tokenizer(saved: Record, settings: Settings, given: str | None) -> Tokenizer:
    """UserError where the file is gone or is another one."""
    used = saved.tokenizer
    try:
        found = Tokenizer(
            given or used.path, settings.data.sentinels, settings.model.vocabulary_size
        )
    except UserError as error:
        if given or Path(used.path).exists():
            raise
        raise UserError(
            f"{error}: give the file that the run was trained with (--tokenizer)"
        ) from None
    if used.fingerprint is not None and found.fingerprint != used.fingerprint:
        raise UserError(
            f"tokenizer file {found.path} is not the one that the run was trained with: give that file "
            "(--tokenizer)"
        )
    return found
