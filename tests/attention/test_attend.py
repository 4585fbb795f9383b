"""Every kernel against the dense oracle, and the oracle against the definition."""

import gc
import pickle
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch.attention import (
    Parts,
    RelativeBias,
    attend,
    causal,
    choose,
    full,
    sdpa,
    sdpa_plan,
    warm,
)
from tests.attention.cases import CASES, prefix
from tests.attention.partitions import partitions
from tests.attention.runs import run, tensors, unread

PLANS = {  # by what one more call costs
    "exact": 0,  # no padding
    "buckets": 60,
    "padded": sdpa_plan.CALL,  # all tiles of a kind in one call
}


@pytest.fixture(params=PLANS)
def costs(request, monkeypatch):
    """Each way to plan."""
    monkeypatch.setattr(sdpa_plan.build, "__defaults__", (PLANS[request.param],))


def assert_same(parts, *arguments, tolerance=1e-12, **options):
    expected = run("reference", parts, *arguments, **options)
    found = run("sdpa", parts, *arguments, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtable"), expected, found, strict=False):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    """softmax over the visible keys, one query row and head at a time."""
    parts = Parts.of(*CASES[name])
    q, k, v, grad = tensors(parts, heads=2, key_heads=1, size=3)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = [
            j
            for shape, q0, q1, k0, k1 in parts.row(b)
            for j in range(k0, k1)
            if q0 <= i < q1 and (shape == 1 or j - k0 <= i - q0 + (k1 - k0) - (q1 - q0))
        ]
        if keys:
            weights = torch.softmax((k[b, keys, 0] @ q[b, i, h]) * 0.7, 0)
            out = out.index_put(
                (torch.tensor(b), torch.tensor(i), torch.tensor(h)), weights @ v[b, keys, 0]
            )
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    if out.requires_grad:
        gradients = torch.autograd.grad(out, (q, k, v), grad)
    found = run("reference", parts, *(x.detach() for x in (q, k, v)), grad, scale=0.7)
    for a, b in zip((out, *gradients), found):
        torch.testing.assert_close(b, a.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("name", CASES)
def test_sdpa_equals_reference(name):
    parts = Parts.of(*CASES[name])
    assert_same(parts, *tensors(parts))
    assert_same(parts, *tensors(parts, dtype=torch.float32), tolerance=2e-5)


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(4, 1, 8), (3, 3, 5), (6, 2, 1), (1, 1, 33)]
)
def test_grouped_keys_and_odd_head_sizes(heads, key_heads, size):
    for name in ("prefix of each row", "packed cross", "two streams"):
        parts = Parts.of(*CASES[name])
        assert_same(parts, *tensors(parts, heads, key_heads, size), scale=0.3)


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("name", CASES)
def test_relative_bias_and_its_table(name):
    """Positions are shuffled, as parts sort rows only, and the second axis is ignored."""
    parts = Parts.of(*CASES[name])
    rng = torch.Generator().manual_seed(1)
    table = torch.randn(8, 4, generator=rng, dtype=torch.float64)
    positions = [
        torch.stack([torch.randperm(40, generator=rng)[:length] for _ in range(len(parts))])
        for length in (parts.queries, parts.keys)
    ]
    positions = [torch.stack((x, torch.full_like(x, -99)), dim=-1) for x in positions]
    assert_same(parts, *tensors(parts), table=table, positions=positions)


@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=25, derandomize=True)
@given(case=partitions(longest=24), key_heads=st.sampled_from((1, 2)))
def test_random_partitions(plan, case, key_heads):
    parts = Parts.of(*case)
    parts.plan("sdpa", lambda p: sdpa_plan.build(p, PLANS[plan]))
    assert_same(parts, *tensors(parts, heads=2, key_heads=key_heads, size=3))


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_padding_rows_reach_nothing(name, kernel):
    """NaN and inf in rows that are not read change no output and no gradient by one bit."""
    parts = Parts.of(*CASES[name])
    clean = list(tensors(parts))
    queries, keys = unread(parts)
    dirty = [x.clone() for x in clean]
    for x, rows, garbage in zip(
        dirty, (queries, keys, keys, queries), (np.nan, np.inf, np.nan, np.nan)
    ):
        x[rows] = garbage
    expected, found = run(kernel, parts, *clean), run(kernel, parts, *dirty)
    for a, b in zip(expected, found):
        assert torch.equal(a, b)
    out, dq, dk, dv = found
    for x, rows in ((out, queries), (dq, queries), (dk, keys), (dv, keys)):
        assert (x[rows] == 0).all()
    assert (out[~queries] != 0).all()


def test_a_causal_row_does_not_see_later_rows():
    parts = Parts.of([[causal(0, 400, 0, 400)]] * 2, 400, 400)
    q, k, v, _ = tensors(parts, dtype=torch.float32)
    before = attend(q, k, v, parts)
    k[:, 250:], v[:, 250:] = 7.0, -7.0
    after = attend(q, k, v, parts)
    torch.testing.assert_close(after[:, :250], before[:, :250], rtol=0, atol=0)
    assert (after[:, 250:] != before[:, 250:]).any(-1).any(-1).all()


@pytest.mark.parametrize("plan", PLANS)
def test_long_rows(plan):
    """Long enough for calls of their own and buckets."""
    rows = [prefix(p, 450) for p in (0, 30, 200, 449)]
    rows += [[causal(a, a + 45, a, a + 45) for a in range(0, 450, 45)]]
    parts = Parts.of(rows, 450, 450)
    parts.plan("sdpa", lambda p: sdpa_plan.build(p, PLANS[plan]))
    assert_same(parts, *tensors(parts, heads=2, key_heads=1, size=4))


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("rows", "calls"),
    [
        ([[full(0, 256, 0, 256)]] * 4, 1),
        ([[causal(0, 256, 0, 256)]] * 4, 1),
        ([[causal(0, 400, 0, 400)]] * 4, 1),
        ([prefix(200, 400)] * 4, 2),
        ([prefix(p, 256) for p in (3, 90, 160, 250)], 2),  # all prefixes, and the overlay
        ([prefix(p, 1200) for p in (3, 1100)], 3),  # too far apart to be padded
    ],
)
def test_the_fused_kernel_runs(rows, calls):
    """Forward and backward of every call, grouped keys as well, and never the math path."""
    parts = Parts.of(rows, rows[0][-1][2], rows[0][-1][2])
    *inputs, grad = tensors(parts, dtype=torch.float32)
    with Operators() as ran:
        run("sdpa", parts, *inputs, grad)
    assert ran.names.count(FLASH) == calls
    assert ran.names.count(FLASH + "_backward") == calls
    assert not {"_softmax", "bmm"} & set(ran.names)


@pytest.mark.parametrize("part", [full(0, 256, 0, 256), causal(0, 256, 0, 256)])
def test_rows_that_share_their_parts_are_not_copied(part):
    parts = Parts.of([[part]] * 3, 256, 256)
    *inputs, _ = tensors(parts, dtype=torch.float32)
    with Operators() as ran:
        attend(*inputs, parts, kernel="sdpa")
    assert set(ran.names) <= {FLASH, "transpose", "slice", "view", "detach", "alias"}


def test_rows_of_the_output_are_never_added_up():
    """Their gradients are copied, into calls that computed more rows than are read too."""
    parts = Parts.of([prefix(p, 64) for p in (5, 20, 33)], 64, 64)
    (q, k, v, _), operators = tensors(parts), Counter()
    out = attend(*(x.requires_grad_() for x in (q, k, v)), parts, kernel="sdpa")

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            operators[operator.overloadpacket.__name__] += 1
            return operator(*args, **(kwargs or {}))

    with Counting():
        out.sum().backward()
    assert operators["index_add"] == 0 and operators["index_copy_"] == 2  # a call each
    assert operators["index_add_"] == 3  # the prefixes' q, k and v, which other calls read too


def test_short_packed_examples_share_calls():
    rows = [[causal(a, a + 16 - b, a, a + 16 - b) for a in range(0, 512, 16)] for b in range(3)]
    plan = sdpa.KERNEL.plan(Parts.of(rows, 512, 512))
    assert len(plan.calls) <= 3


def test_a_warmed_plan_is_pickled_without_device_tensors(monkeypatch):
    parts = warm(Parts.of([prefix(p, 300) for p in (10, 250)], 300, 300), kernel="sdpa")
    arguments = tensors(parts)
    expected = run("sdpa", parts, *arguments)
    copy = pickle.loads(pickle.dumps(parts))
    assert sdpa.KERNEL.plan(parts).on_device
    assert not sdpa.KERNEL.plan(copy).on_device

    def build(*_):
        raise AssertionError("planned again")

    monkeypatch.setattr(sdpa_plan, "build", build)
    for a, b in zip(expected, run("sdpa", copy, *arguments)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_and_autocast(bias):
    parts = Parts.of([prefix(p, 32) for p in (0, 9, 32)], 32, 32)
    q, k, v, grad = tensors(parts, dtype=torch.bfloat16)
    options = {}
    if bias:
        options["table"] = torch.randn(8, 4)
        options["positions"] = [torch.arange(32).expand(3, -1)[..., None]] * 2
    expected = run("reference", parts, q, k, v, grad, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = run("sdpa", parts, q, k, v, grad, **options)
        single = run("sdpa", parts, *(x.float() for x in (q, k, v, grad)), **options)
    for a, b, c in zip(expected, found, single):
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)
        torch.testing.assert_close(c, a.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("units", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_runs_in_fp32_on_a_cpu_without_matrix_units(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    q = torch.zeros(1, 4, 2, 8)
    assert sdpa.KERNEL.compute_dtype(q) == torch.float32
    assert sdpa.KERNEL.compute_dtype(q.bfloat16()) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa.KERNEL.compute_dtype(q) == expected
        assert sdpa.KERNEL.compute_dtype(q.double()) == torch.float64


def test_a_mask_made_in_inference_serves_training():
    parts = Parts.of([prefix(p, 24) for p in (0, 9, 24)], 24, 24)
    arguments = tensors(parts)
    with torch.inference_mode():
        attend(*arguments[:3], parts)
    assert_same(parts, *arguments)


def test_choose_and_its_errors():
    parts = Parts.of([[causal(0, 4, 0, 4)]], 4, 4)
    q, k, v, _ = tensors(parts)
    assert choose("auto", q, k, parts)[0] == "sdpa"
    assert choose("reference", q, k, parts) == ("reference", "asked for")
    with pytest.raises(ValueError, match="'flash'.*auto, reference, sdpa"):
        attend(q, k, v, parts, kernel="flash")
    with pytest.raises(ValueError, match="1 rows of 4 queries and 4 keys.*1, 3 and 4"):
        attend(q[:, :3], k, v, parts)
    with pytest.raises(ValueError, match="1 rows of 4 queries and 4 keys.*1, 4 and 3"):
        attend(q, k[:, :3], v[:, :3], parts)
    with pytest.raises(ValueError, match="1 rows.*2, 4 and 4"):
        attend(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), parts)
    with pytest.raises(ValueError, match="3 key heads do not divide 4"):
        attend(q, k[:, :, :1].repeat(1, 1, 3, 1), v[:, :, :1].repeat(1, 1, 3, 1), parts)
    with pytest.raises(ValueError, match=r"v \[1, 4, 2, 4\]"):
        attend(q, k, v[..., :4], parts)
    with pytest.raises(ValueError, match="needs query_positions"):
        attend(q, k, v, parts, bias=RelativeBias(torch.zeros(8, 4), True, 16))
    with pytest.raises(ValueError, match="bias of 2 heads for 4"):
        attend(q, k, v, parts, bias=RelativeBias(torch.zeros(8, 2), True, 16))


@pytest.mark.parametrize("kernel, biased", [("sdpa", False), ("sdpa", True), ("cpu", False)])
def test_a_batch_is_freed_without_the_collector(kernel, biased, costs):
    """Training collects young objects alone, and what waited in a loader's queue is old."""
    parts = Parts.of([prefix(9, 24), prefix(15, 24)], 24, 24)
    positions = torch.arange(24).expand(2, 24)[..., None]
    table = torch.zeros(12, 4) if biased else None
    given = tensors(parts, dtype=torch.float32)
    left = weakref.ref(parts)
    gc.collect()
    gc.disable()
    try:
        run(kernel, parts, *given, table, (positions, positions))
        del parts
        assert left() is None
    finally:
        gc.enable()
