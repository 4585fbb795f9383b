"""A trained run, opened to generate: its model, settings and tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from megaarch.checkpoint.record import CheckpointRecord
from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.model.transformer import Transformer
from megaarch.training.open_run import open_run as open_trained

OF_TRAINING = {"compile": False, "float8": None, "float8_emulate": False}  # left out here


def open_run(
    run: Path, overrides: Sequence[str] = (), tokenizer: str | None = None
) -> tuple[Transformer, Settings, Tokenizer, Grid]:
    """Returns the model of a run's newest checkpoint with its settings, tokenizer and processes.

    overrides, tokenizer and errors: as `Generator.of_run`.
    """
    found = open_trained(run, overrides, OF_TRAINING, _check_layout)
    words = tokenizer_of(found.record, found.settings, tokenizer, run)
    model = found.engine.model
    if found.grid.mesh is None and model.compute_dtype is not None:
        model.to(model.compute_dtype)  # once, and not at every step
    return model, found.settings, words, found.grid


def _check_layout(settings: Settings) -> None:
    for name in ("pipeline_parallel", "context_parallel"):
        if getattr(settings.parallel, name) > 1:
            raise UserError(
                f"parallel.{name}: generation runs under tensor and sharded data parallelism alone: set it "
                "to 1, or run one process, which reads a checkpoint of any layout"
            )


def tokenizer_of(
    saved: CheckpointRecord, settings: Settings, given: str | None, run: Path
) -> Tokenizer:
    """Returns the tokenizer of a run, from the file `given` where the run's own has moved. A relative path
    is one from where the run was started, a folder above it. UserError where the file is gone or is another
    one."""
    used = saved.tokenizer
    places = [Path(used.path), *(folder / used.path for folder in run.absolute().parents)]
    path = next((str(place) for place in places if place.is_file()), used.path)
    try:
        found = Tokenizer(given or path, settings.data.sentinels, settings.model.vocabulary_size)
    except UserError as error:
        if given or Path(path).exists():
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
