"""Checks of runs with float8 products (training.float8), and the scales of weights that FSDP gathers.

torchao is imported only in runs that use it.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megaarch.config.schema import Training
from megaarch.errors import UserError
from megaarch.model.layers import MakeLinear
from megaarch.model.linear import Linear

OLDEST = (0, 18)  # of torchao: the first that is built for torch 2.11
CAPABILITY = (8, 9)  # of the first GPUs with float8 units (Ada)
Value = TypeVar("Value")


def check(training: Training, device: torch.device) -> None:
    """Raises UserError where a run cannot train with the float8 products of `training.float8` on `device`."""
    check_package(training)
    if training.float8 is None or training.float8_emulate:
        return
    instead = "set training.float8_emulate=true to try it without, slowly, or leave it out"
    if device.type != "cuda":
        raise UserError(f"training.float8: a CPU has no float8 units: {instead}")
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        raise UserError(
            f"training.float8: it needs a GPU of compute capability 8.9 or later (Ada, Hopper, "
            f"Blackwell), and this one is of {have[0]}.{have[1]}: {instead}"
        )


def check_package(training: Training) -> None:
    """Raises UserError where `training.float8` is set and there is no torchao for it."""
    if training.float8 is None:
        return
    try:
        found = version("torchao")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        have = "which is not installed" if found is None else f"and {found} is installed"
        raise UserError(
            f"training.float8: {training.float8} needs torchao {OLDEST[0]}.{OLDEST[1]} or newer, "
            f"{have}: pip install 'megaarch[float8]', or leave the setting out"
        )


def layer_linear(training: Training, *, sharded: bool) -> MakeLinear:
    """Returns what makes the linear layers of layers. sharded: whether FSDP gathers their weights."""
    if training.float8 is None:
        return Linear
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao's, of extensions that these products do not use
    try:
        from megaarch.model import float8_linear
    finally:
        logging.disable(before)
    return float8_linear.linear(training.float8, emulate=training.float8_emulate, sharded=sharded)


def set_scales(model: nn.Module, training: Training) -> None:
    """Computes the scales of all weights that are gathered in float8, together, from their present
    values. Call it on every rank after weights have changed and before their next use."""
    if training.float8 is None:
        return
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def masters(state: Mapping[str, Value]) -> dict[str, Value | torch.Tensor]:
    """Returns a model's state with plain tensors for weights that are gathered in float8; they share
    memory."""
    return {name: _master(value) for name, value in state.items()}


def _master(value: Value) -> Value | torch.Tensor:
    if not isinstance(value, DTensor) or type(shard := value.to_local()) is torch.Tensor:
        return value
    plain = shard._tensor  # pyright: ignore[reportAttributeAccessIssue]  # torchao's subclass has it
    mesh, whole = value.device_mesh, {"shape": value.shape, "stride": value.stride()}
    return DTensor.from_local(plain, mesh, value.placements, run_check=False, **whole)
