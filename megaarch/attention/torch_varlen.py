"""torch's own variable-length attention: FlashAttention-2 as torch ships it, or the version that
`torch.nn.attention.activate_flash_attention_impl` has put in its place."""

import inspect
from collections.abc import Callable
from functools import cache

import torch

from megaarch.attention.flash import TFLOPS_2, limit_2
from megaarch.attention.package import Package
from megaarch.attention.varlen import VarlenCall, VarlenKernel

FULL, CAUSAL = (-1, -1), (-1, 0)  # windows; torch's causal is aligned at the bottom right


def run(
    varlen_attn: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: VarlenCall,
    scale: float,
) -> torch.Tensor:
    """As torch 2.11 takes it. Its operators take key heads in groups in every version; newer ones
    want to be told. They follow torch.use_deterministic_algorithms by themselves."""
    grouped = q.shape[1] != k.shape[1] and _wants_to_be_told(varlen_attn)
    return varlen_attn(
        q,
        k,
        v,
        call.q.starts,
        call.k.starts,
        call.q.longest,
        call.k.longest,
        scale=scale,
        window_size=CAUSAL if call.causal else FULL,
        **({"enable_gqa": True} if grouped else {}),
    )


@cache
def _wants_to_be_told(varlen_attn: Callable[..., torch.Tensor]) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


KERNEL = VarlenKernel(
    "torch_varlen",
    run=run,
    package=Package(
        "torch.nn.attention.varlen",
        "it comes with torch 2.11 and later",
        "torch.nn.attention.varlen",
        "varlen_attn",
    ),
    limit=limit_2,
    tflops=TFLOPS_2,
    operators="flash",
    forward_operators=("torch_attn::_varlen_attn",),
)
