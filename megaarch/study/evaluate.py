"""`megaarch evaluate`: the yardsticks of one trained run, from its newest checkpoint."""

from pathlib import Path
from typing import Any

from megaarch import config
from megaarch.data.prepare import prepare
from megaarch.parallel import launch
from megaarch.parallel.mesh import Grid
from megaarch.parallel.replica import Replica
from megaarch.settings import Evaluation, Settings
from megaarch.study import yardsticks
from megaarch.study.items import cut
from megaarch.training import checkpoint
from megaarch.training.trainer import device_of


def evaluate_run(run: Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Scores of the run in folder `run` on its held-out text.

    overrides: `--set` settings, e.g. data.source to score other text. One process holds the whole
    model; several take the run's layout, or what overrides say of it, and return the same.
    ValueError where the folder has no complete checkpoint.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: give the folder of a run")
    path = checkpoint.newest(run)
    if path is None:
        raise ValueError(f"{run} has no complete checkpoint: give the folder of a trained run")
    saved = checkpoint.read_progress(path)
    raw = saved["settings"]
    if launch.find()[1].world_size == 1:
        raw.pop("parallel", None)
    for text in overrides:
        config.set_path(raw, *config.parse_override(text))
    settings = config.resolve({k: v for k, v in raw.items() if k != "study"}, str(run))
    data = settings.data
    if data.tokenizer is None and data.source != saved["settings"]["data"]["source"]:
        # other text, but the ids are those that the run was trained with
        data = data.model_copy(update={"tokenizer": saved["tokenizer"]["path"]})
    evaluation = fitted(settings.model.sequence_length)
    grid = Grid.join(settings, device_of(settings))
    replica = Replica(settings, grid)
    checkpoint.load(path, replica.model, None, grid)
    prepared = launch.first(lambda: prepare(data, settings.model.vocabulary_size))
    if prepared.tokenizer.fingerprint != saved["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"data.tokenizer: {run} was trained with another tokenizer, "
            f"{saved['tokenizer']['path']}: its scores would mean nothing; give that file"
        )
    if not prepared.heldout:
        raise ValueError("data.source: this data has no held-out text to score")
    return score(settings, replica, prepared, evaluation)


def fitted(row: int) -> Evaluation:
    """The default items, shortened where the run's rows of `row` tokens are too short for them."""
    usual = Evaluation()
    return usual.model_copy(
        update={
            "prefix_tokens": min(usual.prefix_tokens, max(row // 2, 1)),
            "continuation_tokens": min(usual.continuation_tokens, max(row // 8, 1)),
        }
    )


def score(settings: Settings, model, prepared, evaluation: Evaluation) -> dict[str, Any]:
    """All yardsticks over all held-out documents."""
    items = cut(prepared.heldout, prepared.tokenizer, evaluation)
    return yardsticks.heldout_of(settings, model, prepared, items, evaluation)
