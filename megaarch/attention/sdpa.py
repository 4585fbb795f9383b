"""Attention by decomposition into calls of torch's scaled_dot_product_attention.

The plan (sdpa_plan.py) says which rows go into which call; gather.py takes them there and back.

Letters of shapes: docs/shapes.md.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaarch.attention import kernel_interface, sdpa_plan
from megaarch.attention.gather import Gather, IndexGather, Rows, gather_rows
from megaarch.attention.kernel_interface import HALF, AttentionInputs, CallsKernel
from megaarch.attention.mask import FULL, UNUSED, Parts
from megaarch.attention.plan import CallPlan, to_device
from megaarch.attention.sdpa_plan import Call, Costs

CUDNN = (SDPBackend.CUDNN_ATTENTION,)
# On an accelerator, all but cuDNN's: it builds a plan for each exact shape, refuses some, and its
# backward has given NaN for dense masks.
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def plan(parts: Parts, device_type: str = "cpu") -> CallPlan:
    """Returns the calls of these parts on a type of device, remembered on the parts."""
    return parts.plan(f"sdpa:{device_type}", lambda p: sdpa_plan.build(p, Costs.of(device_type)))


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """Returns the dtype that the calls run in: autocast's, and on a CPU only what it has units for."""
    dtype = kernel_interface.compute_dtype(q)
    # Without matrix units the CPU kernel's 16-bit backward takes 8 times as long as fp32.
    if q.device.type == "cpu" and dtype in HALF and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return dtype


@dataclass(frozen=True)
class SdpaKernel(CallsKernel):
    """Runs everything. backends: of torch, on an accelerator."""

    refuses_bias: str | None = None
    backends: tuple[SDPBackend, ...] = BACKENDS

    def plan(self, parts: Parts, device_type: str) -> CallPlan:
        return plan(parts, device_type)

    def compute_dtype(self, q: torch.Tensor) -> torch.dtype:
        return compute_dtype(q)

    def on_device(self, inputs: AttentionInputs) -> Gather:
        device = inputs.device
        return on_device(self.plan(inputs.parts, device.type), device)

    def run_call(self, call: "CallOnDevice", inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        if inputs.bias is not None:
            mask = call.bias(inputs, q.dtype)
        else:
            mask = call.mask(q.dtype, inputs.parts) if call.plan.masked else None
        return run(call.plan, q, k, v, mask, inputs.scale, self.backends)


@dataclass(frozen=True)
class CallOnDevice:
    """A call of the plan. q, k: the rows that it reads, on the device. masks: made for it so far. Parts keep it, so
    that it must not keep them: such a cycle would live until the collector comes, which may be never."""

    plan: Call
    device: torch.device
    q: Rows
    k: Rows
    masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype, parts: Parts) -> torch.Tensor:
        """Returns 0 where a query may look and -inf elsewhere, broadcasting to [G, 1, Q, K]."""
        if dtype not in self.masks:
            with torch.inference_mode(False):  # it may serve a later training step
                seen = self.seen(parts)
                mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
                self.masks[dtype] = mask.masked_fill_(~seen, float("-inf"))
        return self.masks[dtype]

    def seen(self, parts: Parts) -> torch.Tensor:
        """Returns bool: key j is the tile's, and not right of query i's bottom-right diagonal."""
        call, device = self.plan, self.device
        if call.shape == UNUSED:
            seen = parts.dense()
            seen |= ~seen.any(2, keepdims=True)  # unread rows: a softmax of nothing is NaN
            return to_device(seen, device)[:, None]
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

    def bias(self, inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
        """Returns the call's bias [G, H, Q, K], -inf where its queries may not look."""
        assert inputs.bias is not None
        given = zip(inputs.positions, (self.q, self.k), strict=True)
        at = [gather_rows(x, rows) for x, rows in given]
        if all(map(alike, at)):
            at = [x[:1] for x in at]  # tiles share a block
        block = inputs.bias.block(*at).to(dtype)
        if self.plan.masked or self.plan.square:
            return block + self.mask(dtype, inputs.parts)
        return block


def alike(positions: torch.Tensor) -> bool:
    """Returns whether all tiles are known to have the same positions. Asked on a CPU only: on an
    accelerator the answer would have to be waited for. Fake tensors and traced ones have none."""
    if positions.device.type != "cpu" or is_fake(positions) or torch.compiler.is_compiling():
        return False
    return bool((positions == positions[:1]).all())


def on_device(plan: CallPlan, device: torch.device) -> IndexGather:
    """Returns the plan's calls with their index tensors on `device`, made once."""

    def make() -> IndexGather:
        rows = {
            axis: [to_device(getattr(call, axis), device) for call in plan.calls] for axis in "qk"
        }
        calls = tuple(
            CallOnDevice(call, device, q, k)
            for call, q, k in zip(plan.calls, rows["q"], rows["k"], strict=True)
        )
        targets = [tuple(to_device(x, device) for x in call.target) for call in plan.calls]
        return IndexGather(calls, rows, targets, plan.filled)

    return plan.once(device, make)


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
