"""FlashAttention: 2 (Dao 2023; Ampere and later), 3 (Shah et al. 2024, built from flash-attention's
`hopper` folder; Hopper only) and 4 (CuTe, compiled at first use; Hopper and later); and torch's own
variable-length attention, which is 2 as torch ships it, or the version that
`torch.nn.attention.activate_flash_attention_impl` has put in its place."""

import inspect
from functools import cache

import torch

from megaarch.attention.mask import Parts
from megaarch.attention.packages import Gpu, Package
from megaarch.attention.varlen import VarlenCall, VarlenKernel

FUNCTION = "flash_attn_varlen_func"
# packed causal rows, 8k, head size 128, H100; docs/kernels.md
TFLOPS_2 = (335.0, 335.0)  # forward and backward together (Dao 2023, section 4.1)
TFLOPS_3 = (486.0, 321.0)
WINDOWS = {False: (-1, -1), True: (-1, 0)}  # of torch, by causal: at the bottom right
SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # capabilities with less shared memory


def run_flash(flash_attn_varlen_func, q, k, v, call: VarlenCall, scale: float) -> torch.Tensor:
    """Calls it as flash-attn 2.6 and later, flash-attention's `hopper` and flash-attn-4 4.0.0b36 want.
    The last, and early builds of 3, return the log-sum-exp as well."""
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=call.q.starts,
        cu_seqlens_k=call.k.starts,
        max_seqlen_q=call.q.longest,
        max_seqlen_k=call.k.longest,
        softmax_scale=scale,
        causal=call.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out


def run_torch(varlen_attn, q, k, v, call: VarlenCall, scale: float) -> torch.Tensor:
    """Calls it as torch 2.11 wants. Its operators take key heads in groups in every version; newer ones
    need `enable_gqa` for that. They follow torch.use_deterministic_algorithms by themselves."""
    grouped = q.shape[1] != k.shape[1] and _has_enable_gqa(varlen_attn)
    options = {"scale": scale, "window_size": WINDOWS[call.causal]}
    options |= {"enable_gqa": True} if grouped else {}
    q_rows, k_rows = call.q, call.k
    lengths = (q_rows.starts, k_rows.starts, q_rows.longest, k_rows.longest)
    return varlen_attn(q, k, v, *lengths, **options)


@cache
def _has_enable_gqa(varlen_attn) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def limit_2(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """FlashAttention-2's, and its copy's in torch (sdp_utils.cpp of torch 2.11 to 2.13)."""
    if 192 < head_size <= 224 and gpu.capability in SMALL:
        capability = "{}.{}".format(*gpu.capability)
        return f"its backward at compute capability {capability} takes no head size of 193 to 224"
    return None


def limit_3(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Its deterministic backward is tested up to head size 192 (flash-attention, pull request 1893;
    builds of 2025 before that ignore the wish)."""
    if gpu.deterministic and head_size > 192:
        return f"its deterministic backward takes head sizes up to 192, not {head_size}"
    return None


def limit_4(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The limit of flash-attn-4 4.0.0b36 (its interface.py)."""
    if gpu.deterministic and gpu.capability[0] == 12:
        return "it has no deterministic backward at compute capability 12.x"
    return None


FLASH2 = VarlenKernel(
    "flash2",
    run=run_flash,
    package=Package(
        "flash-attn",
        "pip install flash-attn --no-build-isolation builds it with nvcc",
        "flash_attn",
        FUNCTION,
    ),
    limit=limit_2,
    tflops=TFLOPS_2,
    operators="flash",
    forward_operators=("flash_attn::_flash_attn_varlen_forward",),
)
TORCH_VARLEN = VarlenKernel(
    "torch_varlen",
    run=run_torch,
    package=Package(
        "torch.nn.attention.varlen",
        "it comes with torch 2.11 and later",
        "torch.nn.attention.varlen",
        "varlen_attn",
    ),
    limit=limit_2,
    tflops=TFLOPS_2,
    operators="flash",
    forward_operators=("torch_attn::_varlen_attn",),
)
FLASH3 = VarlenKernel(
    "flash3",
    run=run_flash,
    package=Package(
        "FlashAttention-3",
        "build it from github.com/Dao-AILab/flash-attention, folder hopper",
        "flash_attn_interface",
        FUNCTION,
        capability=(9, 0),
        last=9,
    ),
    limit=limit_3,
    tflops=TFLOPS_3,
    operators="flash|hopper",
    # the second of builds whose Python calls the C++ operator itself
    forward_operators=("flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd"),
)
FLASH4 = VarlenKernel(
    "flash4",
    run=run_flash,
    package=Package(
        "flash-attn-4",
        "pip install --pre flash-attn-4",
        "flash_attn.cute",
        FUNCTION,
        capability=(9, 0),
        last=12,
    ),
    head_sizes=(128, 8),
    limit=limit_4,
    operators="flash",
)
