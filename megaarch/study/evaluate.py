"""`megaarch evaluate`: the yardsticks of one trained run, from its newest checkpoint."""

from pathlib import Path
from typing import Any

from megaarch import config
from megaarch.data.prepare import prepare
from megaarch.settings import Evaluation, Settings
from megaarch.study import yardsticks
from megaarch.study.items import cut
from megaarch.training import checkpoint
from megaarch.training.trainer import build_model, device_of


def evaluate_run(run: Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Scores of the run in folder `run` on its held-out text.

    overrides: `--set` settings, e.g. data.source to score other text. ValueError where the
    folder has no complete checkpoint.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: give the folder of a run")
    path = checkpoint.newest(run)
    if path is None:
        raise ValueError(f"{run} has no complete checkpoint: give the folder of a trained run")
    raw = checkpoint.read_progress(path)["settings"]
    for text in overrides:
        config.set_path(raw, *config.parse_override(text))
    settings = config.resolve({k: v for k, v in raw.items() if k != "study"}, str(run))
    evaluation = Evaluation()
    model = build_model(settings.model, settings.data.objective).to(device_of(settings))
    checkpoint.load(path, model, None)
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    if not prepared.heldout:
        raise ValueError("data.source: this data has no held-out text to score")
    return score(settings, model, prepared, evaluation)


def score(settings: Settings, model, prepared, evaluation: Evaluation) -> dict[str, Any]:
    """All yardsticks over all held-out documents."""
    items = cut(prepared.heldout, prepared.tokenizer, evaluation)
    return yardsticks.heldout_of(settings, model, prepared, items, evaluation)
