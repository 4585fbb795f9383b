"""Attention alone: mask types x kernels x lengths x head sizes, forward and backward.

Masks of drawn lengths draw new ones in each repetition, as training does, the same for all kernels;
each batch then runs once more. So what a kernel does for a batch that it has not seen (a plan for
each exact shape, indices that travel to the device) is the difference of the two.

TFLOP/s count the exact area of the parts of the batch that was run (flops.py's convention: two
products forward, five backward); what a kernel computes beyond it is its own loss. Before it is timed,
a kernel's output and gradients are held against the reference (correctness.py).

Legend: B rows, S tokens, H heads, Hkv key heads, D head size.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megaarch.attention import Parts, attend, choose, warm
from tools.throughput import correctness, masks
from tools.throughput.isolate import OUT_OF_TIME, DeviceLost, expired, explain
from tools.throughput.record import Event
from tools.throughput.timing import Clock, quartiles

BACKWARD = 2.5  # of the forward's FLOPs: five products for two
WARM_UP = 2  # rounds that are not timed
STAGES = ("forward", "backward")
CRASHES = 2  # after so many a kernel is left alone


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
class Run:
    """One batch through one kernel. seconds: forward and backward; `again`, of the same batch once
    more, are none where the mask is the same in each batch."""

    ran: str
    area: int
    seconds: list[float]
    again: list[float]


Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Candidate:
    """A kernel on a mask. leaves: q, k, v. fault: why it is out. unfit: batches that it refused."""

    mask: str
    kernel: str
    shape: Shape
    leaves: Leaves
    grad: torch.Tensor
    seed: int
    why: str = ""
    operators: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    unfit: Counter[str] = field(default_factory=Counter)
    fault: dict[str, str] | None = None

    @property
    def head(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "mask": self.mask,
            "kernel": self.kernel,
            "rows": shape.rows,
            "length": shape.length,
            "heads": shape.heads,
            "key_heads": shape.key_heads,
            "head_size": shape.head_size,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "new_lengths_each_repetition": self.drawn,
        }

    @property
    def drawn(self) -> bool:
        return self.mask in masks.DRAWN

    def batch(self, number: int) -> Parts:
        """Parts that no kernel has seen, with what a loader's worker plans ahead."""
        shape = self.shape
        parts = masks.batch(self.mask, shape.rows, shape.length, self.seed, number)
        return warm(parts, self.grad.device.type, self.kernel)

    def run(self, parts: Parts, clock: Clock) -> tuple[torch.Tensor, ...]:
        """Output and gradients; the clock's intervals are forward and backward."""
        clock.start()
        q, k, v = self.leaves
        out = attend(q, k, v, parts, kernel=self.kernel)
        clock.mark()
        gradients = torch.autograd.grad(out, self.leaves, self.grad)
        clock.mark()
        return out, *gradients


def run(
    shapes: list[Shape],
    mask_names: list[str],
    kernels: list[str],
    device: torch.device,
    repetitions: int,
    seed: int,
    lost: Mapping[tuple, str],
    deadline: float | None,
) -> Iterator[Event]:
    """One result for each (shape, mask, kernel); a kernel that cannot run gives its reason. After
    each round the results are those up to there."""
    clock = Clock(device)
    # `auto` takes the times of the kernel that it chooses, where that is timed as well
    kernels = sorted(kernels, key=lambda name: name == "auto")
    for shape in shapes:
        candidates = []
        for candidate in prepare(shape, mask_names, kernels, device, seed):
            yield Event(candidate.head)
            candidate.fault = _admit(candidate, repetitions, lost, deadline)
            if candidate.fault:
                yield Event(candidate.head, candidate.fault)
            else:
                candidates.append(candidate)
        for number in range(WARM_UP + repetitions):
            if expired(deadline) and number > WARM_UP:
                break
            yield from _round(candidates, number, clock)
            if number >= WARM_UP:
                yield from _results(candidates)


