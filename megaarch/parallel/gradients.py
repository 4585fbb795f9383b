"""The norm of gradients that are spread over a grid, equal to that of one process; clipping."""

from collections import defaultdict

import torch
from torch import _foreach_mul_, _foreach_norm, distributed  # pyright: ignore[reportPrivateImportUsage]  # as torch.nn.utils.clip_grad_norm_ does
from torch.distributed.tensor import DTensor

from megaarch.distributed.mesh import Grid
from megaarch.model.transformer import Transformer


@torch.no_grad()
def sum_summands(model: Transformer) -> None:
    """Sums over the tensor-parallel ranks what each has a summand of (`Sharding.summands`: norms under
    sequence parallelism), with one collective for each type. Once a step, behind FSDP's reductions: of
    each parameter's shard, in the type that the optimizer takes."""
    together: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if name in model.sharding.summands and parameter.grad is not None:
            together[parameter.grad.dtype].append(local(parameter.grad))
    for summands in together.values():
        sum_in_one_message(summands, model.sharding.group)


def sum_in_one_message(tensors: list[torch.Tensor], group: distributed.ProcessGroup | None) -> None:
    """Sums tensors of one type in place over the ranks of a group."""
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat, group=group)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(total.view_as(x))


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
        norms = torch.stack(_foreach_norm(shards)) if shards else torch.zeros(1, device=grid.device)
        sums.append(norms.square().sum())
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
