"""torch's own variable-length attention: FlashAttention-2 as torch ships it, or the version that
`torch.nn.attention.activate_flash_attention_impl` has put in its place."""

import inspect
from functools import cache

from megaarch.attention.flash2 import limit
from megaarch.attention.package import Package
from megaarch.attention.varlen import Call, Kernel

EVERY, CAUSAL = (-1, -1), (-1, 0)  # windows; torch's causal is aligned at the bottom right


@cache
def call(varlen_attn) -> Call:
    """As torch 2.11 takes it. Its operators take key heads in groups in every version; newer ones
    want to be told. They follow torch.use_deterministic_algorithms by themselves."""
    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(q, k, v, segments, scale):
        options = {"enable_gqa": True} if asks and q.shape[1] != k.shape[1] else {}
        return varlen_attn(
            q,
            k,
            v,
            segments.q_starts,
            segments.k_starts,
            segments.q_longest,
            segments.k_longest,
            scale=scale,
            window_size=CAUSAL if segments.causal else EVERY,
            **options,
        )

    return run


KERNEL = Kernel(
    Package(
        "torch.nn.attention.varlen",
        "it comes with torch 2.11 and later",
        "torch.nn.attention.varlen",
        "varlen_attn",
    ),
    call,
    limit=limit,
    tflops=(335.0, 335.0),  # of FlashAttention-2 on H100 (Dao 2023, section 4.1)
    operators="flash",
    forward_operators=("torch_attn::_varlen_attn",),
)
