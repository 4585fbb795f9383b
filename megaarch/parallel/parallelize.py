"""The model of a parallel layout: built on meta, split, sharded, and only then given memory.

Every process draws its shards alone, as slices of what a parameter's global name and shape give, so
that the same seed gives the same weights in any layout.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megaarch.config import catalogue
from megaarch.config.schema import Model, Settings
from megaarch.distributed.mesh import Grid
from megaarch.model.initialize import initial_value
from megaarch.model.layers import MakeLinear
from megaarch.model.linear import Linear
from megaarch.model.loss import fused_slope
from megaarch.model.transformer import Transformer
from megaarch.parallel import (
    context_parallel,
    float8,
    fsdp,
    gradients,
    recompute,
    stages,
    tensor_parallel,
)


def build_model(model: Model, objective: str, layer_linear: MakeLinear = Linear) -> Transformer:
    """Returns the Transformer of these settings in one process, not yet initialized."""
    axes = catalogue.position_axes(objective)
    transformer = Transformer(model, position_axes=axes, layer_linear=layer_linear)
    if "cross_entropy" in model.fused_kernels:
        transformer.slope = fused_slope
    return transformer


@torch.no_grad()
def build(settings: Settings, grid: Grid) -> Transformer:
    """Returns this process's part of the model, initialized, under global names."""
    model = build_on_meta(settings, grid)
    model.to_empty(device=grid.device)
    seed = settings.training.seed
    for name, parameter in model.named_parameters():
        shape, shard = tuple(parameter.shape), shard_of(parameter)
        value = initial_value(name, shape, settings.model, seed, shard)
        gradients.local(parameter).copy_(value)
    return model


def build_on_meta(settings: Settings, grid: Grid) -> Transformer:
    """Returns this process's part of the model on meta: split over tensor, context and pipeline ranks,
    then sharded."""
    layer_linear = float8.layer_linear(settings.training, sharded=grid.gradient_ranks > 1)
    with torch.device("meta"):
        model = build_model(settings.model, settings.data.objective, layer_linear)
    tensor_parallel.apply(model, grid, settings)
    context_parallel.apply(model, grid)
    recompute.apply(model, settings.parallel.recompute)
    if grid.size("pp") > 1:
        stages.keep_stages(model, grid.rank("pp"), settings)
    fsdp.shard(model, grid, settings)
    return model


def shard_of(parameter: torch.Tensor) -> tuple[range, ...] | None:
    """Returns the indices along each axis of the whole that this process holds; None: all."""
    if not isinstance(parameter, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(range(start, start + size) for start, size in zip(offset, shape, strict=True))
