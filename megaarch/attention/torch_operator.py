"""`attend` as one torch operator, which a compiled layer calls without looking inside.

A plan is host work on numpy tables, new with each batch: traced, it would break the graph of a
layer or compile the layer anew. So a compiled layer hands over the parts' handle, an int64 tensor
on the host whose value no guard reads, and gets the output with a ticket. The operator runs as
uncompiled code does, with autograd on; the ticket stands for the graph that autograd recorded, and
the backward operator finds it there. The graph lives as long as the ticket's memory: what a
recomputed or an abandoned forward pass recorded is freed with it.

The memory of q, k, v and the output belongs to the compiled graph, which may write over it. So the
recorded graph lends these four back: it keeps how it views them, and the backward operator gets them
as arguments, kept or computed again as the compiler sees fit.

Letters of shapes: docs/shapes.md.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from megaarch.attention.bias import RelativeBias
from megaarch.attention.dispatch import run
from megaarch.attention.kernel_interface import AttentionInputs
from megaarch.attention.mask import by_handle

AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
_library = torch.library.Library("megaarch", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor parts, Tensor? table, Tensor? query_positions, "
    "Tensor? key_positions, bool bidirectional, int max_distance, float scale, str kernel, "
    "bool fused_rows) -> (Tensor, Tensor)"
)
_library.define(
    "attend_backward(Tensor grad, Tensor ticket, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor? table) -> (Tensor, Tensor, Tensor, Tensor)"
)
_numbers = itertools.count()
Getter = Callable[
    [list[torch.Tensor]], torch.Tensor
]  # of a saved tensor, given those that are lent


class _Recorded(bytearray):
    """A ticket's memory, which holds what it stands for: where a recorded graph ends and begins, and
    `lent`, the tensors that the backward operator was given, while it runs."""

    end: GradientEdge
    begin: list[GradientEdge]
    lent: list[torch.Tensor]


def _getter(mine: torch.Tensor, owned: list[torch.Tensor]) -> Getter:
    """Returns what gives a tensor that the graph saved. One of `owned`, seen in another shape, is not kept, but
    viewed again in what is lent in its place; one that otherwise shares their memory is copied."""
    place = _place(mine)
    for index, theirs in enumerate(owned):
        if _place(theirs) == place and theirs.numel() == mine.numel():
            return partial(_view, index, theirs.stride(), mine.shape, mine.stride())
    kept = mine.clone() if place[0] in {_place(x)[0] for x in owned} else mine
    return lambda lent: kept


def _view(index: int, strides: tuple, shape: tuple, view: tuple, lent: list[torch.Tensor]):
    """Returns lent[index], laid out by `strides`, in a shape and its strides."""
    theirs = lent[index]
    if theirs.stride() != strides:
        laid = torch.empty_strided(theirs.shape, strides, dtype=theirs.dtype, device=theirs.device)
        theirs = laid.copy_(theirs)
    return theirs.as_strided(shape, view, theirs.storage_offset())


def _place(x: torch.Tensor) -> tuple[int, int]:
    return x.untyped_storage()._cdata, int(x.storage_offset())


_recorded: WeakValueDictionary[int, _Recorded] = WeakValueDictionary()


def attend(inputs: AttentionInputs, kernel: str) -> torch.Tensor:
    """Stands in for attend.py's `attend` in code that is being compiled."""
    table, bidirectional, reach, positions = None, False, 0, (None, None)
    if inputs.bias is not None:
        table, positions = inputs.bias.table, inputs.positions
        bidirectional, reach = inputs.bias.bidirectional, inputs.bias.max_distance
    tensors = (inputs.q, inputs.k, inputs.v, inputs.parts.handle, table, *positions)
    rule = (bidirectional, reach, inputs.scale, kernel, inputs.fused_rows)
    return torch.ops.megaarch.attend(*tensors, *rule)[0]


def _forward(q, k, v, handle, table, asks, seen, bidirectional, reach, scale, kernel, fused):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, table) if x is not None]
    saved, memory = [], _Recorded(next(_numbers).to_bytes(8, "little"))
    weakly = ref(memory)  # the graph that memory holds must not hold it

    def pack(tensor: torch.Tensor) -> list[Any]:
        saved.append([tensor])
        return saved[-1]

    def unpack(found: list[Any]) -> torch.Tensor:
        recorded = weakly()
        assert recorded is not None
        return found[0](recorded.lent)

    with _recording(), saved_tensors_hooks(pack, unpack):
        bias = None if table is None else RelativeBias(leaves[3], bidirectional, reach)
        options = (by_handle(handle), scale, bias, asks, seen, fused)
        out = run(AttentionInputs(leaves[0], leaves[1], leaves[2], *options), kernel)
        memory.end, *memory.begin = (get_gradient_edge(x) for x in (out, *leaves))
    given = out.detach().contiguous()
    for found in saved:  # a tensor, and from here on what gives it
        found[0] = _getter(found[0], [q, k, v, given])
    for x in leaves:  # the graph holds them
        x.data = x.new_empty(0)
    _recorded[int.from_bytes(memory, "little")] = memory
    return given, torch.frombuffer(memory, dtype=torch.int64)


_library.impl("attend", _forward, "CompositeExplicitAutograd")


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record, which the dispatcher has switched off around an operator's kernel."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _backward(grad, ticket, q, k, v, out, table):
    recorded = _recorded[ticket.item()]
    recorded.lent = [q, k, v, out]
    grads = torch.autograd.grad(recorded.end, recorded.begin, grad)
    del recorded.lent
    grads = [x.contiguous() for x in grads]
    return (*grads, grad.new_empty(0)) if table is None else tuple(grads)


_library.impl("attend_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megaarch::attend", lib=_library)
def _shapes(q, *rest):
    return q.new_empty(q.shape), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.register_fake("megaarch::attend_backward", lib=_library)
def _gradient_shapes(grad, ticket, q, k, v, out, table):
    of_table = grad.new_empty(0) if table is None else table.new_empty(table.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), of_table


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, table, *_ = inputs
    out, ticket = output
    ctx.save_for_backward(ticket, q, k, v, out, table)


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple:
    kept = ctx.saved_tensors  # a checkpoint gives them once
    *of_qkv, of_table = torch.ops.megaarch.attend_backward(grad, *kept)
    return *of_qkv, None, None if kept[-1] is None else of_table, *(None for _ in range(7))


torch.library.register_autograd(
    "megaarch::attend", _differentiate, setup_context=_keep, lib=_library
)
