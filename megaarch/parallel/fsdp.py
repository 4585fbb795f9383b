"""Sharded data parallelism (FSDP2): all use of torch's `fully_shard` sits here.

Parameters are sharded over dp_shard and cp, and copied over dp_replicate. Each layer is one group,
gathered when it runs; what is left (embeddings, tied or not, norms, the output) is the root's
group. Gradients are averaged over all of these ranks.
"""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.model import TargetLosses, Transformer
from megaarch.parallel.precision import compute_dtype


def shard(model: Transformer, grid: Grid, settings: Settings) -> None:
    """Shards `model` (its `layers` each, then the rest) in place; meta is fine.

    With `training.precision: bf16` layers compute in bf16, and master parameters, gradients and
    their reductions are fp32.
    """
    if grid.gradient_ranks == 1:
        return
    sharded = [axis for axis in ("dp_shard", "cp") if grid.size(axis) > 1] or ["dp_shard"]
    mesh = grid.submesh(*sharded)
    if len(sharded) > 1:
        mesh = mesh._flatten("dp_shard_cp")
    if grid.size("dp_replicate") > 1:
        mesh = DeviceMesh._concatenate([grid.submesh("dp_replicate"), mesh])
    half = compute_dtype(settings)
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    layers = list(model.layers.values())
    last = layers[-1:]  # the backward pass begins with it
    for module in (*layers, model):
        reshard = settings.parallel.gathers_again and module not in (*last, model)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.register_forward_pre_hook(_hide, prepend=True)
        module.register_forward_pre_hook(_reveal)
    model.register_forward_hook(_clone_losses, prepend=True)


class _Hidden:
    """Hides a dataclass (a Batch, a Context) while FSDP looks for the tensors among a module's
    arguments: torch 2.13 would walk into it, plans and all, and make it anew."""

    def __init__(self, value: Any):
        self.value = value


def _hide(module: nn.Module, args: tuple) -> tuple:
    return tuple(_Hidden(x) if is_dataclass(x) else x for x in args)


def _reveal(module: nn.Module, args: tuple) -> tuple:
    return tuple(x.value if isinstance(x, _Hidden) else x for x in args)


def _clone_losses(module: nn.Module, args: tuple, out: Any) -> Any:
    # FSDP registers its backward hooks on outputs, and warns where one is a view.
    return out.map(torch.clone) if isinstance(out, TargetLosses) else out


def before_backward(model: nn.Module, last: bool, whole: bool) -> None:
    """Says whether the next micro-batch is a step's last one. Until then nothing waits for a reduction,
    and gradients are not summed over dp_replicate; where they stay `whole` (parameters stay gathered),
    they are not reduced at all."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or not whole)  # which sets the next one too
        model.set_requires_all_reduce(last)


def release(model: nn.Module) -> None:
    """Drops what a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
