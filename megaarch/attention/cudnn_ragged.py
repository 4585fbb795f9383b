"""cuDNN through its Python frontend, package nvidia-cudnn-frontend: ragged rows, bottom-right.

cuDNN compiles a graph for each shape of its tensors. Numbers of rows and longest segments are
rounded up, so that batches of random lengths share graphs; rows past the last segment are padding
that no segment names.
"""

import torch.nn.functional as F

from megaarch.attention.package import Package
from megaarch.attention.varlen import Call, Kernel

ROWS, LONGEST = 1024, 256  # multiples that rows of a call and its longest segment are rounded up to


def call(sdpa_torch) -> Call:
    """As nvidia-cudnn-frontend 1.32 takes it: differentiable where it returns the log-sum-exp."""

    def run(q, k, v, segments, scale):
        out, _ = sdpa_torch(
            *(F.pad(x, (0, 0, 0, 0, 0, -len(x) % ROWS)) for x in (q, k, v)),
            scale=scale,
            is_causal=segments.causal,
            causal_bottom_right=segments.causal,
            cu_seqlens_q=segments.q_starts,
            cu_seqlens_kv=segments.k_starts,
            max_seqlen_q=_rounded(segments.q_longest),
            max_seqlen_kv=_rounded(segments.k_longest),
            return_lse=True,
        )
        return out[: len(q)]

    return run


def _rounded(length: int) -> int:
    return -(-length // LONGEST) * LONGEST


KERNEL = Kernel(
    Package(
        "nvidia-cudnn-frontend",
        "pip install nvidia-cudnn-frontend",
        "cudnn",
        "sdpa_torch",
    ),
    call,
    head_sizes=(128, 8),
    operators="cudnn|fmha|frost",
    forward_operators=("cudnn::sdpa_fwd",),
)
