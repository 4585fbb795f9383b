"""cuDNN through torch's scaled_dot_product_attention: decomposition B, the causal overlay.

    C[p:n; 0:n] runs as the last rows of C[0:n; 0:n], for the whole batch in one call, and the rows
    before p are computed for nothing; R[0:p; 0:p] is a call of its own for each length p.

torch gives cuDNN `is_causal`, which is top-left, or no mask at all; so what is no square triangle
and no rectangle after the overlay cannot run. The overlay computes more than the parts' area: at a
prefix of n/8 by 1.5%, n/4 by 6%, n/2 by 20%.

torch builds a cuDNN plan for each exact shape of a call and keeps it for good, which takes 55 ms to
1 s forward and backward. So `auto` takes this kernel for parts that are `steady` alone.
"""

import torch

from megaarch.attention import sdpa, sdpa_plan
from megaarch.attention.bias import RelativeBias
from megaarch.attention.gpu import Gpu, describe
from megaarch.attention.parts import CAUSAL, FULL, UNUSED, Parts
from megaarch.attention.rows import HALF
from megaarch.attention.sdpa_plan import Costs, Group, Plan
from megaarch.attention.varlen import compute_dtype

EXACT = Costs(call=0, row=0, band=None)  # no tile is padded to another's length: that needs a mask
MOST_PARTS = 4  # of a row: each can be a call of its own
LAST = (12, 1)  # compute capability
HEAD_SIZES = (128, 8)  # most, and the divisor
DEVICES = ("cuda",)
DTYPES = HALF
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


def steady(parts: Parts) -> bool:
    """Whether the shapes of its calls are the same in every batch: every row is full and one part, of
    one kind. Lengths that are drawn, and rows that are not full, give new shapes."""
    used = parts.table[:, :, 0] != UNUSED
    if not len(parts) or not (used.sum(1) == 1).all():
        return False
    shape, *ends = parts.table[used].T
    queries, keys = parts.full_row or (parts.queries, parts.keys)
    full = (0, queries, 0, keys)
    return bool((shape == shape[0]).all()) and all(
        (end == edge).all() for end, edge in zip(ends, full, strict=True)
    )


def cost(parts: Parts) -> tuple[int, int]:
    """(query, key) pairs that it computes, and its calls."""
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
    size, (most, divisor) = q.shape[-1], HEAD_SIZES
    if compute_dtype(q) not in DTYPES:
        return f"it takes half precision, not {compute_dtype(q)}"
    if size % divisor or size > most:
        return f"its head sizes are multiples of {divisor} up to {most}, not {size}"
    if crowded(parts):
        return f"a row has more than {MOST_PARTS} parts, and each can take a call of its own"
    if any(group.shape == CAUSAL and not group.square for group in plan(parts).groups):
        return "a causal part is not at the end of its own keys, and torch's causal is top-left"
    assert not any(group.shape == FULL and group.masked for group in plan(parts).groups)
    return limit(describe(q.device), size, parts) if q.device.type == "cuda" else None


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The first documented limit that these parts' calls break on this GPU, or None.

    Sources: sdp_utils.cpp of torch 2.11 to 2.13; the support surface of cudnn-frontend 1.32;
    pytorch issues 138529 and 196678, cudnn-frontend issue 1072 and pull request 628.
    """
    version = f"cuDNN {gpu.cudnn // 10000}.{gpu.cudnn // 100 % 100}.{gpu.cudnn % 100}"
    if gpu.deterministic:
        return "torch refuses cuDNN's attention under training.deterministic"
    if gpu.capability > LAST:
        return f"torch gives cuDNN compute capabilities up to {LAST[0]}.{LAST[1]}"
    if gpu.cudnn < 90000 or gpu.cudnn in (91000, 91001):
        return (
            f"{version} is too old, or known to be wrong: it takes 9.0 and later but 9.10.0, 9.10.1"
        )
    for group in plan(parts).groups:
        queries, keys = int(group.q_lengths.max()), int(group.k_lengths.max())
        if queries == 1 or keys == 1:
            what = "key" if keys == 1 else "query"
            return f"a call has one {what}: torch refuses one key, and one query can give NaN gradients"
        if keys % 128 and gpu.cudnn <= 91500:
            return f"a call has {keys} keys: {version} is wrong where 128 does not divide them"
        hidden = group.square  # what lies behind the last key is above the diagonal
        if keys % 128 == 64 and not hidden and gpu.capability[0] == 9 and gpu.cudnn < 92600:
            return f"a call has {keys} keys, 64 mod 128: {version} can give NaN gradients on Hopper"
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
    return sdpa.attend_by(plan(parts), q_BSHD, k_BSHD, v_BSHD, parts, scale, backends=sdpa.CUDNN)
