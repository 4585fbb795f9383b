"""Our own CPU kernel against the dense oracle: every mask, block by block, output and gradients."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.attention import Parts, attend, causal, choose, full
from megaarch.kernels import bindings
from tests.attention.cases import CASES, prefix
from tests.attention.partitions import partitions
from tests.attention.runs import run, tensors, unread
from tests.model.decode_steps import check_steps

REASON = bindings.obstacle("cpu")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SINGLE = {"dtype": torch.float32}


def assert_same(parts, q, k, v, grad, table=None, tolerance=3e-6, **options):
    """Errors are relative to the largest figure."""
    wide = [None if x is None else x.double() for x in (q, k, v, grad, table)]
    expected = run("reference", parts, *wide, **options)
    found = run("cpu", parts, q, k, v, grad, table, **options)
    names = ("out", "dq", "dk", "dv", "dtable")[: len(expected)]
    for name, a, b in zip(names, expected, found, strict=True):
        size = max(1.0, float(a.abs().max())) if a.numel() else 1.0
        size *= 30 if name == "dtable" else 1  # the sum of thousands, which may be 0
        torch.testing.assert_close(
            b.double(), a, rtol=0, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    parts = Parts.of(*CASES[name])
    assert_same(parts, *tensors(parts, **SINGLE))
    assert_same(parts, *tensors(parts, heads=3, key_heads=3, size=40, **SINGLE))


LONG = {
    "causal": [causal(0, 300, 0, 300)],
    "full": [full(0, 300, 0, 300)],
    "prefix": prefix(131, 300),
    "bottom right": [causal(10, 140, 0, 293)],
    "more queries than keys": [causal(0, 290, 100, 211), full(290, 300, 7, 8)],
    "documents": [*prefix(60, 97), *prefix(0, 110, start=97), full(210, 299, 210, 299)],
    "nothing": [],
}


@pytest.mark.parametrize("size", [8, 64, 72, 256])
@pytest.mark.parametrize("name", LONG)
def test_several_blocks_of_queries_and_keys(name, size):
    parts = Parts.of([LONG[name], [causal(0, 129, 171, 300)]], 300, 300)
    assert_same(parts, *tensors(parts, heads=4, key_heads=2, size=size, **SINGLE), scale=0.1)


@pytest.mark.parametrize("order", ["ascending", "restarting", "any"])
@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("name", LONG)
def test_relative_bias_and_its_table(name, size, order):
    """Positions of a panel's queries count up by one or do not."""
    parts = Parts.of([LONG[name], [causal(0, 129, 171, 300)]], 300, 300)
    rng = torch.Generator().manual_seed(1)
    table = torch.randn(8, 4, generator=rng)
    positions = torch.arange(300).expand(2, 300)
    if order == "restarting":
        positions = positions % 97
    if order == "any":
        positions = torch.stack([torch.randperm(300, generator=rng) for _ in range(2)])
    places = (torch.stack((positions, positions * 0 - 99), dim=-1), positions.flip(0))
    arguments = tensors(parts, heads=4, key_heads=2, size=size, **SINGLE)
    assert_same(parts, *arguments, table, positions=places, scale=0.5)


@settings(max_examples=80, derandomize=True)
@given(case=partitions(longest=150), key_heads=st.sampled_from((1, 2)))
def test_random_partitions(case, key_heads):
    parts = Parts.of(*case)
    assert_same(parts, *tensors(parts, heads=2, key_heads=key_heads, **SINGLE))


@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_padding_rows_reach_nothing(name):
    parts = Parts.of(*CASES[name]) if name in CASES else Parts.of([LONG[name]], 300, 300)
    clean, (queries, keys) = tensors(parts, **SINGLE), unread(parts)
    dirty = [x.clone() for x in clean]
    for x, rows, garbage in zip(
        dirty, (queries, keys, keys, queries), (float("nan"), float("inf"), float("nan"), -3e38)
    ):
        x[rows] = garbage
    found = run("cpu", parts, *dirty)
    for a, b in zip(run("cpu", parts, *clean), found):
        assert torch.equal(a, b)
    for x, rows in zip(found, (queries, queries, keys, keys)):
        assert not x[rows].any()


