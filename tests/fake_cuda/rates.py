"""How long an H200 takes for what a kernel computes and moves: one table, whose rates are published.

Nothing here is measured. A kernel takes the longest of its FLOPs over the rate of its kind, its bytes
over the memory's, and its launches.
"""

from dataclasses import dataclass

T = 1e12
PEAK = 989.4 * T  # dense bf16 FLOP/s: NVIDIA's data sheet of H100 SXM and H200
MEMORY = 4.0 * T  # bytes/s that copies reach of the data sheet's 4.8
LAUNCH = 2.5e-6  # seconds between two short kernels of one stream, launched without a gap

# FLOP/s that large products reach; bf16: 0.69 of the peak, as cuBLAS does at a power limit of 700 W.
# fp32 without TF32 is the data sheet's; float8 is as much faster than bf16 as products of H100 and H200
# were measured to be, 1,280 over 720 (SemiAnalysis 2024-12-22, MI300X vs H100 vs H200, part 1).
PRODUCTS = {
    "bfloat16": 680 * T,
    "float16": 680 * T,
    "float32": 67 * T,
    "float64": 67 * T,
    "float8_e4m3fn": 1210 * T,
    "float8_e5m2": 1210 * T,
}


@dataclass(frozen=True)
class Speed:
    """FLOP/s by exact area, forward and backward."""

    forward: float
    backward: float


# Rows of 2k tokens, head size 128; docs/kernels.md has published figures of longer rows.
ATTENTION = {
    # cuDNN 9.19 on H200 is published at 484 and 370 (causal) and at 633 and 504 (full): rounded down
    "cudnn": Speed(430 * T, 360 * T),
    # FlashAttention-2 on H100: 335 for both together (Dao 2023, section 4.1), split as on other GPUs
    "flash2": Speed(350 * T, 300 * T),
    "flash3": Speed(584 * T, 356 * T),  # FlashAttention-3 on H100, causal (Shah et al. 2024)
    # torch's memory-efficient kernel, the only fused one that takes a dense mask: half of
    # FlashAttention-2, an assumption
    "efficient": Speed(175 * T, 150 * T),
    "flex": Speed(271 * T, 114 * T),  # FlexAttention on H100, causal
}


def seconds(
    *, flops: float = 0, rate: float = PRODUCTS["bfloat16"], bytes: float = 0, launches: int = 1
) -> float:
    """The time of a kernel, or of an operator that launches several."""
    return max(flops / rate, bytes / MEMORY, launches * LAUNCH)
