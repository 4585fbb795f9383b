"""Attention by decomposition into calls of torch's scaled_dot_product_attention.

The plan (sdpa_plan.py) says which rows go into which call; gather.py takes them there and back.

Letters of shapes: docs/shapes.md.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaarch.attention import sdpa_plan
from megaarch.attention.gather import AXES, Gather, IndexGather, gather_rows
from megaarch.attention.kernel_interface import HALF, AttentionInputs, CallsKernel
from megaarch.attention.mask import FULL, Parts
from megaarch.attention.plan import CallPlan, to_device
from megaarch.attention.sdpa_plan import Call

CUDNN = (SDPBackend.CUDNN_ATTENTION,)
# On an accelerator, all but cuDNN's: it builds a plan for each exact shape, refuses some, and its
# backward has given NaN for dense masks.
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class SdpaKernel(CallsKernel):
    """Runs everything. backends: of torch, on an accelerator."""

    refuses_bias: str | None = None
    backends: tuple[SDPBackend, ...] = BACKENDS

    def plan(self, parts: Parts) -> CallPlan:
        return parts.plan("sdpa", sdpa_plan.build)

    def compute_dtype(self, q: torch.Tensor) -> torch.dtype:
        """Autocast's, and on a CPU only what it has units for."""
        dtype = super().compute_dtype(q)
        # Without matrix units the CPU kernel's 16-bit backward takes 8 times as long as fp32.
        if q.device.type == "cpu" and dtype in HALF and not torch.cpu._is_amx_tile_supported():
            return torch.float32
        return dtype

    def on_device(self, inputs: AttentionInputs) -> Gather:
        return on_device(self.plan(inputs.parts), inputs.device)

    def run_call(self, call: Call, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        if inputs.bias is not None:
            added = bias(call, inputs, q.dtype)
        else:
            added = mask(call, q.dtype, q.device) if call.masked else None
        out = run(call, q, k, v, added, inputs.scale, self.backends)
        if call.kept is None:
            return out
        # torch's own backward of a choice of rows adds them up, on a GPU by atomics or after a sort
        return IndexGather((), {"kept": [call.kept]}, once=("kept",)).gather(out, "kept")[0]


def on_device(plan: CallPlan, device: torch.device) -> IndexGather:
    """Returns the plan's calls with their index tensors on `device`, made once."""

    def moved(call: Call) -> Call:
        rows = {name: to_device(getattr(call, name), device) for name in ("q", "k", "kept", "out")}
        return replace(call, masks={}, **rows)

    def make() -> IndexGather:
        with torch.inference_mode(False):  # autograd saves them in a later training step
            calls = tuple(map(moved, plan.calls))
        return IndexGather(calls, {axis: [getattr(c, axis) for c in calls] for axis in AXES})

    return plan.once(device, make)


def mask(call: Call, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns 0 where a query may look and -inf elsewhere, broadcasting to [G, 1, Q, K]; made once."""
    if dtype not in call.masks:
        with torch.inference_mode(False):  # it may serve a later training step
            visible = seen(call, device)
            zeros = torch.zeros(visible.shape, dtype=dtype, device=device)
            call.masks[dtype] = zeros.masked_fill_(~visible, float("-inf"))
    return call.masks[dtype]


def seen(call: Call, device: torch.device) -> torch.Tensor:
    """Returns bool: key j is the tile's, and not right of query i's bottom-right diagonal."""
    q_lengths, k_lengths = call.q_lengths, call.k_lengths
    i = torch.arange(int(q_lengths.max()), device=device)[:, None]
    j = torch.arange(int(k_lengths.max()), device=device)
    if (k_lengths == k_lengths[0]).all() and (q_lengths == q_lengths[0]).all():
        q_lengths, k_lengths = q_lengths[:1], k_lengths[:1]
    keys = to_device(k_lengths, device)[:, None, None, None]
    if call.shape == FULL:
        return j < keys
    queries = to_device(q_lengths, device)[:, None, None, None]
    return (j < keys) & (j <= i + (keys - queries))


def bias(call: Call, inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
    """Returns the call's bias [G, H, Q, K], -inf where its queries may not look."""
    assert inputs.bias is not None
    given = zip(inputs.positions, (call.q, call.k), strict=True)
    block = inputs.bias.block(*(gather_rows(x, rows) for x, rows in given)).to(dtype)
    if call.masked or call.square:
        return block + mask(call, dtype, block.device)
    return block


def run(
    call: Call,
    q_GQHDh: torch.Tensor,
    k_GKHDh: torch.Tensor,
    v_GKHDh: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    backends: tuple[SDPBackend, ...],
) -> torch.Tensor:
    """Returns [G, Q, H, Dh] of one call of SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q_GQHDh, k_GKHDh, v_GKHDh))
    cpu, grouped = q.device.type == "cpu", q.shape[1] != k.shape[1]
    # Of an accelerator's backends cuDNN's and flash take grouped keys; others would fall to math.
    native = backends == CUDNN or (mask is None and q.dtype in HALF)
    if grouped and not (cpu or native):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    with nullcontext() if cpu else sdpa_kernel(list(backends)):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and call.square,
            scale=scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2)


KERNEL = SdpaKernel(
    "sdpa",
    forward_operators=(
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    ),
)
