"""cuDNN through its Python frontend, package nvidia-cudnn-frontend: ragged rows, bottom-right.

cuDNN compiles a graph for each shape of its tensors: number of segments, longest of them and, for the
backward, rows. All three are rounded up, so that batches of random lengths share graphs. The rows
that this adds lie behind the last segment; the segments are one such query and one such key each,
since cuDNN before 9.25 gives NaN where one is empty.
"""

import torch
import torch.nn.functional as F

from megaarch.attention.mask import Parts
from megaarch.attention.packages import Gpu, Package
from megaarch.attention.varlen import VarlenCall, VarlenKernel

ROWS, LONGEST = 1024, 256  # multiples that rows of a call and its longest segment are rounded up to


def run(sdpa_torch, q, k, v, call: VarlenCall, scale: float) -> torch.Tensor:
    """Calls it as nvidia-cudnn-frontend 1.32 wants: it is differentiable where it returns the
    log-sum-exp, and follows torch.use_deterministic_algorithms."""
    segments = len(call.q.starts) - 1
    more = (1 << (segments - 1).bit_length()) - segments  # to a power of two
    out, _ = sdpa_torch(
        *(_padded(x, more) for x in (q, k, v)),
        scale=scale,
        is_causal=call.causal,
        causal_bottom_right=call.causal,
        cu_seqlens_q=_with_more(call.q.starts, more),
        cu_seqlens_kv=_with_more(call.k.starts, more),
        max_seqlen_q=_rounded(call.q.longest, LONGEST),
        max_seqlen_kv=_rounded(call.k.longest, LONGEST),
        return_lse=True,
    )
    return out[: len(q)]


def _padded(x: torch.Tensor, more: int) -> torch.Tensor:
    """Returns x with zeros behind its rows, `more` at least; x itself where none are needed."""
    missing = _rounded(len(x) + more, ROWS) - len(x)
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _with_more(starts: torch.Tensor, more: int) -> torch.Tensor:
    """Returns the cumulative lengths of these segments and of `more` behind them, of a row each."""
    if not more:
        return starts
    ends = torch.arange(1, more + 1, dtype=starts.dtype, device=starts.device)
    return torch.cat((starts, starts[-1] + ends))


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The limits of cudnn-frontend 1.32 (its sdpa_support_surface.h and backward node); before 9.18 its
    ragged backward on Hopper read a workspace that nothing had written (TransformerEngine issue
    2186)."""
    if gpu.cudnn < 91801:
        return "its ragged backward needs cuDNN 9.18.1 or later"
    if gpu.deterministic and gpu.capability[0] in (8, 12):
        return "its ragged backward is not deterministic at compute capabilities 8.x and 12.x"
    return None


KERNEL = VarlenKernel(
    "cudnn_ragged",
    run=run,
    package=Package(
        "nvidia-cudnn-frontend", "pip install nvidia-cudnn-frontend", "cudnn", "sdpa_torch", last=12
    ),
    head_sizes=(128, 8),
    limit=limit,
    operators="cudnn|fmha|frost",
    forward_operators=("cudnn::sdpa_fwd",),
    rebuilds=True,  # less often for the rounding, and yet in any batch
)