def test_not_a_number_stays_in_its_row_and_reaches_its_keys():
    parts = Parts.of([[causal(0, 40, 0, 40)]], 40, 40)
    q, k, v, grad = tensors(parts, heads=1, key_heads=1, **SINGLE)
    q[0, 30] = float("nan")
    out, dq, dk, _ = run("cpu", parts, q, k, v, grad)
    bad = out.isnan().all(-1)[0, :, 0]
    assert bad.nonzero().tolist() == [[30]]
    assert dq.isnan().any(-1).nonzero().tolist() == [[0, 30, 0]]
    assert dk[0, :31].isnan().all()


def test_scores_beyond_what_exponentials_hold():
    """Spreads of hundreds within a row: the largest wins, and nothing overflows."""
    parts = Parts.of([[full(0, 200, 0, 200)]], 200, 200)
    q, k, v, grad = tensors(parts, heads=2, key_heads=2, **SINGLE)
    assert_same(parts, q * 10, k * 10, v, grad, scale=1.0, tolerance=3e-4)  # scores of 1e3 in fp32


def test_slices_of_a_fused_projection_and_a_transposed_gradient():
    parts = Parts.of([prefix(70, 150)] * 2, 150, 150)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 150, 4, 16, generator=g)
    q, k, v = qkv.split((2, 1, 1), 2)
    grad = torch.randn(2, 2, 150, 16, generator=g).transpose(1, 2)
    assert_same(parts, q, k, v, grad)
    wide = torch.randn(2, 150, 4, 32, generator=g)[..., ::2]
    assert_same(parts, *wide.split((2, 1, 1), 2), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (4, 1), (2, 2)])
