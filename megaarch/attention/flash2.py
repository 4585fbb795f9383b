"""FlashAttention-2 (Dao 2023), package flash-attn: Ampere and later."""

import torch

from megaarch.attention.gpu import Gpu
from megaarch.attention.package import Package
from megaarch.attention.parts import Parts
from megaarch.attention.varlen import Call, Kernel

SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # capabilities with less shared memory


def call(flash_attn_varlen_func) -> Call:
    """As flash-attn 2.6 and later takes it."""

    def run(q, k, v, segments, scale):
        return flash_attn_varlen_func(
            q,
            k,
            v,
            segments.q_starts,
            segments.k_starts,
            segments.q_longest,
            segments.k_longest,
            softmax_scale=scale,
            causal=segments.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return run


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Of FlashAttention-2, torch's copy of it too (sdp_utils.cpp of torch 2.11 to 2.13)."""
    if 192 < head_size <= 224 and gpu.capability in SMALL:
        major, minor = gpu.capability
        return (
            f"its backward at compute capability {major}.{minor} takes no head size of 193 to 224"
        )
    return None


KERNEL = Kernel(
    Package(
        "flash-attn",
        "pip install flash-attn --no-build-isolation builds it with nvcc",
        "flash_attn",
        "flash_attn_varlen_func",
    ),
    call,
    limit=limit,
    tflops=(335.0, 335.0),  # forward and backward together, H100 (Dao 2023, section 4.1)
    operators="flash",
    forward_operators=("flash_attn::_flash_attn_varlen_forward",),
)
