"""What a dry run says of disk: the checkpoints that stay, and what is in one."""

import copy

import pytest
import torch

from megaarch.checkpoint import checkpoint
from megaarch.model.transformer import Transformer
from megaarch.study.cells import expand
from megaarch.study.costs import checkpoint_bytes, checkpoints, dry_run, most_checkpoints
from megaarch.training import optimizer
from megaarch.training.trainer import Trainer


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("width", [32, 512])  # below and above where Adafactor factors
@pytest.mark.parametrize("preset", ["t5", "glm"])
def test_a_checkpoint_holds_the_weights_and_what_the_optimizer_keeps(name, preset, width, tiny):
    settings = tiny(preset, training__optimizer=name, model__hidden_size=width)
    model = Transformer(settings.model, position_axes=2 if preset == "glm" else 1)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    built = optimizer.build(model, settings.training)
    built.step()
    kept = [
        value
        for state in built.state.values()
        for key, value in state.items()
        if key != "step" and torch.is_tensor(value)
    ]
    held = sum(tensor.numel() * 4 for tensor in [*model.parameters(), *kept])
    assert checkpoint_bytes(settings) == held


def saving(tiny, every, keep, keep_every):
    """Settings of a run of seven steps."""
    given = {"save_every": every, "keep_checkpoints": keep, "keep_every": keep_every}
    return tiny("gpt", training__steps=7, **{f"training__{name}": n for name, n in given.items()})


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "stay"),
    [(0, 2, 0, 1), (2, 2, 0, 2), (2, 0, 0, 4), (2, 1, 4, 2), (20, 3, 0, 1)],
)
def test_as_many_checkpoints_are_counted_as_stay(
    every, keep, keep_every, stay, tiny, prepared, tmp_path
):
    settings = saving(tiny, every, keep, keep_every)
    assert checkpoints(settings.training, 7) == stay
    Trainer(settings, prepared).run()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == stay


@pytest.mark.parametrize(
    ("every", "keep", "keep_every"), [(0, 2, 0), (2, 2, 0), (2, 1, 4), (2, 0, 0)]
)
def test_a_run_has_one_more_while_it_writes_the_next(
    every, keep, keep_every, tiny, prepared, tmp_path, monkeypatch
):
    settings = saving(tiny, every, keep, keep_every)
    honest, seen = checkpoint.prune, []

    def watched(folder, *given):
        seen.append(len(list(folder.glob("step-*"))))
        honest(folder, *given)

    monkeypatch.setattr(checkpoint, "prune", watched)
    Trainer(settings, prepared).run()
    assert most_checkpoints(settings.training, 7) == max(seen)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_fullest_disk_holds_the_sweep_or_all_cells_and_what_is_being_written(
    lanes, raw, tmp_path
):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["training"] |= {"save_every": 1, "keep_checkpoints": 1}
    cells = [
        {"name": name, "preset": "gpt"} for name in ("long-enough-to-be-cut-before-the-seed", "b")
    ]
    items = {"prefix_tokens": 12, "continuation_tokens": 6}
    mine["study"] = {"budgets": [1e9], "seeds": [0, 1], "lanes": lanes, "evaluation": items}
    mine["study"]["cells"] = cells
    lines = dry_run(mine, tmp_path).splitlines()
    named = {line.split()[0]: line for line in lines}
    assert {cell.key for cell in expand(mine, tmp_path)} <= named.keys()
    one = float(lines[1].split()[4])
    fullest = next(float(line.split()[-1]) for line in lines if line.startswith("disk at its"))
    assert fullest == pytest.approx((4 + lanes) * one, abs=0.3)
    mine["study"] |= {"cells": cells[:1], "seeds": [0], "tune": {"learning_rates": [1e-3, 2e-3]}}
    lines = dry_run(mine, tmp_path).splitlines()
    fullest = next(float(line.split()[-1]) for line in lines if line.startswith("disk at its"))
    assert fullest == pytest.approx(2 * lanes * one, abs=0.3)  # trials, in two lanes both of them
