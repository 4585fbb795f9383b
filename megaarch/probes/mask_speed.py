"""How fast attention runs under each mask, against causal attention, here and in other tools at hand.

TFLOP/s over the exact area of a mask, forward and backward, as the ratio to causal attention's in the same
implementation, timed in turn. An implementation that computes what a mask hides is as much slower as that is.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from megaarch.attention import Parts, attend, choose
from megaarch.attention.dispatch import KERNELS
from megaarch.attention.kernel_interface import AttentionInputs
from megaarch.attention.mask import causal, full
from megaarch.evaluation.record_schema import Machine, Record
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows
from megaarch.study.environment import machine

ROWS, HEADS, HEAD_SIZE = 2, 4, 64
LENGTH = 1024  # tokens of a row, where no other is asked for
WARM_UP, REPETITIONS = 2, 9
# kernels of the catalogue that are another tool's as they stand
OTHER_TOOLS = {"flex": "FlexAttention"}

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[Tensors, Parts], torch.Tensor]


class Throughput(Record):
    """of_kernels: implementation -> mask -> its TFLOP/s over causal's. ours: which implementations are
    of this package; the rest are other tools' ways to state a mask."""

    length: int
    device: str
    environment: Machine
    ours: list[str]
    of_kernels: dict[str, dict[str, Estimate]]

    def least(self, ours: bool) -> dict[str, float]:
        """Returns the slowest mask's ratio of each implementation, of ours or of the others."""
        return {
            name: min(e.value for e in found.values() if e.value is not None)
            for name, found in self.of_kernels.items()
            if (name in self.ours) == ours
        }


def masks(n: int) -> dict[str, Parts]:
    """Returns the masks that are compared, of ROWS rows of n tokens."""

    def prefix(p: int) -> list[tuple[int, ...]]:
        return [full(0, p, 0, p), causal(p, n, 0, n)]

    rows = {
        "causal": [causal(0, n, 0, n)],
        "prefix of a quarter": prefix(n // 4),
        "prefix of a half": prefix(n // 2),
        "prefix of three quarters": prefix(n * 3 // 4),
        "bidirectional": [full(0, n, 0, n)],
    }
    return {name: Parts.of([row] * ROWS, n, n) for name, row in rows.items()}


def measure(options: Options) -> Throughput:
    """Times each implementation that runs here: bf16 on a GPU, fp32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = options.length or LENGTH
    generator = torch.Generator().manual_seed(options.seed)
    shape = (ROWS, length, HEADS, HEAD_SIZE)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in "qkv"
    )
    made = masks(length)
    kernel, _ = choose("auto", q, k, made["prefix of a half"])
    ours = f"megaarch ({kernel})"
    runs: dict[str, Attention] = {ours: lambda qkv, p: attend(*qkv, p)}
    inputs = AttentionInputs(q, k, v, made["prefix of a half"], HEAD_SIZE**-0.5)
    for other, title in OTHER_TOOLS.items():
        if KERNELS[other].cannot_run(inputs) is None:
            runs[title] = lambda qkv, p, other=other: attend(*qkv, p, kernel=other)
    runs["dense mask"] = dense
    return Throughput(
        length=length,
        device=device.type,
        environment=machine(),
        ours=[ours],
        of_kernels={name: _ratios(run, (q, k, v), made) for name, run in runs.items()},
    )


def dense(qkv: Tensors, parts: Parts) -> torch.Tensor:
    """Returns attention as most libraries state it: torch's causal flag, no mask, or a mask of booleans."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    if parts.area() == len(parts) * parts.queries * parts.keys:
        return F.scaled_dot_product_attention(q, k, v)
    if parts.row(0) == [causal(0, parts.queries, 0, parts.keys)]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def build(of: Parts) -> torch.Tensor:
        return torch.from_numpy(of.dense())[:, None].to(q.device)

    return F.scaled_dot_product_attention(q, k, v, attn_mask=parts.plan("dense mask", build))


def _ratios(run: Attention, tensors: Tensors, made: dict[str, Parts]) -> dict[str, Estimate]:
    """Returns each mask's throughput over causal's, timed in turn."""
    rates = {name: [] for name in made}
    for repetition in range(WARM_UP + REPETITIONS):
        for name, parts in made.items():
            seconds = _seconds(run, tensors, parts)
            if repetition >= WARM_UP:
                rates[name].append(parts.area() / seconds)
    turns = np.arange(REPETITIONS)
    return {
        name: over_rows(np.divide(found, rates["causal"]), turns)
        for name, found in rates.items()
        if name != "causal"
    }


def _seconds(run: Attention, tensors: Tensors, parts: Parts) -> float:
    def wait() -> None:
        if tensors[0].device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    torch.autograd.grad(run(tensors, parts).sum(), tensors)
    wait()
    return time.perf_counter() - start
