"""What tests of layouts compare: gradients and norm of the first step, losses of a short run."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megaarch import config
from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.ingest.prepare import prepare
from megaarch.training.trainer import Trainer
from tests.steps import forward_backward

STEPS = {
    "training.steps": 3
}  # the second shows the optimizer's state, the third what it adds to it
PRECISION = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Found:
    """losses: of the steps of a run. norm: of the first step's gradients, before clipping.
    gradients, weights: whole, by global name; of the first step, and after the run."""

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    counts: tuple[float, ...]


def settings_of(raw: dict[str, Any], preset: str, given: dict[str, Any]) -> Settings:
    """raw: of conftest. given: dotted settings."""
    mine = copy.deepcopy(raw)
    if preset:
        mine["model"]["preset"] = preset
    # AdamW moves an element whose gradient is rounding alone by the whole learning rate: with this
    # epsilon, which is above fp32's rounding of the gradients here, by almost nothing
    mine["training"] |= {"micro_batch_size": 2, "steps": 5, "warmup": 0.0, "epsilon": 1e-6}
    for name, value in given.items():
        config.set_path(mine, name, value)
    return config.resolve(mine)


def trainer_of(settings: Settings) -> Trainer:
    """A trainer in the layout of `settings.parallel`, on the processes that there are."""
    prepared = _prepared(settings.data, settings.model.vocabulary_size)
    return Trainer(settings, prepared, grid=Grid.build(settings.parallel, "cpu"))


@lru_cache
def _prepared_text(data: str, vocabulary_size: int):
    from megaarch.config.schema import Data

    return prepare(Data.model_validate_json(data), vocabulary_size)


def _prepared(data, vocabulary_size: int):
    return _prepared_text(data.model_dump_json(), vocabulary_size)


def run(
    raw: dict[str, Any], presets: list[str], given: dict[str, Any], precision: str = "fp32"
) -> dict[str, Found]:
    """The run of each preset, of STEPS where `given` names no number. Every rank returns what it holds;
    `merge` joins them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISION[precision])
    try:
        return {preset: _run(settings_of(raw, preset, STEPS | given)) for preset in presets}
    finally:
        torch.set_default_dtype(before)


def _run(settings: Settings) -> Found:
    trainer = trainer_of(settings)
    clip, before = trainer.engine.clip, []

    def seen(limit: float) -> torch.Tensor:
        if not before:  # the first step's gradients, as it clips them
            before.append({n: whole(p.grad) for n, p in trainer.model.named_parameters()})
            before.append(float(clip(0.0)))
        return clip(limit)

    trainer.engine.clip = seen
    losses = [trainer.step(trainer.steps[s]).loss for s in range(settings.training.steps)]
    gradients, norm = before
    progress = trainer.progress
    counts = (progress.flops, progress.palm_flops, progress.seen_tokens, progress.slots)
    return Found(losses, norm, gradients, weights(trainer), counts)


def zero_runs(raw: dict[str, Any], presets: list[str], given: dict[str, Any]) -> dict[str, Found]:
    """As run, with DeepSpeed as the engine."""
    return {preset: _zero_run(raw, preset, given) for preset in presets}


def _zero_run(raw: dict[str, Any], preset: str, given: dict[str, Any]) -> Found:
    """DeepSpeed clears gradients in the step that tells their norm, so the first step is a run of its own."""
    from deepspeed.utils import safe_get_full_grad

    first = given | {"training.optimizer": "sgd", "training.clip_gradient": 0.0}
    trainer = trainer_of(settings_of(raw, preset, first))
    loss = forward_backward(trainer, trainer.steps[0])
    gradients = {n: safe_get_full_grad(p).clone() for n, p in trainer.model.named_parameters()}
    norm, stepped = trainer.engine.update(trainer.optimizer, loss)
    assert stepped

    settings = settings_of(raw, preset, STEPS | given)
    trainer = trainer_of(settings)
    losses = [trainer.step(trainer.steps[s]).loss for s in range(settings.training.steps)]
    progress = trainer.progress
    counts = (progress.flops, progress.palm_flops, progress.seen_tokens, progress.slots)
    state, _ = trainer.engine.state(None)
    final = {name: whole(value) for name, value in state.items()}
    return Found(losses, float(norm), gradients, final, counts)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns the weights of this rank's part of the model, each whole."""
    return {n: whole(p.detach()) for n, p in trainer.model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard; every rank takes part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def merge(ranks: list[dict[str, Found]]) -> dict[str, Found]:
    """Parameters of all ranks (pipeline stages hold some each); the rest must agree."""
    merged = {}
    for preset, first in ranks[0].items():
        for other in ranks[1:]:
            assert other[preset].losses == first.losses, "ranks report different losses"
            assert other[preset].norm == first.norm and other[preset].counts == first.counts
            for name, value in other[preset].gradients.items():
                assert torch.equal(first.gradients.setdefault(name, value), value), name
            for name, value in other[preset].weights.items():
                first.weights.setdefault(name, value)
        merged[preset] = first
    return merged


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


@dataclass
class Differences:
    """The largest of each kind; gradient, norm and weight relative, loss in nats."""

    gradient: float = 0.0
    norm: float = 0.0
    loss: float = 0.0
    weight: float = 0.0


def differences(found: Found, wanted: Found) -> tuple[Differences, dict[str, str]]:
    """Returns how far a run is from one process, and where each difference is the largest."""
    assert found.gradients.keys() == wanted.gradients.keys()
    assert found.counts == wanted.counts, "the runs count their work differently"
    largest, where = Differences(), {}

    def see(kind: str, value: float, place: str) -> None:
        if not value <= getattr(largest, kind):  # NaN too
            setattr(largest, kind, value)
            where[kind] = place

    for name, value in wanted.gradients.items():
        # a gradient that is exactly zero has to be so in every layout
        zero = value.norm() == 0 and found.gradients[name].norm() == 0
        see("gradient", 0.0 if zero else distance(found.gradients[name], value), name)
    see("norm", abs(found.norm / wanted.norm - 1), "")
    for step, (a, b) in enumerate(zip(found.losses, wanted.losses, strict=True)):
        see("loss", abs(a - b) / max(1.0, abs(b)), f"step {step + 1}: {a} for {b}")
    for name, value in wanted.weights.items():
        see("weight", distance(found.weights[name], value), name)
    return largest, where


def compare(found: Found, wanted: Found, place: str, limit: float, weights: float = 1e-4) -> float:
    """Asserts that a run equals one process; returns the largest difference of a gradient."""
    largest, where = differences(found, wanted)
    for kind in ("gradient", "norm", "loss", "weight"):
        value, bound = getattr(largest, kind), weights if kind == "weight" else limit
        assert value < bound, f"{place}: {kind} differs by {value:.2g} ({where[kind]})"
    return largest.gradient
