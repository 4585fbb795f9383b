"""Kernels behind libraries that run on GPUs only: all but the library's own call, on the CPU."""

import inspect
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from megaarch.attention import (
    KERNELS,
    AttentionInputs,
    Kernel,
    Parts,
    RelativeBias,
    attend,
    causal,
    choose,
    cudnn,
    cudnn_ragged,
    full,
    key_intervals,
    varlen,
    warm,
)
from megaarch.attention.packages import Package
from megaarch.attention.plan import to_device
from megaarch.config.schema import AttentionKernel
from megaarch.errors import UserError
from tests.attention import emulation
from tests.attention.cases import CASES, chat, prefix
from tests.attention.emulation import StandIn
from tests.attention.partitions import partitions
from tests.attention.runs import assert_same, run, tensors, unread

pytestmark = pytest.mark.slow

FUNCTIONS = {
    "flash2": emulation.flash_attn_2,
    "flash3": emulation.flash_attn_3,
    "flash4": emulation.flash_attn_4,
    "cudnn_ragged": emulation.cudnn_sdpa,
    "torch_varlen": emulation.torch_varlen,
    "torch_varlen, 2.11": emulation.torch_varlen_2_11,
}


@pytest.fixture(params=FUNCTIONS)
def kernel(request, monkeypatch):
    """The name of a kernel that runs its stand-in on the CPU, in any dtype and head size."""
    name, on_cpu = request.param.partition(",")[0], {"devices": ("cpu",), "head_sizes": (256, 1)}
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    stand_in = StandIn(FUNCTIONS[request.param])
    monkeypatch.setitem(
        KERNELS, name, replace(KERNELS[name], package=stand_in, dtypes=dtypes, **on_cpu)
    )
    monkeypatch.setattr(cudnn_ragged, "ROWS", 7)
    return name


@pytest.fixture
def interval_library(monkeypatch):
    """cuDNN's flex attention, its stand-in, on the CPU."""
    library = {
        "package": StandIn(emulation.cudnn_flex),
        "plans": StandIn(emulation.cudnn_mask_plan),
    }
    anywhere = {"devices": None, "dtypes": None, "head_sizes": None}
    kernel = replace(KERNELS["cudnn_flex"], **library, **anywhere)
    monkeypatch.setitem(KERNELS, "cudnn_flex", kernel)


@pytest.fixture(params=[False, True])
def deterministic(request):
    """Both settings of torch.use_deterministic_algorithms."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def overlay(monkeypatch):
    """The cuDNN kernel on the CPU's own backend."""
    on_cpu = {"devices": ("cpu",), "dtypes": (torch.float64,), "head_sizes": (256, 1)}
    monkeypatch.setitem(KERNELS, "cudnn", replace(KERNELS["cudnn"], **on_cpu))


@pytest.mark.parametrize("name", CASES)
def test_varlen_equals_reference(kernel, name):
    parts = Parts.of(*CASES[name])
    assert_same(kernel, parts, *tensors(parts))
    assert_same(kernel, parts, *tensors(parts, heads=3, key_heads=3, size=5))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["packed prefixes", "cross", "two streams"])
def test_deterministic_runs_ask_for_a_deterministic_backward(kernel, name):
    """The stand-ins check it."""
    parts = Parts.of(*CASES[name])
    assert_same(kernel, parts, *tensors(parts))


@pytest.mark.usefixtures("interval_library", "deterministic")
@pytest.mark.parametrize("name", CASES)
def test_cudnn_flex_equals_reference(name):
    parts = Parts.of(*CASES[name])
    assert_same("cudnn_flex", parts, *tensors(parts))


