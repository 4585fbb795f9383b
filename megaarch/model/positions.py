"""Rotary tables and learned tables of position embeddings. T5's relative bias stands in
attention/bias.py, its tables in the model. Letters of shapes: docs/shapes.md.
"""

from functools import reduce

import torch
from torch import nn

from megaarch.config.catalogue import ARCHITECTURES, position_axes
from megaarch.config.schema import Model, RopeScaling
from megaarch.kernels.bindings import serves
from megaarch.kernels.qkv_rope import Heads
from megaarch.model.rope_scaling import attention_factor, scaled

AXES = "the number of position axes"


def position_scheme(model: Model, objective: str) -> dict[str, str | int]:
    """Maps the name of each setting that gives weights their positional meaning to its value: weights
    that were learned under one scheme are damaged under another of the same shapes. Settings that are
    changed on purpose for longer rows are left out: the base of RoPE, T5's greatest distance.
    """
    encoding = model.position_encoding
    scheme: dict[str, str | int] = {"model.position_encoding": encoding}
    if encoding in ("rope", "learned"):
        scheme[AXES] = position_axes(objective)
    if encoding == "learned":
        scheme["model.position_offset"] = model.position_offset
    if encoding == "relative":
        of = ARCHITECTURES[model.architecture]
        for stream, both in zip(of.streams, of.bidirectional_bias, strict=True):
            rule = "bidirectional" if both else "unidirectional"
            scheme[f"the {stream}'s rule of relative buckets"] = rule
    return scheme


def scheme_fault(theirs: dict[str, str | int], mine: dict[str, str | int]) -> str | None:
    """Returns a sentence on the first difference of two schemes; None: weights of one fit the other.
    Learned positions may gain axes, whose tables are new (weight_transfer.py)."""
    for name in {**theirs, **mine}:
        of_them, of_me = theirs.get(name, "absent"), mine.get(name, "absent")
        if of_them == of_me:
            continue
        fault = f"{name} is {of_them} there and {of_me} here"
        if name != AXES:
            return fault
        if mine["model.position_encoding"] == "rope":
            return f"{fault}, and RoPE divides the frequencies of a head among them"
        if int(of_me) < int(of_them):
            return fault
    return None


def rotary_tables(
    positions_BSA: torch.Tensor,
    head_size: int,
    base: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and signed sin, each [B, S, 1, Dh] in `dtype`, for `rotate`; computed in fp32.

    The head dimension is split evenly among the A axes. Within an axis's share, channel i pairs
    with channel i + share/2 (rotate-half, as Llama has it) and rotates by position·base^(-2i/share)
    (RoPE: Su et al. 2021, section 3.2.2), or at the frequencies that `scaling` makes of these.
    """
    axes = positions_BSA.shape[-1]
    share = head_size // axes
    assert share % 2 == 0 and share * axes == head_size, (head_size, axes)
    exponent = torch.arange(0, share, 2, device=positions_BSA.device, dtype=torch.float32) / share
    frequency = base**-exponent
    if scaling is not None:
        frequency = scaled(frequency, base, scaling)
    angle = positions_BSA.to(torch.float32)[..., None] * frequency  # [B, S, A, share/2]
    cos, sin = angle.cos(), angle.sin()
    if (factor := attention_factor(scaling)) != 1:
        cos, sin = factor * cos, factor * sin
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    cos, sin = (table.flatten(-2)[:, :, None].to(dtype) for table in tables)
    return cos, sin


def _swap_halves(x: torch.Tensor, axes: int) -> torch.Tensor:
    return x.unflatten(-1, (axes, 2, -1)).flip(-2).flatten(-3)  # compiled, an index and no copy


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation by the opposite angle: three passes, nothing saved."""

    @staticmethod
    def forward(ctx, x, cos, sin, axes):
        ctx.save_for_backward(cos, sin)
        ctx.axes = axes
        rotated = torch.addcmul(x * cos, _swap_halves(x, axes), sin)
        # a cast that changes nothing gives an alias, whose gradient torch 2.11 compiles as zero
        return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        cos, sin = ctx.saved_tensors
        swapped = _swap_halves(grad, ctx.axes)
        rotated = torch.addcmul(grad * cos, swapped, sin, value=-1)
        return rotated.to(grad.dtype), None, None, None


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], axes: int) -> torch.Tensor:
    """Returns x [B, S, ..., Dh] rotated by `rotary_tables` (RoPE), computed in their dtype and rounded
    once to x's; heads may fill several dimensions."""
    cos, sin = (table.view(*table.shape[:2], *[1] * (x.ndim - 3), -1) for table in tables)
    return _Rotate.apply(x, cos, sin, axes)


def heads(
    qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, axes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q [B, S, H, Dh], k and v [B, S, Hkv, Dh] of qkv [B, S, Hkv, H / Hkv + 2, Dh]; q and k
    rotated by `rotary_tables`, where there are any."""
    if rotary is not None and serves(qkv):
        return Heads.apply(qkv, *rotary, axes)
    q, k, v = qkv.split((qkv.shape[-2] - 2, 1, 1), dim=-2)
    if rotary is not None:  # apart, so that the gradients are put together once
        q, k = (rotate(x, rotary, axes) for x in (q, k))
    return q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)


class LearnedPositions(nn.ModuleList):
    """One table of embeddings for each position axis; their rows are summed (GLM: Du et al. 2022,
    section 2.1). The first `offset` rows of each table stay unused (BART has two)."""

    def __init__(self, rows: int, size: int, axes: int, offset: int):
        super().__init__(nn.Embedding(rows + offset, size) for _ in range(axes))
        self.offset = offset

    def forward(self, positions_BSA: torch.Tensor) -> torch.Tensor:
        """Returns [B, S, D]."""
        axes = zip(self, positions_BSA.unbind(-1), strict=True)
        return reduce(torch.add, (table(p + self.offset) for table, p in axes))
