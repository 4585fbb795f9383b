"""A few new tokens through all layers in one compiled call: as the layers compute them one by one, for all
that a layer can be, and the layers themselves where the call does not serve."""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megaarch.inference.decode import Decoding
from megaarch.kernels import decode as kernel
from tests.inference.models import CHUNKED, GENERATING, made, started
from tests.kernels.problems import REASON
from tests.model.decode_steps import CLOSE, STEPS, answered, check_steps, compare

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each call of the kernel ran."""
    counted = []

    def run(structures, step, x):
        counted.append(step.tokens)
        kernel_run(structures, step, x)

    kernel_run = kernel.run
    monkeypatch.setattr(kernel, "run", run)
    return counted


OPTIONS = {
    "heads of their own keys": {"kv_heads": 4},
    "one key head": {"kv_heads": 1},
    "post-norm and biases": {
        "normalization_position": "post",
        "final_normalization": False,
        "normalization": "layernorm",
        "bias": True,
    },
    "odd sizes": {"hidden_size": 36, "feed_forward_size": 50, "head_size": 12},
    "a scale": {"attention_scale": 0.3},
    **{of: {"activation": of} for of in ("swiglu", "geglu", "gelu", "gelu_tanh", "relu")},
    **{of: {"position_encoding": of} for of in ("rope", "relative", "learned", "none")},
}


CASES = [
    (preset, name)
    for preset in GENERATING
    for name in OPTIONS
    if (preset, name) != ("glm", "relative")  # which has one axis
]


@pytest.mark.parametrize(("preset", "name"), CASES)
def test_steps_equal_the_layers_one_by_one(preset, name, calls, monkeypatch):
    check_steps(preset, OPTIONS[name], monkeypatch)
    assert len(calls) >= STEPS


@pytest.mark.parametrize("preset", CHUNKED)
def test_chunks_of_prompts_equal_the_layers_one_by_one(preset, calls, monkeypatch):
    check_steps(preset, {}, monkeypatch, chunk=4)
    if preset in ("gpt", "bart"):  # the others' decoders begin with one token
        assert 16 in calls


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_work(threads, calls):
    model, settings = made("t5", torch.float32)
    one, cache = answered(model, settings)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, other = answered(model, settings)
    finally:
        torch.set_num_threads(before)
    assert calls
    compare(found, other, one, cache)


def test_layers_with_hooks_run_one_by_one(calls):
    model, settings = made("gpt", torch.float32)
    wanted, _ = answered(model, settings)
    calls.clear()
    seen = []
    model.layers["1"].feed_forward.register_forward_hook(lambda *_: seen.append(1))
    found, _ = answered(model, settings)
    assert len(seen) == 1 + STEPS and not calls
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kernel_name", ["sdpa", "reference"])
def test_another_attention_kernel_is_run(kernel_name, calls):
    answered(*made("gpt", torch.float32, attention=kernel_name))
    assert not calls


def test_double_precision_and_many_tokens_run_one_by_one(calls):
    answered(*made("gpt", torch.float64))
    model, settings = made("gpt", torch.float32)
    decoding, prefixes = started(model, settings)
    with torch.no_grad():
        decoding.start()
    assert sum(map(len, prefixes)) > kernel.FEW and not calls


def test_a_flop_counter_sees_the_products(calls):
    model, settings = made("gpt", torch.float32)
    decoding, _ = started(model, settings)
    with torch.no_grad():
        decoding.start()
        decoding.step(np.full(4, 7))
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            decoding.step(np.full(4, 7))
        assert counter.get_total_flops() > 0 and not calls
        decoding.step(np.full(4, 7))
        assert calls == [4]


def test_gradients_flow_through_a_step(calls, monkeypatch):
    """An answer is made without gradients; where they are wanted, the layers run one by one."""
    monkeypatch.setattr(Decoding, "_run", inspect.unwrap(Decoding._run))
    model, settings = made("gpt", torch.float32)
    decoding, _ = started(model, settings)
    with torch.no_grad():
        decoding.start()
    calls.clear()
    decoding.step(np.full(4, 7)).sum().backward()
    assert not calls
    assert model.layers["0"].feed_forward.down.weight.grad is not None


def test_weights_that_move_during_an_answer_leave_it_whole():
    model, settings = made("gpt", torch.float32)
    wanted, _ = answered(copy.deepcopy(model), settings)
    decoding, _ = started(model, settings)
    with torch.no_grad():
        found = [decoding.start(), decoding.step(np.random.default_rng(1).integers(7, 20, size=4))]
        for p in model.parameters():
            p.data = p.data.clone()
        rng = np.random.default_rng(1)
        rng.integers(7, 20, size=4)
        found.append(decoding.step(rng.integers(7, 20, size=4)))
    for a, b in zip(found, wanted[:3], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("inputs", [1, 7, 8, 33, 64])
@pytest.mark.parametrize("outputs", [1, 11, 12, 13, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_equal_torchs_product(rows, inputs, outputs, biased):
    g = torch.Generator().manual_seed(rows * inputs + outputs)
    x, weight, bias = (
        torch.randn(s, generator=g) for s in ((rows, inputs), (outputs, inputs), outputs)
    )
    bias = bias if biased else None
    found = kernel.few_rows(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_few_rows_of_strided_operands():
    x, weight = torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8, 5).t()
    torch.testing.assert_close(kernel.few_rows(x, weight), F.linear(x, weight), **CLOSE)
