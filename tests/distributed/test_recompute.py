"""Activation checkpointing: the same gradients to the bit, from less memory."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaarch.attention import KERNELS, dispatch
from megaarch.attention.packages import Package
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.model import initialize
from megaarch.parallel import recompute
from megaarch.parallel.parallelize import build_model


class Kept(TorchDispatchMode):
    """Bytes of what was computed under this mode and is still alive, whoever holds it."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.items() if not storage.expired())


def run(given, batch, mode, half=False):
    """Gradients by name, bytes kept by the layers, matrix products of the backward pass."""
    model = build_model(given.model, given.data.objective)
    initialize(model, 0)
    model.compute_dtype = torch.bfloat16 if half else None
    model.set_dropout_step(0, 3)
    recompute.apply(model, mode)
    model(batch)  # plans and masks of the parts are made once, and stay
    with Kept() as kept:
        hidden = model.hidden(batch)
    size = kept.bytes()
    loss = model.head(hidden, batch).nll.sum()
    with Operators() as operators:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, size, operators.products


PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")


class Operators(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.name() in PRODUCTS
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["gpt", "t5", "xlnet", "bert with biases"])
def case(request, tiny, prepared):
    preset, _, biases = request.param.partition(" ")
    given = tiny(preset, model__dropout=0.1, model__bias=bool(biases))
    rows = Rows(given.model, given.data, prepared, 0)
    return given, Steps(rows, global_batch_size=4, micro_batch_size=4)[0][0]


def test_gradients_are_equal_to_the_bit_and_less_is_kept(case):
    wanted, all_bytes, products = run(*case, "none")
    selective, some_bytes, selective_products = run(*case, "selective")
    full, few_bytes, full_products = run(*case, "full")
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert selective[name].equal(gradient), name
        assert full[name].equal(gradient), name
    assert few_bytes < 0.5 * some_bytes < 0.4 * all_bytes, (few_bytes, some_bytes, all_bytes)
    assert products == selective_products < full_products


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_in_bf16(case, mode):
    wanted, *_ = run(*case, "none", half=True)
    found, *_ = run(*case, mode, half=True)
    for name, gradient in wanted.items():
        assert found[name].equal(gradient), name


class Graphs:
    """A compiler that counts the products and the attention of the graphs it is given, by pass, and
    runs them as they are."""

    def __init__(self):
        self.made = Counter()
        passes = {f"{way}_compiler": partial(self.take, way) for way in ("fw", "bw")}
        self.backend = aot_autograd(**passes)

    def take(self, way, graph, inputs):
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                name = node.target.name()
                self.made[way, "products"] += name in PRODUCTS
                self.made[way, "attention"] += name == recompute.ATTEND
        return make_boxed_func(graph.forward)


def run_compiled(given, batch, mode):
    """Gradients by name, bytes that compiled layers keep for the backward pass, and what their
    graphs run."""
    torch._dynamo.reset()
    model = build_model(given.model, given.data.objective)
    initialize(model, 0)
    model.set_dropout_step(0, 3)
    recompute.apply(model, mode)
    graphs = Graphs()
    for layer in model.layers.values():
        layer.forward = torch.compile(
            layer.forward, backend=graphs.backend, dynamic=False, fullgraph=True
        )
    hidden = model.hidden(batch)
    size = saved_bytes(hidden, besides=list(model.parameters()))
    model.head(hidden, batch).nll.sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, size, graphs.made


def saved_bytes(output, besides):
    """Returns the bytes of the distinct storages that the graph of `output` holds through compiled functions."""
    known = {x.untyped_storage()._cdata for x in besides}
    sizes, seen, ahead = {}, set(), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += (following for following, _ in node.next_functions)
        if "CompiledFunction" in node.name():
            kept = (x.untyped_storage() for x in node.saved_tensors)
            sizes |= {x._cdata: x.nbytes() for x in kept if x._cdata not in known}
    return sum(sizes.values())


