"""Gradients that are summands on each rank are summed in few messages."""

import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from megaarch.config.schema import Parallel
from megaarch.distributed.mesh import Grid
from megaarch.parallel import gradients


def settled():
    """Gradients of six whole vectors, of two types, and of a matrix that is split; messages sent."""
    grid = Grid.build(Parallel(tensor_parallel=2), "cpu")
    mesh, rank = grid.submesh("tp"), grid.rank("tp")
    parameters = []
    for width, dtype in [(5, torch.float32)] * 4 + [(3, torch.float64), (2, torch.float64)]:
        whole = distribute_tensor(torch.ones(width, dtype=dtype), mesh, [Replicate()])
        parameters.append(nn.Parameter(whole))
    split = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    for number, p in enumerate(parameters):
        for _ in range(2):  # micro-batches
            own = p.to_local(grad_placements=[Partial()])
            (own * (torch.arange(len(p)) + number) * (rank + 1)).sum().backward()
    (split.to_local() * 3).sum().backward()
    unused = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    with CommDebugMode() as messages:
        gradients.reduce_partial([*parameters, split, unused])
    assert unused.grad is None and split.grad.placements == (Shard(0),)
    assert all(p.grad.placements == p.placements for p in parameters)
    found = [gradients.local(p.grad) for p in parameters]
    return found, gradients.local(split.grad), messages.get_total_counts()


def test_partial_gradients_are_summed_together(pool):
    for found, split, messages in pool.run(2, settled):
        for number, gradient in enumerate(found):  # of ranks 1 and 2, twice
            wanted = 2 * 3 * (torch.arange(len(gradient)) + number)
            assert torch.equal(gradient, wanted.to(gradient.dtype))
        assert [x.dtype for x in found] == [torch.float32] * 4 + [torch.float64] * 2
        assert torch.equal(split, torch.full((2, 2), 3.0))
        assert messages == 2  # one a type