@pytest.mark.usefixtures("interval_library")
def test_cudnn_flex_plans_once_a_batch(monkeypatch):
    made = []
    found = KERNELS["cudnn_flex"]
    stand_in = found.plans.function
    count = StandIn(lambda *given, **options: made.append(1) or stand_in(*given, **options))
    monkeypatch.setitem(KERNELS, "cudnn_flex", replace(found, plans=count))
    for _ in range(3):
        parts = Parts.of(*CASES["packed prefixes"])
        for _ in range(4):
            assert_same("cudnn_flex", parts, *tensors(parts))
    assert len(made) == 3


MIXED = Parts.of([prefix(p, 12) for p in (0, 5, 12)], 12, 12)


def assert_shards_same(kernel, heads, key_heads):
    """Two ranks of tp or cp hold half of the heads each; a key head of both is read by both."""
    q, k, v, grad = tensors(MIXED, heads, key_heads)
    expected = run("reference", MIXED, q, k, v, grad)
    found = [torch.zeros_like(x) for x in expected]
    for rank in range(2):
        mine = slice(rank * heads // 2, (rank + 1) * heads // 2)
        keys = slice(rank * key_heads // 2, rank * key_heads // 2 + max(key_heads // 2, 1))
        leaves = [x[:, :, h].requires_grad_() for x, h in ((q, mine), (k, keys), (v, keys))]
        out = attend(*leaves, MIXED, kernel=kernel)
        gradients = torch.autograd.grad(out, leaves, grad[:, :, mine])
        for whole, part, h in zip(found, (out.detach(), *gradients), (mine, mine, keys, keys)):
            whole[:, :, h] += part
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (4, 1), (2, 2)])
def test_shards_of_heads(kernel, heads):
    assert_shards_same(kernel, *heads)


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", ["sdpa", "cudnn"])
def test_shards_of_heads_through_sdpa(name, heads):
    assert_shards_same(name, *heads)


def test_grouped_keys_reach_the_library_as_they_are(kernel, monkeypatch):
    seen, found = [], KERNELS[kernel]
    stand_in = found.package.function

    def record(q, k, v, *arguments, **options):
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return stand_in(q, k, v, *arguments, **options)

    record.__signature__ = inspect.signature(stand_in)
    monkeypatch.setitem(KERNELS, kernel, replace(found, package=StandIn(record)))
    attend(*tensors(MIXED, heads=6, key_heads=2)[:3], MIXED, kernel=kernel)
    assert set(seen) == {(6, 2, 2)}


@pytest.mark.parametrize("name", CASES)
def test_padding_rows_reach_nothing(kernel, name):
    parts = Parts.of(*CASES[name])
    clean, (queries, keys) = tensors(parts), unread(parts)
    dirty = [x.clone() for x in clean]
    for x, rows in zip(dirty, (queries, keys, keys, queries)):
        x[rows] = float("nan")
    for a, b in zip(run(kernel, parts, *clean), run(kernel, parts, *dirty)):
        assert torch.equal(a, b)


@settings(max_examples=60, derandomize=True)
@given(case=partitions(longest=20), key_heads=st.sampled_from((1, 2)))
def test_random_partitions_by_segments(case, key_heads):
    parts = Parts.of(*case)
    flash2 = KERNELS["flash2"]
    try:
        KERNELS["flash2"] = replace(
            flash2,
            package=StandIn(emulation.flash_attn_2),
            devices=("cpu",),
            dtypes=(torch.float64,),
            head_sizes=(8, 1),
        )
        assert_same("flash2", parts, *tensors(parts, heads=2, key_heads=key_heads, size=3))
    finally:
        KERNELS["flash2"] = flash2


def test_segments_of_whole_rows_are_not_gathered():
    parts = Parts.of([prefix(p, 64) for p in (3, 30)], 64, 64)
    full_call, causal_call = varlen.plan(parts).calls
    assert causal_call.k.whole and causal_call.causal and not full_call.k.whole
    on_cpu = to_device(full_call.q, torch.device("cpu"))
    assert on_cpu.index().tolist() == [[*range(3), *range(64, 94)]]
    assert full_call.q.starts.tolist() == [0, 3, 33] and full_call.q.longest == 30
    assert causal_call.q.starts.tolist() == [0, 61, 95]
    assert causal_call.k.starts.tolist() == [0, 64, 128]
    assert varlen.plan(Parts.of([[causal(0, 8, 0, 8)]] * 3, 8, 8)).whole


