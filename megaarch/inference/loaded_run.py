"""A trained run, opened to generate: its model, settings and tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.ingest.trained_tokenizer import tokenizer_of
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
