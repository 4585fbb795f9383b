"""`attend` as one operator in compiled code: equal to `attend`, one graph, nothing held too long."""

import gc
import pickle
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from megaarch.attention import Parts, RelativeBias, attend, causal, flex, full, torch_operator
from megaarch.attention.mask import by_handle
from megaarch.parallel.compile import as_written

LENGTH, HEADS, SIZE = 24, 4, 8
MASKS = {
    "causal": [[causal(0, LENGTH, 0, LENGTH)]] * 2,
    "full": [[full(0, LENGTH, 0, LENGTH)]] * 2,
    "prefix": [[full(0, p, 0, p), causal(p, LENGTH, 0, LENGTH)] for p in (5, 16)],
    "padding": [[causal(0, 9, 0, 9)], []],
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def tensors(key_heads=HEADS, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, LENGTH, HEADS + 2 * key_heads, SIZE, generator=g, dtype=dtype)
    return fused.requires_grad_(), key_heads


def layer(fused, key_heads, parts, table=None, positions=None, kernel="reference"):
    """Queries, keys and values are views of one projection, and what follows may reuse memory."""
    q, k, v = (fused * 1.5).split((HEADS, key_heads, key_heads), dim=2)
    bias = None if table is None else RelativeBias(table * 2, True, 16)
    places = {"query_positions": positions, "key_positions": positions}
    out = attend(q.sin(), k.cos(), v, parts, bias=bias, kernel=kernel, **places)
    return ((out + 1).tanh() * q).sin()


def results(function, fused, key_heads, parts, table, positions, kernel):
    leaves = [fused] if table is None else [fused, table]
    out = function(fused, key_heads, parts, table, positions, kernel)
    return [out, *torch.autograd.grad((out * out).sum(), leaves)]


@pytest.mark.parametrize(
    ("kernel", "key_heads", "with_bias"),
    [("reference", HEADS, True), ("sdpa", HEADS, False), ("sdpa", 1, True), ("cpu", 2, False),
     ("cpu", HEADS, True)],
)  # fmt: skip
def test_equals_uncompiled_code(kernel, key_heads, with_bias):
    """Compiled to machine code, whose buffers are used again behind the operator's back."""
    dtype = torch.float32 if kernel == "cpu" else torch.float64
    fused, key_heads = tensors(key_heads, dtype)
    table = torch.randn(8, HEADS, dtype=dtype).requires_grad_() if with_bias else None
    positions = torch.arange(LENGTH).expand(2, -1)[..., None]
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for mask in MASKS.values():
        parts = Parts.of(mask, LENGTH, LENGTH)
        arguments = (fused, key_heads, parts, table, positions, kernel)
        for a, b in zip(results(compiled, *arguments), results(layer, *arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_new_parts_are_no_new_graph():
    fused, key_heads = tensors()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=counter)
    found = []
    for mask in MASKS:
        parts = pickle.loads(pickle.dumps(Parts.of(MASKS[mask], LENGTH, LENGTH)))  # of a worker
        found.append(compiled(fused, key_heads, parts))
        torch.testing.assert_close(found[-1], layer(fused, key_heads, parts))
    assert counter.frame_count == 1
    assert not torch.equal(found[0], found[1])


def test_nothing_outlives_its_use(monkeypatch):
    """Neither parts, nor what a forward pass without a backward pass recorded."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    fused, key_heads = tensors()
    parts = Parts.of(MASKS["prefix"], LENGTH, LENGTH)
    handle, gone = parts.handle, weakref.ref(parts)
    out = compiled(fused, key_heads, parts)
    assert len(torch_operator._recorded) == 1
    del out
    assert len(torch_operator._recorded) == 0
    out = compiled(fused, key_heads, parts)
    torch.autograd.grad(out.sum(), fused)
    del parts, out
    gc.collect()
    assert gone() is None and len(torch_operator._recorded) == 0
    with pytest.raises(KeyError):
        by_handle(handle)


def test_without_gradient_nothing_is_kept():
    fused, key_heads = tensors()
    parts = Parts.of(MASKS["causal"], LENGTH, LENGTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(fused, key_heads, parts)
    assert len(torch_operator._recorded) == 0
    torch.testing.assert_close(out, layer(fused, key_heads, parts))


def test_recomputed_behind_a_checkpoint():
    """A checkpoint around compiled code drops what the first pass recorded."""
    fused, key_heads = tensors()
    parts = Parts.of(MASKS["prefix"], LENGTH, LENGTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = checkpoint(compiled, fused, key_heads, parts, use_reentrant=False)
    assert len(torch_operator._recorded) == 0
    found = torch.autograd.grad(out.sum(), fused)
    wanted = torch.autograd.grad(layer(fused, key_heads, parts).sum(), fused)
    torch.testing.assert_close(found, wanted)


def test_flex_attention_stays_compiled_while_layers_are_evaluated(monkeypatch):
    """Uncompiled it makes all scores."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v: q + k + v, backend=backend)
    monkeypatch.setattr(flex, "COMPILED", ("cpu",))
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    with as_written(compiled=True):
        flex._flex_attention(*torch.ones(3, 1, 2, 4, 8))
    assert len(graphs) == 1
