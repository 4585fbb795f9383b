"""FlashAttention-3 (Shah et al. 2024), built from flash-attention's `hopper` folder: Hopper only."""

import torch

from megaarch.attention.gpu import Gpu
from megaarch.attention.package import Package
from megaarch.attention.parts import Parts
from megaarch.attention.varlen import Call, Kernel


def call(flash_attn_varlen_func) -> Call:
    """Early builds return the log-sum-exp as well."""

    def run(q, k, v, segments, scale):
        out = flash_attn_varlen_func(
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
        return out[0] if isinstance(out, tuple) else out

    return run


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Its deterministic backward is tested up to head size 192 (flash-attention, pull request 1893;
    builds of 2025 before that ignore the wish)."""
    if gpu.deterministic and head_size > 192:
        return f"its deterministic backward takes head sizes up to 192, not {head_size}"
    return None


KERNEL = Kernel(
    Package(
        "FlashAttention-3",
        "build it from github.com/Dao-AILab/flash-attention, folder hopper",
        "flash_attn_interface",
        "flash_attn_varlen_func",
        capability=(9, 0),
        last=9,
    ),
    call,
    limit=limit,
    tflops=(486.0, 321.0),  # packed causal rows, 8k, head size 128, H100; docs/kernels.md
    operators="flash|hopper",
    # the second of builds whose Python calls the C++ operator itself
    forward_operators=("flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd"),
)
