"""The table of kernels, and which of them `attend` runs, and why.

To add one: a file beside this one with a `Kernel` (kernel_interface.py), or with a `VarlenKernel` (varlen.py) or
an `IntervalKernel` (key_intervals.py) of a library of that kind, and its entry in the catalogue; docs/kernels.md
says what it must promise. A kernel of another package registers itself there (config/registry.py).
"""

import torch

from megaarch.attention.bias import RelativeBias
from megaarch.attention.kernel_interface import AttentionInputs, Kernel
from megaarch.attention.mask import Parts
from megaarch.config.catalogue import KERNELS
from megaarch.errors import UserError

# What `auto` compares on CUDA. They take half precision and no bias.
RANKED = ("cudnn", "flash3", "flash2", "torch_varlen")
FALLBACK = "sdpa"  # runs everything
UNSTEADY = "it builds a plan for each shape of a call, and these change from batch to batch"
CALL_PAIRS = 1 << 20  # what one more call costs, in (query, key) pairs
BACKWARD = 2.5  # of the forward's FLOPs


def run(inputs: AttentionInputs, kernel: str) -> torch.Tensor:
    """Returns what `attend` does, by the kernel of this name or the one that "auto" is here."""
    check(inputs)
    name, _ = choose_for(kernel, inputs)
    return KERNELS[name].attend(inputs)


def choose(
    kernel: str, q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None = None
) -> tuple[str, str]:
    """Returns the name of the kernel that `attend` runs for these arguments, and why."""
    return choose_for(kernel, AttentionInputs(q, k, k, parts, bias=bias))


def choose_for(kernel: str, inputs: AttentionInputs) -> tuple[str, str]:
    """Returns the kernel for these inputs, and the reason where another was passed over, as `choose`."""
    if kernel != "auto":
        if kernel not in KERNELS:
            known = ", ".join(("auto", *KERNELS))
            raise UserError(f"attention kernel {kernel!r} is unknown: choose one of {known}")
        if reason := KERNELS[kernel].cannot_run(inputs):
            runs = [name for name, other in KERNELS.items() if not other.cannot_run(inputs)]
            raise UserError(
                f"model.attention: {kernel} cannot run here: {reason}; what can is auto, "
                f"{', '.join(runs)}"
            )
        return kernel, "asked for"
    on_cuda = inputs.device.type == "cuda"
    ranked = ranking(inputs.parts, inputs.device.type)
    left_out = RANKED if on_cuda else ()
    reasons = [f"{name}: {UNSTEADY}" for name in left_out if name not in ranked]
    for name in (*ranked, FALLBACK):
        if reason := KERNELS[name].cannot_run(inputs):
            reasons.append(f"{name}: {reason}")
            continue
        speeds = "published" if on_cuda else "measured"
        return name, "; ".join((*reasons, f"the fastest that runs, by {speeds} speeds"))
    raise AssertionError(f"{FALLBACK} runs everything")


def ranking(parts: Parts, device_type: str) -> tuple[str, ...]:
    """Returns the kernels that `auto` tries before the fallback, the least estimated time first.

    On CUDA the estimate is what a kernel computes over its published speed (docs/kernels.md), of
    those whose plans, where their library builds any, serve every batch.
    """
    if device_type != "cuda":
        return ("cpu",) if device_type == "cpu" else ()

    def rank(parts: Parts) -> tuple[str, ...]:
        steady = [name for name in RANKED if KERNELS[name].steady(parts)]
        return tuple(sorted(steady, key=lambda name: estimate(KERNELS[name], parts)))

    return parts.plan("ranking", rank)


def estimate(kernel: Kernel, parts: Parts) -> float:
    """Returns the time of forward and backward, in units that compare kernels on the same parts."""
    assert kernel.tflops, f"{kernel.name} is ranked and has no speed"
    forward, backward = kernel.tflops
    pairs, calls = kernel.cost(parts)
    return (pairs + calls * CALL_PAIRS) * (1 / forward + BACKWARD / backward)


def warm(
    parts: Parts,
    device_type: str = "cpu",
    kernel: str = "auto",
    fused_rows: bool = False,
    *,
    half: bool = True,
    bias: bool = False,
) -> Parts:
    """Plans, before the step, what a kernel needs to run these parts; returns the same parts. half,
    bias: whether `attend` will be called in half precision, and with a bias.

    For a loader's worker: the plan is remembered on the parts and pickled with them.
    """
    names = (kernel,)
    if kernel == "auto":
        ranked = ranking(parts, device_type)
        falls_back = device_type == "cuda" and (bias or not half)
        names = (FALLBACK,) if falls_back or not ranked else ranked
    for name in names:
        KERNELS[name].warm(parts, fused_rows)
    return parts


def check(inputs: AttentionInputs) -> None:
    """Raises a ValueError that names the first argument that does not fit the others."""
    q, k, v, parts, bias = inputs.q, inputs.k, inputs.v, inputs.parts, inputs.bias
    rows, queries, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (rows, size):
        raise ValueError(
            f"attend: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be "
            "[B, Sq, H, D], [B, Sk, Hkv, D] and [B, Sk, Hkv, D]"
        )
    if heads % key_heads:
        raise ValueError(f"attend: {key_heads} key heads do not divide {heads} query heads")
    if (len(parts), parts.queries, parts.keys) != (rows, queries, keys):
        raise ValueError(
            f"attend: parts are for {len(parts)} rows of {parts.queries} queries and "
            f"{parts.keys} keys, but the tensors have {rows}, {queries} and {keys}"
        )
    if bias is None:
        return
    if bias.heads != heads:
        raise ValueError(f"attend: a bias of {bias.heads} heads for {heads} query heads")
    for name, positions, length in (
        ("query_positions", inputs.query_positions, queries),
        ("key_positions", inputs.key_positions, keys),
    ):
        if positions is None or positions.shape[:2] != (rows, length):
            given = None if positions is None else list(positions.shape)
            raise ValueError(f"attend: a bias needs {name} [{rows}, {length}, A], not {given}")
