"""cuDNN frontend's flex attention (experimental, Hopper and later): for each query row a union of
key intervals, of which parts need one.

One call runs every mask on the tensors as they are: nothing is gathered, cut or computed twice.
Its mask plan is made on the device once a batch, and serves all layers and the backward. It cannot
be made ahead: the library sizes it by counts that it reads back, so each batch's first call waits for
the device once.

Shape suffixes: B rows, S length, H heads, D head size.
"""

from dataclasses import replace
from typing import Any

import torch

from megaarch.attention.bias import RelativeBias
from megaarch.attention.gpu import Gpu, describe
from megaarch.attention.intervals import blank, intervals, tensors
from megaarch.attention.package import Package
from megaarch.attention.parts import Parts
from megaarch.attention.rows import HALF, nothing
from megaarch.attention.varlen import compute_dtype

LIBRARY = Package(
    "nvidia-cudnn-frontend",
    "pip install nvidia-cudnn-frontend nvidia-cutlass-dsl",
    "cudnn.flex_attention",
    "flex_attn_func",
)
PLANS = replace(LIBRARY, attribute="create_mask_plan")
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
tflops = None
operators = "flex|flash|attention|cutlass"


def cannot_run(
    q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None
) -> str | None:
    """The first reason not to run here, or None."""
    if q.device.type != "cuda":
        return f"it runs on cuda, not on {q.device.type}"
    if bias is not None:
        return "it takes no position bias"
    if compute_dtype(q) not in HALF:
        return f"it takes half precision, not {compute_dtype(q)}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"its head sizes are multiples of 8 up to 128, not {q.shape[-1]}"
    return LIBRARY.obstacle(q.device) or limit(describe(q.device), q.shape[-1], parts)


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Of cudnn-frontend 1.32 (flex_attention/runtime/arch.py). It is deterministic when asked to be."""
    if gpu.capability not in CAPABILITIES:
        return "it is built for compute capabilities 9.0, 10.0 and 10.3, not {}.{}".format(
            *gpu.capability
        )
    return None


def warm(parts: Parts, device_type: str = "cuda") -> None:
    intervals(parts)


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
    device, dtype, found = q_BSHD.device, compute_dtype(q_BSHD), intervals(parts)
    if not found.last.any():
        return nothing(q_BSHD, k_BSHD, v_BSHD)
    rows = tensors(found, device)
    q = blank(q_BSHD.to(dtype), rows["unasked"])
    k, v = (blank(x.to(dtype), rows["unseen"]) for x in (k_BSHD, v_BSHD))
    with torch.autocast(device.type, enabled=False):
        plan = _mask_plan(parts, q, k, v)
        out = LIBRARY.load()(
            q,
            k,
            v,
            mask_plan=plan,
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    return blank(out, rows["unasked"]).to(q_BSHD.dtype)


def endpoints(parts: Parts, device: torch.device) -> torch.Tensor:
    """int32 [1, 3, B·Sq]: row by row the union [0, F0) U [F1, F2) of visible keys, F0 being 0."""
    rows = tensors(intervals(parts), device)
    first, last = rows["first"].flatten(), rows["last"].flatten()
    return torch.stack((torch.zeros_like(first), first, last))[None]


def _mask_plan(parts: Parts, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    found = intervals(parts)
    key = ("cudnn_flex", q.device, q.dtype, q.shape, k.shape)
    if key not in found.on_device:
        rule = endpoints(parts, q.device)
        found.on_device[key] = PLANS.load()(rule, q, k, v, build_backward=True)
    return found.on_device[key]
