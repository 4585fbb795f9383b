"""torch's FlexAttention: each query row's interval of keys as a mask rule, T5's bias as a score rule.

The block mask is made on the host from the intervals: torch's own `create_block_mask` evaluates the
rule at every (query, key) pair, on the device, each step. Compiled, it is a Triton kernel, one for
each shape of q and k and none for a new mask; with the backend FLASH (flex_flash) FlashAttention-4
applies the same rule. On a CPU it has no backward.

Shape suffixes: B rows, S length, H heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from megaarch.attention.bias import RelativeBias, relative_bucket
from megaarch.attention.flash4 import KERNEL as FLASH4
from megaarch.attention.gpu import Gpu, describe
from megaarch.attention.intervals import blank, blocks, intervals, tensors
from megaarch.attention.parts import Parts
from megaarch.attention.rows import HALF, nothing, to_device
from megaarch.attention.varlen import compute_dtype

BLOCK = (128, 128)
FLASH_BLOCK = (256, 128)  # what FlashAttention-4's backward on Hopper divides
COMPILED = ("cuda",)  # devices; elsewhere it runs uncompiled
SHAPES = 1024  # that may be compiled; Dynamo's own limit is 8, and the rest then runs uncompiled


@dataclass(frozen=True)
class Kernel:
    """backend: FlexAttention's own, TRITON or FLASH. block: query rows and keys of a block."""

    backend: str
    block: tuple[int, int]
    tflops: tuple[float, float] | None
    operators: str

    def cannot_run(
        self, q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None
    ) -> str | None:
        """The first reason not to run here, or None."""
        if self.backend == "FLASH":
            if q.device.type != "cuda" or compute_dtype(q) not in HALF:
                return "it runs on cuda and takes half precision only"
            if bias is not None:
                return "a learned bias has no gradient there: use flex"
            if obstacle := FLASH4.package.obstacle(q.device):
                return obstacle
        if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or bias):
            return "FlexAttention has no backward on a CPU"
        if q.device.type != "cuda":
            return None
        gpu, size = describe(q.device), q.shape[-1]
        if bias is not None and gpu.deterministic:
            return "it adds up the gradient of a bias by atomics, which are not deterministic"
        return self.limit(gpu, size, parts)

    def limit(self, gpu: Gpu, head_size: int, parts: Parts) -> str | None:
        """Of torch 2.11 to 2.13 (torch/_inductor/kernel/flex) and flash-attn-4 4.0.0b36."""
        if self.backend == "TRITON":
            return f"its head sizes begin at 16, not {head_size}" if head_size < 16 else None
        most, divisor = FLASH4.head_sizes
        if head_size % divisor or head_size > most:
            return f"its head sizes are multiples of {divisor} up to {most}, not {head_size}"
        if gpu.capability[0] == 12:
            return "FlashAttention-4 has no backward for a mask at compute capability 12.x"
        if gpu.deterministic:
            return "its backward is deterministic only with metadata that torch's own masks carry"
        return None

    def warm(self, parts: Parts, device_type: str = "cuda") -> None:
        blocks(parts, self.block)

    def cost(self, parts: Parts) -> tuple[int, int]:
        """(query, key) pairs of the blocks that it computes, and its calls."""
        found = blocks(parts, self.block)
        count = int(found.partial[0].sum()) + int(found.full[0].sum())
        return count * self.block[0] * self.block[1], 1

    def attend(
        self,
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
        device, dtype, found = q_BSHD.device, compute_dtype(q_BSHD), intervals(parts)
        if not found.last.any():
            tables = () if bias is None else (bias.table,)
            return nothing(q_BSHD, k_BSHD, v_BSHD, *tables)
        rows = tensors(found, device)
        q = blank(q_BSHD.to(dtype), rows["unasked"])
        k, v = (blank(x.to(dtype), rows["unseen"]) for x in (k_BSHD, v_BSHD))
        score = None if bias is None else _score(bias, query_positions, key_positions)
        with torch.autocast(device.type, enabled=False):
            out = _run(
                device.type,
                *(x.transpose(1, 2) for x in (q, k, v)),
                score_mod=score,
                block_mask=self._mask(parts, device),
                scale=scale,
                enable_gqa=q.shape[2] != k.shape[2],
                kernel_options={"BACKEND": self.backend} if device.type == "cuda" else None,
            )
        return blank(out.transpose(1, 2), rows["unasked"]).to(q_BSHD.dtype)

    def _mask(self, parts: Parts, device: torch.device) -> Any:
        """The block mask on a device, made once a batch."""
        from torch.nn.attention.flex_attention import BlockMask

        found, key = intervals(parts), (device, self.block)
        if key not in found.on_device:
            rows, listed = tensors(found, device), blocks(parts, self.block)
            arrays = (to_device(x, device) for x in (*listed.partial, *listed.full))
            found.on_device[key] = BlockMask.from_kv_blocks(
                *arrays,
                BLOCK_SIZE=self.block,
                mask_mod=_rule(rows["first"], rows["last"]),
                seq_lengths=(parts.queries, parts.keys),
            )
        return found.on_device[key]


def _rule(first: torch.Tensor, last: torch.Tensor) -> Callable:
    def visible(b, h, q, kv):
        return (kv >= first[b, q]) & (kv < last[b, q])

    return visible


def _score(
    bias: RelativeBias, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> Callable:
    """Adds the table's entry of a pair's distance; the table has its gradient, on CUDA."""
    table, reach = bias.table, bias.max_distance
    distance = torch.arange(-reach, reach + 1, device=table.device)
    bucket = relative_bucket(distance, bias.bidirectional, table.shape[0], reach)
    asks, seen = query_positions[..., 0].contiguous(), key_positions[..., 0].contiguous()

    def add(score, b, h, q, kv):
        far = (seen[b, kv] - asks[b, q]).clamp(-reach, reach) + reach
        return score + table[bucket[far], h]

    return add


def _run(device_type: str, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """flex_attention, compiled where it is fast so. A shape too many is an error: uncompiled, it would
    make the whole [Sq, Sk] of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type not in COMPILED:
        return flex_attention(*tensors, **options)
    limits = {"recompile_limit": SHAPES, "accumulated_recompile_limit": SHAPES}
    with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
        return _compiled()(*tensors, **options)


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


FLEX = Kernel("TRITON", BLOCK, (371.0, 219.0), "triton|flex")  # causal, 8k, H100; docs/kernels.md
FLEX_FLASH = Kernel("FLASH", FLASH_BLOCK, None, "flash")
