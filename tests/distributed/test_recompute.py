"""Activation checkpointing: the same gradients to the bit, from less memory."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaarch.data.loader import Steps
from megaarch.data.rows import Rows
from megaarch.model import initialize
from megaarch.parallel import recompute
from megaarch.training.trainer import build_model


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


def run(given, batch, mode, autocast=False):
    """Gradients by name, bytes kept by the layers, matrix products of the backward pass."""
    model = build_model(given.model, given.data.objective)
    initialize(model, 0)
    model.set_dropout_step(0, 3)
    recompute.apply(model, mode)
    model(batch)  # plans and masks of the parts are made once, and stay
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Kept() as kept:
            hidden = model.hidden(batch)
        size = kept.bytes()
        loss = model.head(hidden, batch).nll.sum()
    with Operators() as operators:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, size, operators.products


class Operators(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["gpt", "t5", "xlnet"])
def case(request, tiny, prepared):
    given = tiny(request.param, model__dropout=0.1)
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
def test_under_autocast(case, mode):
    wanted, *_ = run(*case, "none", autocast=True)
    found, *_ = run(*case, mode, autocast=True)
    for name, gradient in wanted.items():
        assert found[name].equal(gradient), name


def test_names_do_not_change(tiny):
    given = tiny("t5")
    model = build_model(given.model, given.data.objective)
    names = list(model.state_dict())
    recompute.apply(model, "selective")
    assert list(model.state_dict()) == names
