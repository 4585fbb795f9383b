"""Rows by segments on the CPU: against indexing, and as attention's kernels move them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.attention import KERNELS, Parts, fused_gather, varlen, warm
from megaarch.attention.fused_gather import Pieces
from megaarch.attention.gather import Segments
from megaarch.attention.plan import to_device
from tests.attention import emulation
from tests.attention.cases import CASES
from tests.attention.emulation import StandIn
from tests.attention.runs import assert_same, run, tensors, unread
from tests.kernels.problems import REASON, random_segments, strided

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CPU = torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch):
    """flash2 with its stand-in on the CPU; every variable-length kernel moves rows the same way."""
    options = {"devices": ("cpu",), "head_sizes": (256, 1), "dtypes": (torch.float64,)}
    stand_in = StandIn(emulation.flash_attn_2)
    monkeypatch.setitem(KERNELS, "flash2", replace(KERNELS["flash2"], package=stand_in, **options))
    return "flash2"


def segments(first, lengths):
    """Some of the rows of a tensor."""
    return Segments.of(first, lengths, rows=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gather_is_indexing_whatever_the_strides(dtype):
    x = strided((2, 5, 3, 7), dtype)
    rows = to_device(segments(np.array([8, 0, 3, 3]), np.array([2, 0, 4, 1])), CPU)
    found = fused_gather.gather(x.flatten(0, 1), rows.first, rows.starts, rows.total)
    assert torch.equal(found, x.flatten(0, 1)[[8, 9, 3, 4, 5, 6, 3]])


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), calls=st.sampled_from((1, 2)))
def test_add_up_is_the_transpose_of_gathers(seed, count, calls):
    rng = np.random.default_rng(seed)
    gathers = [segments(*random_segments(rng, 12, count)) for _ in range(calls)]
    pieces = to_device(Pieces.of(gathers, 12), CPU)
    given = [torch.randn(rows.total, 2, 3, dtype=torch.float64) for rows in gathers]
    found = fused_gather.add_up(given, pieces.bounds, pieces.readers, pieces.origin, 12)
    wanted = torch.zeros(12, 2, 3, dtype=torch.float64)
    for rows, x in zip(gathers, given):
        wanted.index_add_(0, to_device(rows, CPU).index()[0], x)
    torch.testing.assert_close(found, wanted)


def test_sums_are_in_fp32():
    """A thousand readers of one row, each too small to count in bf16."""
    rows = segments(np.zeros(1000, dtype=np.int64), np.ones(1000, dtype=np.int64))
    pieces = to_device(Pieces.of([rows], 1), CPU)
    given = torch.full((1000, 1, 4), 1 / 256, dtype=torch.bfloat16)
    given[0] = 8
    found = fused_gather.add_up([given], pieces.bounds, pieces.readers, pieces.origin, 1)
    assert torch.equal(found, torch.full((1, 1, 4), 8 + 999 / 256).to(torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_attention_by_segments_equals_reference(kernel, name):
    parts = Parts.of(*CASES[name])
    assert_same(kernel, parts, *tensors(parts), fused_rows=True)
    assert_same(kernel, parts, *tensors(parts, heads=3, key_heads=3, size=5), fused_rows=True)


@pytest.mark.parametrize("name", CASES)
def test_padding_rows_reach_nothing(kernel, name):
    parts = Parts.of(*CASES[name])
    clean, (queries, keys) = tensors(parts), unread(parts)
    dirty = [x.clone() for x in clean]
    for x, unused in zip(dirty, (queries, keys, keys, queries)):
        x[unused] = float("nan")
    for a, b in zip(*(run(kernel, parts, *x, fused_rows=True) for x in (clean, dirty))):
        assert torch.equal(a, b)


def test_a_batch_in_which_nothing_is_seen_is_planned(kernel):
    parts = Parts.of([[], []], 16, 16)
    warm(parts, "cpu", kernel, fused_rows=True)
    out = run(kernel, parts, *tensors(parts), fused_rows=True)[0]
    assert not out.any()


def test_torchs_kernels_are_not_called(kernel, monkeypatch):
    monkeypatch.setattr(varlen, "IndexGather", None)
    parts = Parts.of(*CASES["packed prefixes"])
    assert_same(kernel, parts, *tensors(parts), fused_rows=True)


def test_the_operators_keep_torchs_contract():
    x = torch.randn(6, 2, 3)
    rows = segments(np.array([4, 0]), np.array([2, 3]))
    pieces, rows = to_device(Pieces.of([rows], 6), CPU), to_device(rows, CPU)
    given = (torch.randn(5, 2, 3),)
    for operator, arguments in (
        ("rows_take", (x, rows.first, rows.starts, rows.total)),
        ("rows_add", (given, pieces.bounds, pieces.readers, pieces.origin, 6)),
    ):
        packet = getattr(torch.ops.megaarch, operator).default
        assert set(torch.library.opcheck(packet, arguments).values()) == {"SUCCESS"}
