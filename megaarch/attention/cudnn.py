"""cuDNN through torch's scaled_dot_product_attention: decomposition B, the causal overlay.

    C[p:n; 0:n] runs as the last rows of C[0:n; 0:n], for the whole batch in one call, and the rows
    before p are computed for nothing; R[0:p; 0:p] is a call of its own for each length p.

torch gives cuDNN `is_causal`, which is top-left, or no mask at all; so what is no square triangle
and no rectangle after the overlay cannot run. The overlay computes more than the parts' area: at a
prefix of n/8 by 1.5%, n/4 by 6%, n/2 by 20%.
"""

import math
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaarch.attention import sdpa, sdpa_plan
from megaarch.attention.bias import RelativeBias
from megaarch.attention.parts import CAUSAL, FULL, Parts
from megaarch.attention.rows import HALF
from megaarch.attention.sdpa_plan import Costs, Group, Plan
from megaarch.attention.varlen import compute_dtype

EXACT = Costs(call=0, row=0, band=None)  # no tile is padded to another's length: that needs a mask
MOST_PARTS = 4  # of a row: each can be a call of its own
BACKEND: SDPBackend | None = SDPBackend.CUDNN_ATTENTION
DEVICES = ("cuda",)
operators = "cudnn|fmha|fort"
forward_operators = ("aten::_scaled_dot_product_cudnn_attention",)
tflops = (644.0, 541.0)  # causal, 8k, head size 128, H200; docs/kernels.md


def plan(parts: Parts) -> Plan:
    """The calls of these parts, remembered on them."""
    return parts.plan("cudnn", lambda p: sdpa_plan.build(p, EXACT))


def warm(parts: Parts, device_type: str = "cuda") -> None:
    if not crowded(parts):
        plan(parts)


def crowded(parts: Parts) -> bool:
    """Whether a row has too many parts: packed rows."""
    return bool(((parts.table[:, :, 0] != 0).sum(1) > MOST_PARTS).any())


def cost(parts: Parts) -> tuple[float, int]:
    """(query, key) pairs that it computes, and its calls."""
    if crowded(parts):
        return math.inf, 0
    groups = plan(parts).groups
    return sum(map(_pairs, groups)), len(groups)


def _pairs(group: Group) -> int:
    q, k = group.q_lengths, group.k_lengths
    pairs = q * (q + 1) // 2 if group.square else q * k
    return int(pairs.sum())


def cannot_run(
    q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None
) -> str | None:
    """The first reason not to run here, or None."""
    if q.device.type not in DEVICES:
        return f"it runs on cuda, not on {q.device.type}"
    if bias is not None:
        return "it takes no position bias here"
    if BACKEND is not None:
        if compute_dtype(q) not in HALF:
            return f"it takes half precision, not {compute_dtype(q)}"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"its head sizes are multiples of 8 up to 128, not {q.shape[-1]}"
    if crowded(parts):
        return f"a row has more than {MOST_PARTS} parts, and each can take a call of its own"
    if any(group.shape == CAUSAL and not group.square for group in plan(parts).groups):
        return "a causal part is not at the end of its own keys, and torch's causal is top-left"
    assert not any(group.shape == FULL and group.masked for group in plan(parts).groups)
    return None


def attend(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    parts: Parts,
    scale: float,
    bias: RelativeBias | None = None,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attend.attend`, whose contract this fulfils."""
    assert bias is None
    groups = q_BSHD.shape[2] // k_BSHD.shape[2]
    if groups > 1:
        k_BSHD, v_BSHD = (x.repeat_interleave(groups, dim=2) for x in (k_BSHD, v_BSHD))
    with nullcontext() if BACKEND is None else sdpa_kernel(BACKEND):
        return sdpa.attend_by(plan(parts), q_BSHD, k_BSHD, v_BSHD, parts, scale)
