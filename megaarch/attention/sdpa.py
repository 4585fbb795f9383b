"""Attention by decomposition into calls of torch's scaled_dot_product_attention.

The plan (sdpa_plan.py) says which rows go into which call; rows.py takes them there and back.

Shape suffixes: B rows, S length, H heads, D head size; G tiles of a call, L padded length.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaarch.attention import sdpa_plan
from megaarch.attention.bias import RelativeBias
from megaarch.attention.parts import FULL, UNUSED, Parts
from megaarch.attention.rows import HALF, Put, Take, Where, nothing, pick, to_device
from megaarch.attention.sdpa_plan import Costs, Group, Plan

CUDNN = (SDPBackend.CUDNN_ATTENTION,)
# On an accelerator, all but cuDNN's: it builds a plan for each exact shape, refuses some, and its
# backward has given NaN for dense masks.
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
forward_operators = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def cannot_run(q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None) -> None:
    """It runs everything."""
    return None


def plan(parts: Parts, device_type: str = "cpu") -> Plan:
    """The calls of these parts on a type of device, remembered on the parts.

    Called ahead, as in a loader's worker, it takes the planning out of the step.
    """
    return parts.plan(f"sdpa:{device_type}", lambda p: sdpa_plan.build(p, Costs.of(device_type)))


def warm(parts: Parts, device_type: str) -> None:
    plan(parts, device_type)


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
    calls = plan(parts, q_BSHD.device.type)
    return attend_by(
        calls, q_BSHD, k_BSHD, v_BSHD, parts, scale, bias, query_positions, key_positions
    )


def attend_by(
    calls_plan: Plan,
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    parts: Parts,
    scale: float,
    bias: RelativeBias | None = None,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    backends: tuple[SDPBackend, ...] = BACKENDS,
) -> torch.Tensor:
    """Attention as `calls_plan` cuts these parts into calls. backends: of torch, on an accelerator."""
    device, dtype = q_BSHD.device, compute_dtype(q_BSHD)
    calls = on_device(calls_plan, parts, device)
    if not calls:
        tables = () if bias is None else (bias.table,)
        return nothing(q_BSHD, k_BSHD, v_BSHD, *tables)
    sides = ([c.q for c in calls], [c.k for c in calls], [c.k for c in calls])
    q_calls, k_calls, v_calls = (
        Take.apply(x.to(dtype), side)
        for x, side in zip((q_BSHD, k_BSHD, v_BSHD), sides, strict=True)
    )
    results = []
    with torch.autocast(device.type, enabled=False):
        for call, q, k, v in zip(calls, q_calls, k_calls, v_calls, strict=True):
            if bias is None:
                mask = call.mask(dtype) if call.group.masked else None
            else:
                mask = call.bias(bias, query_positions, key_positions, dtype)
            results.append(run(call, q, k, v, mask, scale, backends))
    if calls_plan.whole:
        return results[0].to(q_BSHD.dtype)
    out = Put.apply([c.put for c in calls], q_BSHD.shape, calls_plan.filled, *results)
    return out.to(q_BSHD.dtype)


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype that the calls run in: autocast's, and on a CPU only what it has units for."""
    kind, dtype = q.device.type, q.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    # Without matrix units the CPU kernel's 16-bit backward takes 8 times as long as fp32.
    if kind == "cpu" and dtype in HALF and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return dtype


@dataclass
class Call:
    """A group's tensors on one device. q, k: slices, or int64 [G, L] flat rows. put: as in Group."""

    group: Group
    parts: Parts
    device: torch.device
    q: Where
    k: Where
    put: tuple
    masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where a query may look and -inf elsewhere, broadcasting to [G, 1, Q, K]. Made once."""
        if dtype not in self.masks:
            with torch.inference_mode(False):  # it may serve a later training step
                seen = self.seen()
                mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
                self.masks[dtype] = mask.masked_fill_(~seen, float("-inf"))
        return self.masks[dtype]

    def seen(self) -> torch.Tensor:
        """bool: key j is one of the tile's, and not right of query i's bottom-right diagonal."""
        group, device = self.group, self.device
        if group.shape == UNUSED:
            seen = self.parts.dense()
            seen |= ~seen.any(2, keepdims=True)  # unread rows: a softmax of nothing is NaN
            return to_device(seen, device)[:, None]
        q_lengths, k_lengths = group.q_lengths, group.k_lengths
        i = torch.arange(int(q_lengths.max()), device=device)[:, None]
        j = torch.arange(int(k_lengths.max()), device=device)
        if (k_lengths == k_lengths[0]).all() and (q_lengths == q_lengths[0]).all():
            q_lengths, k_lengths = q_lengths[:1], k_lengths[:1]
        keys = to_device(k_lengths, device)[:, None, None, None]
        if group.shape == FULL:
            return j < keys
        queries = to_device(q_lengths, device)[:, None, None, None]
        return (j < keys) & (j <= i + (keys - queries))

    def bias(
        self,
        bias: RelativeBias,
        query_positions: torch.Tensor,
        key_positions: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The call's bias [G, H, Q, K], -inf where its queries may not look."""
        at = [pick(query_positions, self.q), pick(key_positions, self.k)]
        if all(map(alike, at)):
            at = [x[:1] for x in at]  # tiles share a block
        block = bias.block(*at).to(dtype)
        if self.group.masked or self.group.square:
            return block + self.mask(dtype)
        return block


def alike(positions: torch.Tensor) -> bool:
    """Whether all tiles are known to have the same positions. Asked on a CPU only: on an accelerator
    the answer would have to be waited for. Fake tensors and traced ones have none."""
    if positions.device.type != "cpu" or is_fake(positions) or torch.compiler.is_compiling():
        return False
    return bool((positions == positions[:1]).all())


def on_device(plan: Plan, parts: Parts, device: torch.device) -> list[Call]:
    """The plan's calls with their index tensors on `device`, made once."""
    if device not in plan.on_device:
        plan.on_device[device] = [
            Call(
                group,
                parts,
                device,
                to_device(group.q, device),
                to_device(group.k, device),
                tuple(to_device(x, device) for x in group.put),
            )
            for group in plan.groups
        ]
    return plan.on_device[device]


def run(
    call: Call,
    q_GLHD: torch.Tensor,
    k_GLHD: torch.Tensor,
    v_GLHD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    backends: tuple[SDPBackend, ...],
) -> torch.Tensor:
    """One call of SDPA. Returns [G, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_GLHD, k_GLHD, v_GLHD))
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
            is_causal=mask is None and call.group.square,
            scale=scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2)
