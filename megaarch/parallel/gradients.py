"""The norm of gradients that are spread over a grid, equal to that of one process; clipping."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import _foreach_mul_, _foreach_norm, distributed, nn  # pyright: ignore[reportPrivateImportUsage]  # as torch.nn.utils.clip_grad_norm_ does
from torch.distributed.tensor import DTensor

from megaarch.distributed.mesh import Grid


@torch.no_grad()
def reduce_partial(parameters: Iterable[nn.Parameter]) -> None:
    """Reduces gradients that do not have their parameter's placement, so that all have it. Those of
    replicated parameters that are summands on each rank (norms under sequence parallelism) are summed
    together, one collective for each group of ranks and type."""
    together: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        grad = p.grad
        if not (isinstance(p, DTensor) and isinstance(grad, DTensor)):
            continue
        if grad.placements == p.placements:
            continue
        pairs = list(zip(grad.placements, p.placements))
        axes = tuple(axis for axis, (given, wanted) in enumerate(pairs) if given != wanted)
        if not all(pairs[a][0].is_partial("sum") and pairs[a][1].is_replicate() for a in axes):
            p.grad = grad.redistribute(placements=p.placements)
            continue
        mesh, summand = grad.device_mesh, local(grad).contiguous()
        together[mesh, axes, summand.dtype].append(summand)
        p.grad = DTensor.from_local(
            summand, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    for (mesh, axes, _), summands in together.items():
        flat = torch.cat([x.flatten() for x in summands])
        for axis in axes:
            distributed.all_reduce(flat, group=mesh.get_group(axis))
        for summand, total in zip(summands, flat.split([x.numel() for x in summands])):
            summand.view(-1).copy_(total)


@torch.no_grad()
def total_norm(gradients: list[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Returns the L2 norm of gradients, each counted once however it is sharded or copied. fp32 at
    least; the same on every rank."""
    by_groups: dict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list, {(): []})
    groups: dict[str, distributed.ProcessGroup] = {}
    for gradient in gradients:
        names = []
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            for axis, name in enumerate(mesh.mesh_dim_names or ()):
                if not gradient.placements[axis].is_replicate():
                    names.append(name)
                    groups[name] = mesh.get_group(axis)
        by_groups[tuple(names)].append(local(gradient))
    sums = []
    for names, shards in sorted(by_groups.items()):
        squares = [norm.square() for norm in _foreach_norm(shards)] if shards else []
        sums.append(torch.stack(squares).sum() if squares else torch.zeros((), device=grid.device))
        for name in names:
            distributed.all_reduce(sums[-1], group=groups[name])
    return grid.sum(torch.stack(sums).sum(), ("pp",)).sqrt()


@torch.no_grad()
def scale(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients of this norm down to `limit`, as torch's clip_grad_norm_ does."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    _foreach_mul_([local(gradient) for gradient in gradients], factor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
