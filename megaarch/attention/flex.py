"""torch's FlexAttention: each query row's interval of keys as a mask rule, T5's bias as a score rule.

The block mask is made on the host from the intervals: torch's own `create_block_mask` evaluates the
rule at every (query, key) pair, on the device, each step. Compiled, it is a Triton kernel, one for
each shape of q and k and none for a new mask; with the backend FLASH (flex_flash) FlashAttention-4
applies the same rule. On a CPU it has no backward.

Letters of shapes: docs/shapes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from megaarch.attention.bias import RelativeBias
from megaarch.attention.flash import FLASH4
from megaarch.attention.kernel_interface import HALF, AttentionInputs
from megaarch.attention.key_intervals import IntervalKernel, blocks, intervals, tensors
from megaarch.attention.mask import Parts
from megaarch.attention.packages import Gpu, describe
from megaarch.attention.plan import to_device

COMPILED = ("cuda",)  # devices; elsewhere it runs uncompiled
SHAPES = 1024  # that may be compiled; Dynamo's own limit is 8, and the rest then runs uncompiled


@dataclass(frozen=True, kw_only=True)
class FlexKernel(IntervalKernel):
    """backend: FlexAttention's own, TRITON or FLASH. block: query rows and keys of a block."""

    backend: str
    block: tuple[int, int]

    def refuses(self, inputs: AttentionInputs) -> str | None:
        q, has_bias = inputs.q, inputs.bias is not None
        if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or has_bias):
            return "FlexAttention has no backward on a CPU"
        if q.device.type == "cuda" and has_bias and describe(q.device).deterministic:
            return "it adds up the gradient of a bias by atomics, which are not deterministic"
        return None

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        blocks(parts, self.block)

    def run(self, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        on_cuda = q.device.type == "cuda"
        return _flex_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            score_mod=None if inputs.bias is None else _score(inputs.bias, *inputs.positions),
            block_mask=self.mask(inputs.parts, q.device),
            scale=inputs.scale,
            enable_gqa=q.shape[2] != k.shape[2],
            kernel_options={"BACKEND": self.backend} if on_cuda else None,
        ).transpose(1, 2)

    def mask(self, parts: Parts, device: torch.device) -> Any:
        """Returns the block mask on a device, made once a batch."""
        from torch.nn.attention.flex_attention import BlockMask

        found = intervals(parts)

        def make() -> BlockMask:
            rows = tensors(found, device)
            return BlockMask.from_kv_blocks(
                *to_device(blocks(parts, self.block), device),
                BLOCK_SIZE=self.block,
                mask_mod=_rule(rows.first, rows.last),
                seq_lengths=(parts.queries, parts.keys),
            )

        return found.once((device, self.block), make)


def _rule(first: torch.Tensor, last: torch.Tensor) -> Callable:
    def visible(b, h, q, kv):
        return (kv >= first[b, q]) & (kv < last[b, q])

    return visible


def _score(
    bias: RelativeBias, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> Callable:
    """Adds the table's entry of a pair's distance; the table has its gradient, on CUDA."""
    table, reach = bias.table, bias.max_distance
    bucket = bias.bucket_by_distance()
    asks, seen = (x.contiguous() for x in (query_positions, key_positions))

    def add(score, b, h, q, kv):
        far = (seen[b, kv] - asks[b, q]).clamp(-reach, reach) + reach
        return score + table[bucket[far], h]

    return add


def _flex_attention(q, k, v, **options: Any) -> Any:
    """Runs flex_attention, compiled where it is fast so. A shape too many is an error: uncompiled, it
    would make the whole [Sq, Sk] of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type not in COMPILED:
        return flex_attention(q, k, v, **options)
    limits: dict[str, Any] = {"recompile_limit": SHAPES, "accumulated_recompile_limit": SHAPES}
    # evaluation leaves layers uncompiled, which must not take hold here
    compiled = torch.compiler.set_stance("default")
    with compiled, torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
        return _compiled()(q, k, v, **options)


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The limit of torch 2.11 to 2.13 (torch/_inductor/kernel/flex)."""
    return f"its head sizes begin at 16, not {head_size}" if head_size < 16 else None


def limit_flash(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The limits of the same and of flash-attn-4 4.0.0b36."""
    if gpu.capability[0] == 12:
        return "FlashAttention-4 has no backward for a mask at compute capability 12.x"
    if gpu.deterministic:
        return "its backward is deterministic only with metadata that torch's own masks carry"
    return None


FLEX = FlexKernel(
    "flex",
    backend="TRITON",
    block=(128, 128),
    refuses_bias=None,
    limit=limit,
    operators="triton|flex",
)
FLEX_FLASH = FlexKernel(
    "flex_flash",
    backend="FLASH",
    block=(256, 128),  # what FlashAttention-4's backward on Hopper divides
    devices=("cuda",),
    dtypes=HALF,
    head_sizes=FLASH4.head_sizes,
    refuses_bias="a learned bias has no gradient there: use flex",
    package=FLASH4.package,
    limit=limit_flash,
    operators="flash",
)