def test_compiled_layers_recompute_in_their_graphs(case):
    wanted, all_bytes, none = run_compiled(*case, "none")
    selective, some_bytes, some = run_compiled(*case, "selective")
    full, few_bytes, everything = run_compiled(*case, "full")
    eager, *_ = run(*case, "none")
    for name, gradient in wanted.items():
        assert selective[name].equal(gradient), name
        assert full[name].equal(gradient), name
        assert (gradient - eager[name]).norm() < 1e-5 * eager[name].norm(), name
    assert few_bytes < some_bytes < all_bytes, (few_bytes, some_bytes, all_bytes)
    assert some == none
    attention, kinds = none["fw", "attention"], len(case[1].streams)
    assert attention > none["bw", "attention"] == 0
    assert everything["bw", "attention"] == attention
    # all products but a layer's last, whose result no gradient needs
    again = everything["bw", "products"] - none["bw", "products"]
    assert again == none["fw", "products"] - kinds


def test_names_do_not_change(tiny):
    given = tiny("t5")
    model = build_model(given.model, given.data.objective)
    names = list(model.state_dict())
    recompute.apply(model, "selective")
    assert list(model.state_dict()) == names


class StandIn:
    """An attention library whose forward is one torch operator, and counts its runs."""

    def __init__(self, name):
        self.runs = 0

        @torch.library.custom_op(name, mutates_args=())
        def forward(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
        ) -> torch.Tensor:
            self.runs += 1
            return attention(q, k, v, scale, causal)

        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                out = attention(*leaves, *ctx.figures)
            return *torch.autograd.grad(out, leaves, grad), None, None

        def keep(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:3])
            ctx.figures = inputs[3:]

        forward.register_autograd(backward, setup_context=keep)
        self.forward = forward

    def run(self, _, q, k, v, call, scale):
        """As varlen.VarlenKernel.run: here of rows that are whole and alike."""
        rows = len(call.q.starts) - 1
        stacked = (x.unflatten(0, (rows, -1)) for x in (q, k, v))
        return self.forward(*stacked, scale, call.causal).flatten(0, 1)


def attention(q, k, v, scale, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "cudnn_ragged"])
def test_selective_keeps_what_a_librarys_own_operator_gave(kernel, tiny, prepared, monkeypatch):
    given = tiny("bert", model__attention=kernel)
    rows = Rows(given.model, given.data, prepared, 0)
    steps = Steps(rows, global_batch_size=4, micro_batch_size=4, kernel=kernel)
    stand_in = StandIn(KERNELS[kernel].forward_operators[0])
    here = {"devices": ("cpu",), "dtypes": (torch.float32,), "run": stand_in.run}
    package = Package("a stand-in", "", "math", "sqrt")
    monkeypatch.setitem(KERNELS, kernel, replace(KERNELS[kernel], package=package, **here))
    wanted, *_ = run(given, steps[0][0], "none")
    counts = {}
    for mode in ("none", "selective", "full"):
        stand_in.runs = 0
        found, *_ = run(given, steps[0][0], mode)
        counts[mode] = stand_in.runs
        for name, gradient in wanted.items():
            assert found[name].equal(gradient), name
    layers = given.model.layers
    ahead = 2 * layers  # run() passes forward twice
    assert counts == {"none": ahead, "selective": ahead, "full": ahead + layers}


def test_the_operators_that_kernels_name_are_torchs_where_they_are():
    KERNELS["torch_varlen"].package.load()  # registers its operators
    named = {name for kernel in KERNELS.values() for name in kernel.forward_operators}
    assert named < recompute.kept()
    for namespace, operator in (name.split("::") for name in recompute.kept()):
        if namespace in ("aten", "torch_attn"):
            assert hasattr(getattr(torch.ops, namespace), operator), operator
    for name in (*dispatch.RANKED, dispatch.FALLBACK):
        assert KERNELS[name].forward_operators, name