def test_keys_of_several_turns_are_repeated():
    (call,) = varlen.plan(Parts.of([chat(2, 5)], 5, 5)).calls
    on_cpu = to_device(call.k, torch.device("cpu"))
    assert on_cpu.index().tolist() == [[0, 1, 0, 1, 2, 3, 4]] and not call.causal


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize("name", CASES)
def test_cudnn_overlay_equals_reference_or_says_why_not(name):
    parts = Parts.of(*CASES[name])
    arguments = tensors(parts)
    obstacle = KERNELS["cudnn"].cannot_run(AttentionInputs(*arguments[:3], parts))
    if obstacle:
        crowded = max(len(parts.row(b)) for b in range(len(parts))) > cudnn.MOST_PARTS
        assert ("each can take a call" if crowded else "top-left") in obstacle
    else:
        assert_same("cudnn", parts, *arguments)


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([prefix(p, 40) for p in (0, 7, 40)], True),
        ([[full(0, 40, 0, 30)]] * 2, True),
        ([[causal(0, 30, 0, 40)]], False),
        ([[causal(0, 20, 0, 10), causal(20, 40, 10, 40)]], True),
    ],
)
def test_cudnn_runs_what_has_no_mask(rows, runs):
    parts = Parts.of(rows, 40, 40)
    arguments = tensors(parts)
    assert (KERNELS["cudnn"].cannot_run(AttentionInputs(*arguments[:3], parts)) is None) == runs


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize(("share", "waste"), [(8, 1.015), (4, 1.0588), (2, 1.2)])
def test_the_overlay_wastes_what_is_published(share, waste):
    n = 4096
    parts = Parts.of([prefix(n // share, n)] * 2, n, n)
    assert KERNELS["cudnn"].cost(parts)[0] / parts.area() == pytest.approx(waste, abs=2e-3)
    assert KERNELS["flash3"].cost(parts) == (parts.area(), 2)


@pytest.mark.parametrize("name", CASES)
def test_intervals_are_the_mask(name):
    parts = Parts.of(*CASES[name])
    found = key_intervals.intervals(parts)
    keys = np.arange(parts.keys)
    dense = (keys >= found.first[..., None]) & (keys < found.last[..., None])
    assert np.array_equal(dense, parts.dense())
    unasked, unseen = (x.numpy() for x in unread(parts))
    for marked, expected in ((found.unasked, unasked), (found.unseen, unseen)):
        assert np.array_equal(expected.any() & expected, expected if marked is None else marked)
        assert (marked is None) == (not expected.any())


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (16, 8)])
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_masks_blocks(name, size):
    parts = Parts.of(*CASES[name])
    dense, found = parts.dense(), key_intervals.blocks(parts, size)
    for b, i in np.ndindex(len(parts), -(-parts.queries // size[0])):
        rows = dense[b, i * size[0] : (i + 1) * size[0]]
        cut = [rows[:, j : j + size[1]] for j in range(0, parts.keys, size[1])]
        whole = {j for j, block in enumerate(cut) if block.all()}
        some = {j for j, block in enumerate(cut) if block.any()} - whole
        for (count, index), expected in ((found[:2], some), (found[2:], whole)):
            assert set(index[b, 0, i, : count[b, 0, i]].tolist()) == expected


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_flex_forward_equals_reference(name):
    parts = Parts.of(*CASES[name])
    q, k, v, _ = tensors(parts, dtype=torch.float32)
    queries, keys = unread(parts)
    for x, rows in ((q, queries), (k, keys), (v, keys)):
        x[rows] = float("nan")
    expected = attend(q, k, v, parts, kernel="reference", scale=0.4)
    found = attend(q, k, v, parts, kernel="flex", scale=0.4)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_adds_the_relative_bias():
    parts = Parts.of([prefix(p, 20) for p in (0, 6, 20)], 20, 20)
    q, k, v, _ = tensors(parts, dtype=torch.float32)
    options = {
        "bias": RelativeBias(torch.randn(8, 4), True, 12),
        "query_positions": torch.stack([torch.randperm(40)[:20] for _ in range(3)])[..., None],
        "key_positions": torch.stack([torch.randperm(40)[:20] for _ in range(3)])[..., None],
    }
    with torch.no_grad():
        expected = attend(q, k, v, parts, kernel="reference", **options)
        found = attend(q, k, v, parts, kernel="flex", **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="no backward on a CPU; what can is auto, reference, sdpa"):
        attend(q.requires_grad_(), k, v, parts, kernel="flex", **options)


def test_settings_name_the_kernels():
    setting = TypeAdapter(AttentionKernel)
    for name in ("auto", *KERNELS):
        assert setting.validate_python(name) == name
    with pytest.raises(ValidationError) as error:
        setting.validate_python("none of them")
    assert set(error.value.errors()[0]["ctx"]["names"]) == {"auto", *KERNELS}


class Halved(Kernel):
    """A kernel from outside: half of what is right, up to head size 8."""

    def attend(self, inputs):
        return KERNELS["reference"].attend(inputs) / 2


def test_a_kernel_from_outside_is_one_entry(monkeypatch):
    parts = Parts.of([[causal(0, 4, 0, 4)]], 4, 4)
    q, k, v, _ = tensors(parts)
    halved = Halved("halved", devices=("cpu",), head_sizes=(8, 1), dtypes=(torch.float64,))
    monkeypatch.setitem(KERNELS, halved.name, halved)
    expected = attend(q, k, v, warm(parts, "cpu", "halved"), kernel="reference")
    assert torch.equal(attend(q, k, v, parts, kernel="halved"), expected / 2)
    for wrong, reason in (
        (
            [x.repeat(1, 1, 1, 2) for x in (q, k, v)],
            "head sizes are multiples of 1 up to 8, not 16",
        ),
        ([x.float() for x in (q, k, v)], "it takes torch.float64, not torch.float32"),
    ):
        with pytest.raises(UserError, match=f"halved cannot run here: .*{reason}; what can is"):
            attend(*wrong, parts, kernel="halved")
    bias = RelativeBias(torch.zeros(8, 4), True, 16)
    with pytest.raises(UserError, match="halved cannot run here: it takes no position bias"):
        choose("halved", q, k, parts, bias)


def test_a_kernel_that_is_not_there_names_itself_and_the_others():
    parts = Parts.of([[causal(0, 4, 0, 4)]], 4, 4)
    q, k, v, _ = tensors(parts)
    with pytest.raises(ValueError, match="flash4 cannot run here: it runs on cuda, not on cpu; .*"):
        attend(q, k, v, parts, kernel="flash4")
    assert choose("auto", q, k, parts)[0] == "sdpa"
    absent = Package("no-such-package", "pip install it", "no_such_package", "function")
    obstacle = absent.obstacle(torch.device("cuda"))
    assert obstacle == (
        "no-such-package is not installed (no module 'no_such_package'): pip install it"
    )
    renamed = Package("json", "upgrade it", "json", "no_such_function")
    assert "does not load" in renamed.obstacle(torch.device("cuda"))


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "reference"])
def test_plans_are_made_ahead_and_pickled(name):
    device = "cpu" if name == "sdpa" else "cuda"
    made = warm(Parts.of([prefix(9, 300)], 300, 300), device, name, True)
    parts = pickle.loads(pickle.dumps(made))
    known = dict(parts._plans)
    warm(parts, device, name, True)
    assert parts._plans == known
