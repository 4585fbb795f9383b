"""Attention alone: mask types x kernels x lengths x head sizes, forward and backward.

TFLOP/s count the exact area of the parts (flops.py's convention: two products forward, five
backward); what a kernel computes beyond it is its own loss. Before a time is reported, output and
gradients of one row and one group of heads are held against the dense fp64 reference.

Legend: B rows, S tokens, H heads, Hkv key heads, D head size.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch.attention import KERNELS, Parts, attend, choose, reference
from megaarch.benchmark import masks
from megaarch.benchmark.timing import Clock, alternate

BACKWARD = 2.5  # of the forward's FLOPs: five products for two
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a norm


@dataclass(frozen=True)
class Shape:
    """One size of the benchmark. tokens: of all rows together."""

    tokens: int
    length: int
    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return max(1, self.tokens // self.length)


@dataclass
class Candidate:
    """A kernel on a mask, ready to run. leaves: q, k, v."""

    mask: str
    kernel: str
    chosen: str
    reason: str
    parts: Parts
    leaves: tuple[torch.Tensor, ...]
    grad: torch.Tensor

    def forward(self) -> torch.Tensor:
        return attend(*self.leaves, self.parts, kernel=self.kernel)

    def __call__(self, clock: Clock) -> None:
        clock.start()
        out = self.forward()
        clock.mark()
        torch.autograd.grad(out, self.leaves, self.grad)
        clock.mark()


def run(
    shapes: list[Shape],
    mask_names: list[str],
    kernels: list[str],
    device: torch.device,
    repetitions: int,
    seed: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record for each (shape, mask, kernel); a kernel that cannot run gives its reason."""
    found = []
    for shape in shapes:
        candidates = []
        for result in prepare(shape, mask_names, kernels, device, seed):
            if isinstance(result, Candidate):
                fault = _fault(result)
                if fault is None:
                    candidates.append(result)
                    continue
                result = _head(shape, result.mask, result.kernel) | {"wrong": fault}
            found.append(result)
            show(_line(result))
        times = alternate(candidates, device, repetitions)
        records = [_record(shape, c, t) for c, t in zip(candidates, times, strict=True)]
        _against_causal(records)
        for result in records:
            show(_line(result))
        found += records
    return found


def prepare(
    shape: Shape, mask_names: list[str], kernels: list[str], device: torch.device, seed: int
) -> Iterator[Candidate | dict[str, Any]]:
    """A candidate for each (mask, kernel), or the record of why there is none."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs: dict[int, tuple] = {}  # masks of equal shapes share their inputs

    def random(length: int, heads: int) -> torch.Tensor:
        size = (shape.rows, length, heads, shape.head_size)
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype)

    for mask in mask_names:
        parts = masks.draw(mask, shape.rows, shape.length, np.random.default_rng(seed))
        n = parts.queries
        if n not in inputs:
            q, k, v = random(n, shape.heads), *(random(shape.length, shape.key_heads) for _ in "kv")
            inputs[n] = tuple(x.requires_grad_() for x in (q, k, v)), random(n, shape.heads)
        leaves, grad = inputs[n]
        for kernel in kernels:
            try:
                chosen, reason = choose(kernel, *leaves[:2], parts)
            except ValueError as error:
                yield _head(shape, mask, kernel) | {"skipped": str(error)}
                continue
            yield Candidate(mask, kernel, chosen, reason, parts, leaves, grad)


def _fault(candidate: Candidate) -> str | None:
    """What `check` finds; a library that fails costs its own figures and no other's."""
    try:
        return check(candidate)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        return f"{candidate.chosen} failed with {type(error).__name__}: {reason}"


