"""FlashAttention-4, package flash-attn-4 (kernels in CuTe, compiled at first use): Hopper and later."""

from megaarch.attention.package import Package
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
        )
        return out

    return run


KERNEL = Kernel(
    Package(
        "flash-attn-4",
        "pip install --pre flash-attn-4",
        "flash_attn.cute",
        "flash_attn_varlen_func",
        capability=(9, 0),
    ),
    call,
    head_sizes=(128, 8),
    operators="flash",
)