def prepare(
    shape: Shape, mask_names: list[str], kernels: list[str], device: torch.device, seed: int
) -> Iterator[Candidate]:
    """A candidate for each (mask, kernel)."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs: dict[int, tuple[Leaves, torch.Tensor]] = {}  # masks of equal shapes share them

    def random(length: int, heads: int) -> torch.Tensor:
        size = (shape.rows, length, heads, shape.head_size)
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype)

    for mask in mask_names:
        n = masks.batch(mask, shape.rows, shape.length, seed, 0).queries
        if n not in inputs:
            q = random(n, shape.heads).requires_grad_()
            k, v = (random(shape.length, shape.key_heads).requires_grad_() for _ in "kv")
            inputs[n] = (q, k, v), random(n, shape.heads)
        for kernel in kernels:
            leaves, grad = inputs[n]
            yield Candidate(mask, kernel, shape, leaves, grad, seed)


def _admit(
    candidate: Candidate, repetitions: int, lost: Mapping[tuple, str], deadline: float | None
) -> dict[str, str] | None:
    """Why a candidate is not timed, or None: it has run the first batch that it takes, rightly."""
    if reason := lost.get(Event(candidate.head).key):
        return {"wrong": reason}
    crashes = [mask for mask, kernel, *_ in lost if kernel == candidate.kernel]
    if len(crashes) >= CRASHES:
        return {"wrong": f"left out, as its process was lost with {' and '.join(crashes)}"}
    if expired(deadline):
        return {"unfinished": OUT_OF_TIME}
    reasons = []
    for number in range((WARM_UP + repetitions) if candidate.drawn else 1):
        try:
            parts = candidate.batch(number)
            q, k, _ = candidate.leaves
            chosen, candidate.why = choose(candidate.kernel, q, k, parts)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return _check(candidate, chosen, parts)
    return {"skipped": reasons[0]}


def _check(candidate: Candidate, chosen: str, parts: Parts) -> dict[str, str] | None:
    clock = Clock(candidate.grad.device, flush=False)
    try:
        found = candidate.run(parts, clock)
        wrong = correctness.fault(found, candidate.leaves, candidate.grad, parts)
        if wrong is None:
            ran = correctness.operators(lambda: candidate.run(parts, clock), candidate.grad.device)
            candidate.operators = ran
            wrong = correctness.impostor(chosen, ran)
    except DeviceLost:
        raise
    except Exception as error:  # a library that fails costs its own figures and no other's
        wrong = f"{chosen} failed with {explain(error)}"
    return None if wrong is None else {"wrong": wrong}


def _round(candidates: list[Candidate], number: int, clock: Clock) -> Iterator[Event]:
    """Batch `number` through each candidate."""
    done: dict[tuple, Run] = {}
    for candidate in candidates:
        if candidate.fault:
            continue
        yield Event(candidate.head)
        try:
            parts = candidate.batch(number)
            q, k, _ = candidate.leaves
            chosen, why = choose(candidate.kernel, q, k, parts)
        except ValueError as error:
            candidate.unfit[str(error)] += 1
            continue
        found = done.get((candidate.mask, chosen))
        if found is None:
            try:
                found = _once(candidate, chosen, parts, clock)
            except DeviceLost:
                raise
            except Exception as error:
                candidate.fault = {"wrong": f"{chosen} failed with {explain(error)}"}
                yield Event(candidate.head, candidate.fault)
                continue
        done[candidate.mask, chosen] = found
        if number >= WARM_UP:
            candidate.why = why
            candidate.runs.append(found)


def _once(candidate: Candidate, chosen: str, parts: Parts, clock: Clock) -> Run:
    for name, x in zip(("output", "dq", "dk", "dv"), candidate.run(parts, clock), strict=True):
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"{name} is not finite at {parts.row(0)[:2]}")
    seconds, again = clock.intervals(), []
    if candidate.drawn:
        candidate.run(parts, clock)
        again = clock.intervals()
    return Run(chosen, parts.area(), seconds, again)


def _results(candidates: list[Candidate]) -> Iterator[Event]:
    found = [Event(c.head, _record(c)) for c in candidates if not c.fault]
    _against_causal(found)
    yield from found


def _record(candidate: Candidate) -> dict[str, Any]:
    runs = candidate.runs
    refused = {"refused": dict(candidate.unfit)} if candidate.unfit else {}
    if not runs:
        return {"skipped": next(iter(candidate.unfit), OUT_OF_TIME)}
    area = float(np.mean([r.area for r in runs]))
    shape, leaves = candidate.shape, candidate.leaves
    pairs = shape.rows * leaves[0].shape[1] * leaves[1].shape[1]
    found = {
        "ran": dict(Counter(r.ran for r in runs)),
        "why": candidate.why,
        "operators": candidate.operators,
        "area": area,
        "dense_share": round(area / pairs, 4),
        **_rates(shape, runs, [r.seconds for r in runs]),
        **refused,
    }
    if candidate.drawn:
        found["warm"] = _rates(shape, runs, [r.again for r in runs])
        extra = [1e3 * (sum(r.seconds) - sum(r.again)) for r in runs]
        found["new_shape_ms"] = round(float(np.median(extra)), 6)
    return found


def _rates(shape: Shape, runs: list[Run], seconds: list[list[float]]) -> dict[str, Any]:
    """By stage: quartiles of time, and of the rate by the area of each batch."""
    found = {}
    for index, (stage, factor) in enumerate(zip(STAGES, (1.0, BACKWARD), strict=True)):
        taken = [s[index] for s in seconds]
        each = [
            factor * 4 * shape.heads * shape.head_size * r.area / t / 1e12
            for r, t in zip(runs, taken, strict=True)
        ]
        low, middle, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
        rates = {"tflops": middle, "tflops_lower_quartile": low, "tflops_upper_quartile": high}
        found[stage] = quartiles(taken) | rates
    return found


def _against_causal(events: list[Event]) -> None:
    """Adds each mask's TFLOP/s over those of the same kernel's causal mask in this run."""
    found = [(event.head, event.result or {}) for event in events]
    causal = {head["kernel"]: result for head, result in found if head["mask"] == "causal"}
    for head, result in found:
        base = causal.get(head["kernel"], {})
        for figures in (result, result.get("warm", {})):
            for stage in STAGES:
                if stage in base and stage in figures:
                    rate = figures[stage]["tflops"] / base[stage]["tflops"]
                    figures[stage]["to_causal"] = round(rate, 4)


def line(r: dict[str, Any]) -> str:
    """A result for people: milliseconds and TFLOP/s of batches that are new, and of one again."""
    head = f"{r['mask']:<15}{r['kernel']:<15}{r['length']:>6}{r['head_size']:>5} {r['dtype']:<9}"
    for word in ("skipped", "wrong", "unfinished"):
        if word in r:
            return f"{head}{word}: {r[word]}"
    text = head + "".join(_figures(r[stage]) for stage in STAGES)
    if "warm" in r:
        rates = " / ".join(f"{r['warm'][stage]['tflops']:.3f}" for stage in STAGES)
        text += f"  again {rates}, a new shape {r['new_shape_ms']:.3f} ms"
    return text + "  " + ", ".join(r["ran"])


def _figures(stage: dict[str, float]) -> str:
    return f"{stage['median_ms']:>10.3f} ms {stage['tflops']:>8.3f} TFLOP/s"
