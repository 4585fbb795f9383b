"""cuDNN through torch's scaled_dot_product_attention: decomposition B, the causal overlay.

    C[p:n; 0:n] runs as the last rows of C[0:n; 0:n], for the whole batch in one call, and the rows
    before p are computed for nothing; R[0:p; 0:p] is a call of its own for each length p.

torch gives cuDNN `is_causal`, which is top-left, or no mask at all; so what is no square triangle
and no rectangle after the overlay cannot run. The overlay computes more than the parts' area: at a
prefix of n/8 by 1.5%, n/4 by 6%, n/2 by 20%.

torch builds a cuDNN plan for each exact shape of a call and keeps it for good, which takes 55 ms to
1 s forward and backward. So `auto` takes this kernel for parts that are `steady` alone.
"""

from dataclasses import dataclass

from megaarch.attention import sdpa, sdpa_plan
from megaarch.attention.kernel_interface import HALF, AttentionInputs
from megaarch.attention.mask import CAUSAL, FULL, UNUSED, Parts
from megaarch.attention.packages import Gpu
from megaarch.attention.plan import CallPlan
from megaarch.attention.sdpa_plan import Call

EXACT = 0  # pairs of one more call: no tile is padded to another's length, which needs a mask
MOST_PARTS = 4  # of a row: each can be a call of its own
LAST = (12, 1)  # compute capability


def plan(parts: Parts) -> CallPlan:
    """Returns the calls of these parts, remembered on them."""
    return parts.plan("cudnn", lambda p: sdpa_plan.build(p, EXACT))


def crowded(parts: Parts) -> bool:
    """Returns whether a row has too many parts: packed rows."""
    return bool(((parts.table[:, :, 0] != UNUSED).sum(1) > MOST_PARTS).any())


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Returns the first documented limit that these parts' calls break on this GPU, or None.

    Sources: sdp_utils.cpp of torch 2.11 to 2.13; the support surface of cudnn-frontend 1.32;
    pytorch issues 138529 and 196678, cudnn-frontend issue 1072 and pull request 628.
    """
    version = f"cuDNN {gpu.cudnn // 10000}.{gpu.cudnn // 100 % 100}.{gpu.cudnn % 100}"
    if gpu.deterministic:
        return "torch refuses cuDNN's attention under training.deterministic"
    if gpu.capability > LAST:
        return f"torch gives cuDNN compute capabilities up to {LAST[0]}.{LAST[1]}"
    if gpu.cudnn < 90000 or gpu.cudnn in (91000, 91001):
        return (
            f"{version} is too old, or known to be wrong: it takes 9.0 and later but 9.10.0, 9.10.1"
        )
    for call in plan(parts).calls:
        queries, keys = int(call.q_lengths.max()), int(call.k_lengths.max())
        if queries == 1 or keys == 1:
            what = "key" if keys == 1 else "query"
            return f"a call has one {what}: torch refuses one key, and one query can give NaN gradients"
        if keys % 128 and gpu.cudnn <= 91500:
            return f"a call has {keys} keys: {version} is wrong where 128 does not divide them"
        hidden = call.square  # what lies behind the last key is above the diagonal
        if keys % 128 == 64 and not hidden and gpu.capability[0] == 9 and gpu.cudnn < 92600:
            return f"a call has {keys} keys, 64 mod 128: {version} can give NaN gradients on Hopper"
    return None


@dataclass(frozen=True)
class CudnnKernel(sdpa.SdpaKernel):
    def plan(self, parts: Parts) -> CallPlan:
        return plan(parts)

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        if not crowded(parts):
            plan(parts)

    def steady(self, parts: Parts) -> bool:
        """Returns whether every row is full and one part, of one kind. Lengths that are drawn, and
        rows that are not full, give new shapes."""
        used = parts.table[:, :, 0] != UNUSED
        if not len(parts) or not (used.sum(1) == 1).all():
            return False
        rows, (queries, keys) = parts.table[used], parts.full_row or (parts.queries, parts.keys)
        return bool((rows == rows[0]).all()) and rows[0, 1:].tolist() == [0, queries, 0, keys]

    def cost(self, parts: Parts) -> tuple[int, int]:
        calls = plan(parts).calls
        return sum(map(_pairs, calls)), len(calls)

    def refuses(self, inputs: AttentionInputs) -> str | None:
        if crowded(inputs.parts):
            return f"a row has more than {MOST_PARTS} parts, and each can take a call of its own"
        calls = plan(inputs.parts).calls
        if any(call.shape == CAUSAL and not call.square for call in calls):
            return "a causal part is not at the end of its own keys, and torch's causal is top-left"
        assert not any(call.shape == FULL and call.masked for call in calls)
        return None


def _pairs(call: Call) -> int:
    q, k = call.q_lengths, call.k_lengths
    return int((q * (q + 1) // 2 if call.square else q * k).sum())


KERNEL = CudnnKernel(
    "cudnn",
    devices=("cuda",),
    dtypes=HALF,
    head_sizes=(128, 8),
    refuses_bias="it takes no position bias here",
    limit=limit,
    tflops=(644.0, 541.0),  # causal, 8k, head size 128, H200; docs/kernels.md
    operators="cudnn|fmha|fort",
    forward_operators=("aten::_scaled_dot_product_cudnn_attention",),
    backends=sdpa.CUDNN,
)
