"""How much libraries have to build: graphs, compiled shapes, and the calls that a plan makes."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megaarch.attention import KERNELS, Parts, attend, causal, cudnn, cudnn_ragged, flex, sdpa_plan
from tests.attention import emulation
from tests.attention.cases import prefix, random_lengths, spans
from tests.attention.emulation import StandIn
from tests.attention.runs import tensors


@pytest.fixture
def received(monkeypatch):
    """Lists what the ragged kernel hands to its library, in order."""
    made = []

    def record(q, k, v, **options):
        made.append((q, k, v, options))
        return emulation.cudnn_sdpa(q, k, v, **options)

    on_cpu = {"devices": ("cpu",), "head_sizes": (256, 1), "dtypes": (torch.float64,)}
    kernel = replace(KERNELS["cudnn_ragged"], package=StandIn(record), **on_cpu)
    monkeypatch.setitem(KERNELS, "cudnn_ragged", kernel)
    return made


def graphs(received):
    """Returns what cudnn-frontend 1.32 keys a graph by, forward and backward."""
    return {
        (
            len(options["cu_seqlens_q"]) - 1,
            *(-(-len(x) // 64) for x in (q, k, v)),
            options["max_seqlen_q"],
            options["max_seqlen_kv"],
            options["is_causal"],
        )
        for q, k, v, options in received
    }


def test_packed_rows_of_random_lengths_share_graphs(received):
    counts = set()
    for seed in range(20):
        rows = [
            [causal(a, b, a, b) for a, b in spans(random_lengths(10 * seed + r, 400, 5, 40))]
            for r in range(2)
        ]
        counts.add(sum(map(len, rows)))
        parts = Parts.of(rows, 400, 400)
        attend(*tensors(parts, 1, 1, 2)[:3], parts, kernel="cudnn_ragged")
    assert len(graphs(received)) <= 2 < 5 < len(counts)  # graphs, and numbers of segments


def test_whole_rows_are_not_copied(received):
    parts = Parts.of([[causal(0, 512, 0, 512)]] * 4, 512, 512)
    given = tensors(parts, 1, 1, 2)[:3]
    attend(*given, parts, kernel="cudnn_ragged")
    ((*taken, _),) = received
    assert [x.data_ptr() for x in taken] == [x.data_ptr() for x in given]


def test_rows_added_for_a_graph_have_segments_of_their_own(received, monkeypatch):
    """cuDNN before 9.25 gives NaN where a segment is empty."""
    monkeypatch.setattr(cudnn_ragged, "ROWS", 8)
    parts = Parts.of([prefix(p, 16) for p in (3, 5, 16)], 16, 16)
    attend(*tensors(parts, 1, 1, 2)[:3], parts, kernel="cudnn_ragged")
    for q, k, _, options in received:
        for x, starts in ((q, options["cu_seqlens_q"]), (k, options["cu_seqlens_kv"])):
            lengths = starts.diff().tolist()
            assert len(lengths) in (2, 4) and min(lengths) > 0
            assert int(starts[-1]) <= len(x) and len(x) % 8 == 0


@pytest.mark.parametrize("count", [2, 7])
def test_equal_prefixes_are_one_call(count):
    n = 256
    rows = [prefix(90, n)] * count + [prefix(30, n)]
    planned = sdpa_plan.build(Parts.of(rows, n, n), cudnn.EXACT).calls
    calls = sorted(
        (len(c.q_lengths), int(c.q_lengths.max()), int(c.k_lengths.max())) for c in planned
    )
    assert calls == sorted([(count + 1, n, n), (count, 90, 90), (1, 30, 30)])


@pytest.fixture
def compiled(monkeypatch):
    """Counts the graphs of FlexAttention, compiled on the CPU to nothing."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, backend=counter, **options)
    )
    monkeypatch.setattr(flex, "COMPILED", ("cpu",))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    yield counter
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def run_flex(length, split):
    parts = Parts.of([prefix(split, length)] * 2, length, length)
    q, k, v, _ = tensors(parts, 2, 2, 16, torch.float32)
    with torch.no_grad():
        found = attend(q, k, v, parts, kernel="flex")
        expected = attend(q, k, v, parts, kernel="reference")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_flex_compiles_each_shape_and_never_runs_uncompiled(compiled):
    for length in range(16, 26):
        run_flex(length, 5)
    assert compiled.frame_count == 10
    for split in range(1, 16):  # masks are no shapes
        run_flex(16, split)
    assert compiled.frame_count == 10


def test_a_shape_too_many_for_flex_is_an_error(compiled, monkeypatch):
    monkeypatch.setattr(flex, "SHAPES", 2)
    run_flex(16, 5)
    run_flex(17, 5)
    with pytest.raises(Exception, match="recompile"):
        run_flex(18, 5)
