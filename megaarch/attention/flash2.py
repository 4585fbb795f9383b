"""FlashAttention-2 (Dao 2023), package flash-attn: Ampere and later."""

from megaarch.attention.package import Package
from megaarch.attention.varlen import Call, Kernel


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
        )

    return run


KERNEL = Kernel(
    Package(
        "flash-attn",
        "pip install flash-attn --no-build-isolation builds it with nvcc",
        "flash_attn",
        "flash_attn_varlen_func",
    ),
    call,
    tflops=(335.0, 335.0),  # forward and backward together, H100 (Dao 2023, section 4.1)
    operators="flash",
    forward_operators=("flash_attn::_flash_attn_varlen_forward",),
)
