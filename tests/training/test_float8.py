"""Training with float8 products, emulated; and what they are refused for."""

import importlib.metadata

import pytest
import torch

from megaarch import config
from megaarch.config.schema import Training
from megaarch.parallel import float8
from tests.distributed import runs

pytestmark = pytest.mark.slow

RECIPES = ("tensorwise", "rowwise")
HALF = {"training.precision": "bf16", "training.steps": 20, "training.global_batch_size": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half(raw, prepared):
    return runs.run(raw, ["gpt", "t5"], HALF)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_follow_bf16(recipe, raw, half):
    """20 losses within 5e-3 of bf16's, and others than these."""
    given = HALF | {"training.float8": recipe, "training.float8_emulate": True}
    found = runs.run(raw, ["gpt", "t5"], given)
    for preset in ("gpt", "t5"):
        apart = [abs(a / b - 1) for a, b in zip(found[preset].losses, half[preset].losses)]
        assert 0 < max(apart) < 5e-3, preset
        assert found[preset].losses[-1] < 0.9 * found[preset].losses[0]


def told(device=CPU, **given) -> str:
    with pytest.raises(ValueError) as caught:
        float8.check(Training(precision="bf16", **given), device)
    return str(caught.value)


def test_a_cpu_has_to_be_asked_to_emulate(tiny, prepared):
    from megaarch.training.trainer import Trainer

    sentence = told(float8="rowwise")
    assert "a CPU has no float8 units" in sentence and "float8_emulate=true" in sentence
    settings = tiny(training__float8="rowwise", training__precision="bf16")
    with pytest.raises(ValueError, match="a CPU has no float8 units"):
        Trainer(settings, prepared)
    float8.check(Training(precision="bf16", float8="rowwise", float8_emulate=True), CPU)
    float8.check(Training(), CPU)


@pytest.mark.parametrize("have", [None, "0.17.0", "0.9.0.dev1"])
def test_it_says_how_to_get_torchao(monkeypatch, have):
    def version(name):
        if have is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return have

    monkeypatch.setattr(float8, "version", version)
    sentence = told(float8="tensorwise", float8_emulate=True)
    assert "torchao 0.18 or newer" in sentence and "pip install 'megaarch[float8]'" in sentence
    assert (have or "not installed") in sentence


def test_a_gpu_without_units_is_refused(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 8.9" in told(gpu, float8="rowwise")
    for have in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=have: have)
        float8.check(Training(precision="bf16", float8="rowwise"), gpu)


def problems(given):
    raw = {"model": {}, "training": {"precision": "bf16", "float8": "tensorwise"}}
    for name, value in given.items():
        config.set_path(raw, name, value)
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(raw)
    return caught.value.problems


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"training.precision": "fp32"},
            "training.float8: what is not multiplied in float8 is bf16",
        ),
        ({"training.float8": "blockwise"}, "training.float8: must be one of tensorwise, rowwise"),
        (
            {"training.float8": None, "training.float8_emulate": True},
            "training.float8_emulate: belongs to training.float8",
        ),
        ({"parallel.engine": "deepspeed"}, "training.float8: not with deepspeed"),
        (
            {"parallel.schedule": "zero_bubble", "parallel.pipeline_parallel": 2},
            "training.float8: zero_bubble splits",
        ),
        (
            {"model.feed_forward_size": 680},
            "training.float8: float8 products need widths that are multiples of 16, and those of a "
            "layer's down are 680 and 256: change model.feed_forward_size",
        ),
        (
            {"model.feed_forward_size": 672, "parallel.tensor_parallel": 4},
            "a layer's down are 168 and 256 on each of 4 tensor ranks",
        ),
        (
            {"model.kv_heads": 1, "model.head_size": 8, "parallel.tensor_parallel": 4},
            "a layer's attention.qkv are 256 and 24 on each of 4 tensor ranks",
        ),
        (
            {"model.kv_heads": 2, "parallel.tensor_parallel": 4, "parallel.data_parallel_shard": 2},
            "training.float8: tensorwise gathers weights in float8, and 4 tensor ranks that share 2 ",
        ),
    ],
)
def test_what_it_does_not_go_with(given, sentence):
    given = {"model.feed_forward_size": 704, "training.global_batch_size": 16} | given
    (problem,) = problems(given)
    assert sentence in problem