def check(candidate: Candidate) -> str | None:
    """What is wrong with output or gradients, or None: the first group of heads in the row of most
    parts, against the reference on the same inputs (rows and heads do not meet)."""
    parts, (q, k, v) = candidate.parts, candidate.leaves
    out = candidate.forward()
    found = (out, *torch.autograd.grad(out, candidate.leaves, candidate.grad))
    row = int(np.argmax((parts.table[:, :, 0] != 0).sum(1)))
    group = q.shape[2] // k.shape[2]
    heads = (slice(0, group), slice(0, 1), slice(0, 1))
    leaves = [
        x.detach()[row : row + 1, :, h].clone().requires_grad_()
        for x, h in zip((q, k, v), heads, strict=True)
    ]
    one = Parts(parts.table[row : row + 1], parts.queries, parts.keys)
    wide = [x.double() for x in leaves]
    expected_out = reference.attend(*wide, one, q.shape[-1] ** -0.5)
    grad = candidate.grad[row : row + 1, :, :group].double()
    expected = (expected_out, *torch.autograd.grad(expected_out, leaves, grad))
    for name, a, b, h in zip(
        ("output", "dq", "dk", "dv"), expected, found, (heads[0], *heads), strict=True
    ):
        b = b.detach()[row : row + 1, :, h].double()
        error = float((b - a.detach()).norm() / a.detach().norm().clamp(min=1e-30))
        if not error <= TOLERANCE[q.dtype]:
            return f"{name} differs from the reference by {error:.2g} of its norm"
    return None


class _Operators(TorchDispatchMode):
    """The names of torch's operators that ran, in the order in which they first did."""

    def __init__(self):
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] = None
        return function(*args, **(kwargs or {}))


def operators(run: Callable[[], Any], device: torch.device) -> list[str]:
    """What really ran: the GPU kernels that took longest, or a CPU's attention operators."""
    if device.type != "cuda":
        with _Operators() as ran:
            run()
        return [name for name in ran.names if "attention" in name] or list(ran.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key[:120] for event in events if event.self_device_time_total > 0][:6]


def _record(shape: Shape, candidate: Candidate, times: list) -> dict[str, Any]:
    parts = candidate.parts
    flops = 4 * shape.heads * shape.head_size * parts.area()
    forward, backward = times
    clock = Clock(candidate.grad.device)
    ran = operators(lambda: candidate(clock), candidate.grad.device)
    found = _head(shape, candidate.mask, candidate.kernel) | {
        "ran": candidate.chosen,
        "why": candidate.reason,
        "operators": ran,
        "area": parts.area(),
        "dense_share": round(parts.area() / (len(parts) * parts.queries * parts.keys), 4),
        "forward": forward.record() | {"tflops": flops / forward.median / 1e12},
        "backward": backward.record() | {"tflops": BACKWARD * flops / backward.median / 1e12},
    }
    expected = getattr(KERNELS[candidate.chosen], "operators", None)
    if expected and not any(re.search(expected, name, re.IGNORECASE) for name in ran):
        return _head(shape, candidate.mask, candidate.kernel) | {
            "wrong": f"{candidate.chosen} was asked for and {', '.join(ran)} ran"
        }
    return found


def _against_causal(records: list[dict[str, Any]]) -> None:
    """Adds each mask's TFLOP/s over those of the same kernel's causal mask in this run."""
    causal = {r["kernel"]: r for r in records if r["mask"] == "causal" and "forward" in r}
    for r in records:
        base = causal.get(r["kernel"])
        for stage in ("forward", "backward"):
            if base and stage in r:
                r[stage]["to_causal"] = round(r[stage]["tflops"] / base[stage]["tflops"], 4)


def _head(shape: Shape, mask: str, kernel: str) -> dict[str, Any]:
    return {
        "mask": mask,
        "kernel": kernel,
        "rows": shape.rows,
        "length": shape.length,
        "heads": shape.heads,
        "key_heads": shape.key_heads,
        "head_size": shape.head_size,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }


def _line(r: dict[str, Any]) -> str:
    head = f"{r['mask']:<15}{r['kernel']:<15}{r['length']:>6}{r['head_size']:>5} {r['dtype']:<9}"
    for word in ("skipped", "wrong"):
        if word in r:
            return f"{head}{word}: {r[word]}"
    figures = (
        f"{r[stage]['median_ms']:>10.3f} ms {r[stage]['tflops']:>8.3f} TFLOP/s"
        for stage in ("forward", "backward")
    )
    return head + "".join(figures) + f"  {r['ran']}"
