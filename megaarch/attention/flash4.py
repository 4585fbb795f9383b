"""FlashAttention-4, package flash-attn-4 (kernels in CuTe, compiled at first use): Hopper and later."""

import torch

from megaarch.attention.gpu import Gpu
from megaarch.attention.package import Package
from megaarch.attention.parts import Parts
from megaarch.attention.varlen import Call, Kernel


def call(flash_attn_varlen_func) -> Call:
    """As flash-attn-4 4.0.0b36 takes it; it returns the log-sum-exp as well."""

    def run(q, k, v, segments, scale):
        out, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=segments.q_starts,
            cu_seqlens_k=segments.k_starts,
            max_seqlen_q=segments.q_longest,
            max_seqlen_k=segments.k_longest,
            softmax_scale=scale,
            causal=segments.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out

    return run


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Of flash-attn-4 4.0.0b36 (its interface.py)."""
    if gpu.deterministic and gpu.capability[0] == 12:
        return "it has no deterministic backward at compute capability 12.x"
    return None


KERNEL = Kernel(
    Package(
        "flash-attn-4",
        "pip install --pre flash-attn-4",
        "flash_attn.cute",
        "flash_attn_varlen_func",
        capability=(9, 0),
        last=12,
    ),
    call,
    limit=limit,
    head_sizes=(128, 8),
    operators="flash",
)
