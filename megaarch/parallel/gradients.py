"""The norm of gradients that are spread over a grid, equal to that of one process; clipping."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from megaarch.distributed.mesh import Grid


@torch.no_grad()
def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every gradient its parameter's placement. Those of whole parameters that are summands
    on each rank (norms under sequence parallelism) are summed together, one collective for each
    group of ranks and type."""
    together: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        grad = p.grad
        if not isinstance(grad, DTensor) or grad.placements == p.placements:
            continue
        axes = [i for i, (x, y) in enumerate(zip(grad.placements, p.placements)) if x != y]
        if all(
            grad.placements[i].is_partial("sum") and p.placements[i].is_replicate() for i in axes
        ):
            summand = local(grad).contiguous()
            key = (grad.device_mesh, tuple(axes), summand.dtype)
            together[key].append(summand)
            p.grad = DTensor.from_local(
                summand,
                grad.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        else:
            p.grad = grad.redistribute(placements=p.placements)
    for (mesh, axes, _), summands in together.items():
        flat = torch.cat([x.flatten() for x in summands])
        for axis in axes:
            distributed.all_reduce(flat, group=mesh.get_group(axis))
        torch._foreach_copy_(
            [x.view(-1) for x in summands], flat.split([x.numel() for x in summands])
        )


@torch.no_grad()
def total_norm(gradients: list[torch.Tensor], grid: Grid) -> torch.Tensor:
    """The L2 norm of gradients, each counted once however it is sharded or copied. fp32 at least;
    the same on every rank."""
    sums: dict[tuple[str, ...], torch.Tensor] = {}
    groups: dict[str, distributed.ProcessGroup] = {}
    by_axes: dict[tuple[str, ...], list[torch.Tensor]] = {(): []}
    for gradient in gradients:
        axes = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            axes = tuple(
                name
                for name, placement in zip(mesh.mesh_dim_names, gradient.placements, strict=True)
                if not placement.is_replicate()
            )
            groups |= {name: mesh.get_group(name) for name in axes}
        by_axes.setdefault(axes, []).append(local(gradient))
    for axes, tensors in sorted(by_axes.items()):
        squares = [norm.square() for norm in torch._foreach_norm(tensors)] if tensors else []
        sums[axes] = torch.stack(squares).sum() if squares else torch.zeros((), device=grid.device)
        for axis in axes:
            distributed.all_reduce(sums[axes], group=groups[axis])
    total = torch.stack(list(sums.values())).sum()
    return grid.sum(total, ("pp",)).sqrt()


@torch.no_grad()
def scale(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients of this norm down to `limit`, as torch's clip_grad_norm_ does."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
