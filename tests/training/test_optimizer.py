"""Schedules against their definitions, and what is said of optimizers that are not there."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from megaarch.checkpoint.record import NO_PROGRESS
from megaarch.config import ConfigError
from megaarch.config.schema import Training
from megaarch.parallel import validate
from megaarch.training import optimizer
from megaarch.training.limit import Limit
from megaarch.training.lr_schedule import learning_rate, unfinished_warmup


def rates(steps=1000, **given):
    training = Training(learning_rate=2.0, **given)
    return [learning_rate(training, s, s / steps) for s in range(1, steps + 1)]


def test_cosine_warms_up_peaks_and_ends_at_its_floor():
    curve = rates(schedule="cosine", warmup=0.1, minimum_learning_rate=0.1)
    assert curve[49] == pytest.approx(1.0)
    assert curve[99] == pytest.approx(2.0)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert curve[549] == pytest.approx(2.0 * middle)
    assert curve[-1] == pytest.approx(0.2)
    assert rates(schedule="cosine", warmup=100, minimum_learning_rate=0.1) == pytest.approx(curve)


def test_wsd_is_stable_and_then_falls_in_a_line():
    curve = rates(schedule="wsd", warmup=0.1, decay=0.2, minimum_learning_rate=0.0)
    assert curve[100:800] == pytest.approx([2.0] * 700)
    assert curve[899] == pytest.approx(1.0)
    assert curve[-1] == pytest.approx(0.0)


def test_inverse_square_root_is_t5s():
    training = Training(learning_rate=0.01, schedule="inverse_square_root", warmup=10000)
    for step in (1, 5000, 10000, 40000, 131072):
        rate = learning_rate(training, step, step / 131072)
        assert rate == pytest.approx(1 / math.sqrt(max(step, 10000)))


def test_constant_stays():
    assert rates(schedule="constant", warmup=0.01)[20:] == pytest.approx([2.0] * 980)
    assert rates(schedule="constant", warmup=0)[0] == 2.0


def test_a_run_that_ends_within_its_warmup_is_told():
    given = {"steps": 100, "learning_rate": 1e-3}
    said = unfinished_warmup(Training(warmup=200, **given))
    assert "ends after 100 of its 200 steps, at a learning rate of 5.00e-04" in said
    for more in (
        {"warmup": 100},
        {"warmup": 0.9},
        {"schedule": "inverse_square_root", "warmup": 1e4},
    ):
        assert unfinished_warmup(Training(**given | more)) == ""
    assert unfinished_warmup(Training(warmup=200)) == ""


def test_a_limit_is_reached_at_the_nearest_step():
    limit = Limit("flops", 100)
    assert not limit.reached(NO_PROGRESS.plus(step=9, flops=90))
    assert limit.reached(NO_PROGRESS.plus(step=10, flops=100))
    assert limit.reached(NO_PROGRESS.plus(step=9, flops=96))


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = optimizer.build(model, Training(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]


def test_apex_absent_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match="needs NVIDIA's apex, which is not installed"):
        optimizer.build(nn.Linear(2, 2), Training(optimizer="apex_adam"))


def test_the_unrelated_package_named_apex_is_recognized(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(ValueError, match="not NVIDIA's but an unrelated package"):
        optimizer.build(nn.Linear(2, 2), Training(optimizer="apex_adam"))


def test_apex_where_it_is_installed_runs_its_fused_adam(monkeypatch):
    class FusedAdam(torch.optim.AdamW):
        def zero_grad(self):  # as NVIDIA's has it
            super().zero_grad(set_to_none=True)

    package, inner = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    inner.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", inner)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built = optimizer.build(nn.Linear(2, 2), Training(optimizer="apex_adam", learning_rate=0.5))
    assert isinstance(built, FusedAdam) and built.defaults["lr"] == 0.5
    weight = built.param_groups[0]["params"][0]
    weight.grad = torch.ones_like(weight)
    built.zero_grad(set_to_none=True)  # as the engine and torch's checkpoints call it
    assert weight.grad is None


@pytest.mark.parametrize(
    "given, fits",
    [
        ({"parallel__pipeline_parallel": 2}, True),
        ({"parallel__tensor_parallel": 2}, False),
        ({"parallel__data_parallel_shard": 2}, False),
    ],
)
def test_apex_takes_parameters_that_no_layout_divides(given, fits, tiny):
    settings = tiny(training__optimizer="apex_adam", **given)
    if fits:
        validate.check(settings, 2)
    else:
        with pytest.raises(ConfigError, match="apex_adam takes whole parameters"):
            validate.check(settings, 2)
