"""The kernels behind `attend` by name, which of them runs, and why.

A kernel is a module, or an object, with these functions:
    cannot_run(q, k, parts, bias) -> str | None   a reason not to use it here, or None: every limit
                                                  that its library documents (gpu.py)
    attend(q, k, v, parts, scale, bias, query_positions, key_positions) -> out
    warm(parts, device_type)                      plans ahead, on the host
    cost(parts) -> (pairs, calls)                 what it computes; for `auto` on an accelerator
and `tflops`, its published speed, or None. `steady(parts)`, where its library builds a plan for each
exact shape of a call: whether these parts' shapes are the same in every batch. `operators`, where it
has it, matches the names of its GPU kernels; `forward_operators` are the torch operators that compute
its results, which selective recomputation keeps (parallel/recompute.py). A library that registers no
operator has none. Each is tested against `reference` on the same cases, output and all gradients.
"""

from dataclasses import replace
from typing import Any

import torch

from megaarch.attention import varlen
from megaarch.attention.bias import RelativeBias
from megaarch.attention.parts import Parts
from megaarch.config.catalogue import KERNELS
from megaarch.errors import UserError

# What `auto` compares on CUDA. They take half precision and no bias.
RANKED = ("cudnn", "flash3", "flash2", "torch_varlen")
FALLBACK = "sdpa"  # runs everything
UNSTEADY = "it builds a plan for each shape of a call, and these change from batch to batch"
CALL_PAIRS = 1 << 20  # what one more call costs, in (query, key) pairs
BACKWARD = 2.5  # of the forward's FLOPs


def choose(
    kernel: str, q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None = None
) -> tuple[str, str]:
    """The kernel that `attend` runs for these arguments, and why: (name, reason)."""
    if kernel != "auto":
        if kernel not in KERNELS:
            known = ", ".join(("auto", *KERNELS))
            raise UserError(f"attention kernel {kernel!r} is unknown: choose one of {known}")
        obstacle = KERNELS[kernel].cannot_run(q, k, parts, bias)
        if obstacle:
            runs = [n for n, other in KERNELS.items() if not other.cannot_run(q, k, parts, bias)]
            raise UserError(
                f"model.attention: {kernel} cannot run here: {obstacle}; what can is auto, "
                f"{', '.join(runs)}"
            )
        return kernel, "asked for"
    ranked = ranking(parts, q.device.type)
    left_out = RANKED if q.device.type == "cuda" else ()
    obstacles = [f"{name}: {UNSTEADY}" for name in left_out if name not in ranked]
    for name in (*ranked, FALLBACK):
        obstacle = KERNELS[name].cannot_run(q, k, parts, bias)
        if not obstacle:
            speeds = "published" if q.device.type == "cuda" else "measured"
            return name, "; ".join((*obstacles, f"the fastest that runs, by {speeds} speeds"))
        obstacles.append(f"{name}: {obstacle}")
    raise AssertionError(f"{FALLBACK} runs everything")


def ranking(parts: Parts, device_type: str) -> tuple[str, ...]:
    """The kernels that `auto` tries ahead of the fallback, the least estimated time first.

    On CUDA the estimate is what a kernel computes over its published speed (docs/kernels.md), of
    those whose plans, where their library builds any, serve every batch.
    """
    if device_type != "cuda":
        return ("cpu",) if device_type == "cpu" else ()

    def rank(parts: Parts) -> tuple[str, ...]:
        steady = [name for name in RANKED if is_steady(KERNELS[name], parts)]
        return tuple(sorted(steady, key=lambda name: estimate(KERNELS[name], parts)))

    return parts.plan("ranking", rank)


def is_steady(kernel: Any, parts: Parts) -> bool:
    """Whether running these parts leaves no new plan to build in later batches."""
    return not hasattr(kernel, "steady") or kernel.steady(parts)


def estimate(kernel, parts: Parts) -> float:
    """Time of forward and backward, in units that compare kernels on the same parts."""
    forward, backward = kernel.tflops
    pairs, calls = kernel.cost(parts)
    return (pairs + calls * CALL_PAIRS) * (1 / forward + BACKWARD / backward)


def find(name: str, fused_rows: bool = False) -> Any:
    """The kernel of this name. fused_rows: rows move by attention/fused_rows.py, where it gathers any."""
    kernel = KERNELS[name]
    if fused_rows and isinstance(kernel, varlen.Kernel):
        return replace(kernel, fused_rows=True)
    return kernel


def warm(
    parts: Parts,
    device_type: str = "cpu",
    kernel: str = "auto",
    fused_rows: bool = False,
    *,
    half: bool = True,
    bias: bool = False,
) -> Parts:
    """Builds ahead what a kernel plans from these parts; returns the same parts. half, bias: whether
    `attend` will be called in half precision, and with a bias.

    For a loader's worker: the plan is remembered on the parts and pickled with them.
    """
    names = (kernel,)
    if kernel == "auto":
        ranked = ranking(parts, device_type)
        falls_back = device_type == "cuda" and (bias or not half)
        names = (FALLBACK,) if falls_back or not ranked else ranked
    for name in names:
        find(name, fused_rows).warm(parts, device_type)
    return parts
