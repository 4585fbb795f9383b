"""Gradients that are summands on each rank are summed in few messages, and in fp32."""

from unittest.mock import patch

import torch
from torch import nn
from torch.distributed import _functional_collectives as messages
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch.config.schema import Parallel
from megaarch.distributed.mesh import Grid
from megaarch.parallel import gradients
from megaarch.parallel.tensor_parallel import TensorSharding
from tests.distributed import runs
from tests.distributed.layouts import DEEPER, FSDP2, TP2
from tests.steps import forward_backward


def summed():
    """Gradients of six whole vectors, of two types, and of a matrix that is split; messages sent."""
    grid = Grid.build(Parallel(tensor_parallel=2), "cpu")
    mesh, rank = grid.submesh("tp"), grid.rank("tp")
    model = nn.Module()
    widths = [(5, torch.float32)] * 4 + [(3, torch.float64), (2, torch.float64)]
    for number, (width, dtype) in enumerate(widths):
        whole = distribute_tensor(torch.ones(width, dtype=dtype), mesh, [Replicate()])
        model.register_parameter(f"whole{number}", nn.Parameter(whole))
        for _ in range(2):  # micro-batches
            own = model.get_parameter(f"whole{number}").to_local()
            (own * (torch.arange(width) + number) * (rank + 1)).sum().backward()
    model.split = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    (model.split.to_local() * 3).sum().backward()
    model.unused = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    summands = frozenset(name for name, _ in model.named_parameters() if name != "split")
    model.sharding = TensorSharding(mesh, summands)
    with CommDebugMode() as sent:
        gradients.sum_summands(model)
    assert model.unused.grad is None
    found = [gradients.local(model.get_parameter(f"whole{n}").grad) for n in range(len(widths))]
    return found, gradients.local(model.split.grad), sent.get_total_counts()


def test_summands_are_summed_together(pool):
    for found, split, sent in pool.run(2, summed):
        for number, gradient in enumerate(found):  # of ranks 1 and 2, twice
            wanted = 2 * 3 * (torch.arange(len(gradient)) + number)
            assert torch.equal(gradient, wanted.to(gradient.dtype))
        assert [x.dtype for x in found] == [torch.float32] * 4 + [torch.float64] * 2
        assert torch.equal(split, torch.full((2, 2), 3.0))
        assert sent == 2  # one a type


def sums_of_dtensors(raw):
    """How many times a step of sharded parameters lets a DTensor sum over ranks, one tensor a message."""
    given = DEEPER | TP2 | FSDP2 | {"training.precision": "bf16"}
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    with patch.object(messages, "all_reduce", wraps=messages.all_reduce) as called:
        forward_backward(trainer, trainer.steps[0])
    return called.call_count


def test_fsdp_leaves_them_to_the_end_of_the_step(pool, raw, prepared):
    """FSDP itself would sum each of them for every micro-batch, in bf16."""
    assert pool.run(4, sums_of_dtensors, raw) == [0] * 4


def types_of_sums(raw):
    """Of which types weights' gradients are where tensor ranks that share a key head sum them."""
    given = DEEPER | TP2 | FSDP2 | {"training.precision": "bf16", "model.kv_heads": 1}
    trainer = runs.trainer_of(runs.settings_of(raw, "t5", given))
    weights = [
        p for n, p in trainer.model.named_parameters() if n.endswith(("qkv.weight", "kv.weight"))
    ]
    shapes, found = {weight.shape for weight in weights}, set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "reduce_scatter_tensor" in function.name() and args[0].shape in shapes:
                found.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Seen():
        forward_backward(trainer, trainer.steps[0])
    return found


def test_ranks_that_share_a_key_head_sum_its_gradient_in_fp32(pool, raw, prepared):
    assert pool.run(4, types_of_sums, raw) == [{torch.float32}] * 4