def test_shards_of_heads(heads, dtype):
    """Two ranks of tp or cp hold half of the heads each; a key head of both is read by both."""
    parts = Parts.of([prefix(p, 150) for p in (0, 50, 150)], 150, 150)
    q, k, v, grad = tensors(parts, *heads, size=16, dtype=dtype)
    expected = run("cpu", parts, q, k, v, grad)
    found = [torch.zeros_like(x) for x in expected]
    for rank in range(2):
        mine, half = slice(rank * heads[0] // 2, (rank + 1) * heads[0] // 2), heads[1] // 2
        keys = slice(rank * half, rank * half + half) if half else slice(0, 1)
        part = run("cpu", parts, q[:, :, mine], k[:, :, keys], v[:, :, keys], grad[:, :, mine])
        for whole, x, h in zip(found, part, (mine, mine, keys, keys), strict=True):
            whole[:, :, h] += x
    exact = heads[1] > 1 or dtype == torch.float32  # else halves of a key's gradient are rounded
    close = 1e-5 if exact else 2**-6
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    parts, threads = Parts.of([prefix(p, 200) for p in (0, 50, 150)], 200, 200), 3
    arguments = (*tensors(parts, heads=4, key_heads=2, size=32, dtype=dtype), torch.randn(8, 4))
    options = {"positions": 2 * (torch.arange(200).expand(3, 200),)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = run("cpu", parts, *arguments, **options)
        torch.set_num_threads(threads)
        found = run("cpu", parts, *arguments, **options)
        assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    finally:
        torch.set_num_threads(before)


def check_half(parts, size, table=None, least=0.0, **options):
    """Errors are relative to the largest figure, or to `least` where all cancel."""
    arguments = (
        *tensors(parts, size=size, dtype=torch.bfloat16),
        *(() if table is None else (table,)),
    )
    found = run("cpu", parts, *arguments, **options)
    assert all(x.dtype == torch.bfloat16 for x in found[:4])
    wanted = run("reference", parts, *(x.double() for x in arguments), **options)
    for a, b in zip(found[:4], wanted, strict=False):
        assert (a - b).norm() <= 2**-8 * max(b.norm(), least * b.numel() ** 0.5)
        if b.numel():
            assert (a - b).abs().max() <= 2**-7 * max(b.abs().max(), least)
    if table is not None:
        assert (found[4] - wanted[4]).abs().max() <= 2**-7 * max(wanted[4].abs().max(), 30)
    if size % 16:
        single = run("cpu", parts, *(x.float() for x in arguments), **options)
        assert torch.equal(found[0], single[0].bfloat16())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [40, 48, 64, 96, 256])
@pytest.mark.parametrize("name", LONG)
def test_half_precision(name, size, biased):
    """What is read and written is rounded, and sums are fp32. Units for bfloat16, which take multiples
    of 16, and for matrices of it, of 32, round weights and their gradients too."""
    parts, table, options = Parts.of([LONG[name]], 300, 300), None, {}
    if biased:
        options["positions"] = 2 * (torch.arange(300)[None],)
        table = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    check_half(parts, size, table, **options)


@settings(max_examples=80, derandomize=True)
@given(case=partitions(longest=150), size=st.sampled_from((32, 48, 64)))
def test_random_partitions_in_half_precision(case, size):
    """After rows of NaN, which a kernel's scratch may still hold."""
    parts = Parts.of(*case)
    whole = Parts.of([[full(0, 150, 0, 150)]], 150, 150)
    run("cpu", whole, *(x * float("nan") for x in tensors(whole, size=size, dtype=torch.bfloat16)))
    check_half(parts, size, least=1.0)


@pytest.mark.parametrize("name", LONG)
def test_padding_rows_reach_nothing_in_half_precision(name):
    parts = Parts.of([LONG[name]], 300, 300)
    q, k, v, grad = tensors(parts, size=64, dtype=torch.bfloat16)
    wanted = run("cpu", parts, q, k, v, grad)
    queries, keys = unread(parts)
    for x, rows in ((q, queries), (grad, queries), (k, keys), (v, keys)):
        x[rows] = float("nan")
    assert all(torch.equal(*pair) for pair in zip(wanted, run("cpu", parts, q, k, v, grad)))


def test_auto_takes_it_where_it_runs():
    parts = Parts.of([[causal(0, 4, 0, 4)]], 4, 4)
    q, k, v, _ = tensors(parts, **SINGLE)
    assert choose("auto", q, k, parts) == ("cpu", "the fastest that runs, by measured speeds")
    for arguments, reason in (
        ((q.double(), k.double(), parts), "it takes fp32 and bf16, not float64"),
        ((q[..., :4], k[..., :4], parts), "it takes head sizes that are multiples of 8, up to 256"),
    ):
        name, why = choose("auto", *arguments)
        assert name == "sdpa" and f"cpu: {reason}" in why
    with pytest.raises(ValueError, match="cpu cannot run here: it takes fp32 and bf16"):
        attend(q.double(), k.double(), v.double(), parts, kernel="cpu")


def test_the_version_for_any_processor(tmp_path, monkeypatch):
    """Without AVX2: other vectors, and nothing that another architecture lacks."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build it with")
    root = Path(__file__).parents[2]
    sources = [str(path) for path in sorted((root / "csrc" / "cpu").glob("*.cpp"))]
    target = tmp_path / "generic.so"
    flags = ["-O1", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-DGENERIC", "-o", str(target)]
    subprocess.run(["g++", *flags, *sources], check=True)
    built = bindings.open_library(target, "cpu")
    monkeypatch.setattr(bindings, "load", lambda device_type: built)
    for rows in LONG.values():
        parts = Parts.of([rows], 300, 300)
        assert_same(parts, *tensors(parts, size=24, **SINGLE))
        halves = tensors(parts, size=24, dtype=torch.bfloat16)
        found, wanted = (run(name, parts, *halves) for name in ("cpu", "reference"))
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= 2**-7 * b.abs().max()
    check_steps("t5", {"position_encoding": "relative"}, monkeypatch)
    check_steps("xlnet", {"feed_forward_size": 50}, monkeypatch)
