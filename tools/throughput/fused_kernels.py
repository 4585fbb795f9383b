"""The fused kernels of csrc/ against torch and torch.compile: forward and backward, in GB/s.

Bytes are those that the operation has to move, read once and written once, whatever a candidate
really moves; so GB/s compare candidates, and ours with the memory's own rate. Each is compared with
the same operation in fp64 before it is timed; what is wrong gets no time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megaarch.attention import varlen
from megaarch.errors import UserError
from megaarch.kernels import bindings
from megaarch.kernels.rms_norm import rms_norm
from megaarch.model.loss import Chunk, fused_slope, torch_slope
from tools.throughput import masks
from tools.throughput.isolate import OUT_OF_TIME, expired, explain
from tools.throughput.record import Event
from tools.throughput.timing import Clock, Times, alternate

EPSILON = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a norm
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """forward(*inputs) -> outputs, backward(outputs) -> gradients, by candidate; what they must
    give, in fp64; bytes of each direction, 0 where nothing runs."""

    name: str
    candidates: Mapping[str, tuple[Callable[[], Tensors], Callable[[Tensors], Tensors]]]
    wanted: Tensors
    nbytes: tuple[int, int]


def norm(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """RMSNorm of [rows, width]."""
    x, grad = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(width, device=device, dtype=dtype)
    leaves = [y.requires_grad_() for y in (x, weight)]

    def plain(x, weight):
        return F.rms_norm(x, (width,), weight, EPSILON)

    def pair(function):
        return (lambda: (function(*leaves),), lambda out: torch.autograd.grad(out, leaves, grad))

    wide = [y.detach().double().requires_grad_() for y in leaves]
    out = plain(*wide)
    wanted = (out, *torch.autograd.grad(out, wide, grad.double()))
    functions = {
        "torch": plain,
        "compile": torch.compile(plain),
        "fused": lambda x, weight: rms_norm(x, weight, EPSILON),
    }
    candidates = {name: pair(function) for name, function in functions.items()}
    return Problem("rms_norm", candidates, wanted, (2 * x.nbytes, 3 * x.nbytes))


def chunk(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The cross-entropy of a chunk of logits [rows, columns]: its losses, and the slope that the
    backward pass multiplies. Logits are read and the slope is written in the forward pass."""
    logits = torch.randn(rows, columns, device=device, dtype=dtype)
    target = torch.randint(0, columns, (rows,), device=device)

    def pair(slope, logits=logits):
        return lambda: slope(Chunk(logits, None, target, None, columns)), lambda out: ()

    candidates = {
        "torch": pair(torch_slope),
        "compile": pair(torch.compile(torch_slope)),
        "fused": pair(fused_slope),
    }
    forward, _ = pair(torch_slope, logits.double())
    return Problem("cross_entropy", candidates, forward(), (2 * logits.nbytes, 0))


def gathered(
    mask: str, tokens: int, length: int, width: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """The keys of a variable-length kernel: into its calls, and their gradients added up."""
    parts = masks.draw(mask, max(1, tokens // length), length, np.random.default_rng(0))
    x = torch.randn(len(parts), length, width // 64, 64, device=device, dtype=dtype)
    x = x.requires_grad_()
    calls = [call.k for call in varlen.plan(parts).calls]
    grads = [
        torch.randn((1, keys.total, *x.shape[2:]), device=device, dtype=dtype) for keys in calls
    ]

    def pair(fused: bool, x=x, grads=grads):
        rows = varlen.on_device(parts, device, fused)

        def backward(out):
            shaped = [g.view(o.shape) for g, o in zip(grads, out, strict=True)]
            return torch.autograd.grad(out, x, shaped)

        return lambda: rows.gather(x, "k"), backward

    forward, backward = pair(
        False, x.detach().double().requires_grad_(), [g.double() for g in grads]
    )
    out = forward()
    wanted = (*out, *backward(out))
    row = width * x.itemsize
    moved = sum(2 * keys.total for keys in calls if not keys.whole)
    read = sum(keys.total for keys in calls)
    both = (moved * row, (read + len(parts) * length) * row)
    return Problem(f"rows, {mask}", {"torch": pair(False), "fused": pair(True)}, wanted, both)


def run(
    makers: Mapping[str, Callable[[], Problem]],
    dtype: torch.dtype,
    device: torch.device,
    repetitions: int,
    lost: Mapping[tuple, str],
    deadline: float | None,
) -> Iterator[Event]:
    """One result for each (problem, candidate). ValueError where the kernels are not built."""
    if reason := bindings.obstacle(device.type):
        raise UserError(reason)
    for name, make in makers.items():
        whole = Event({"label": f"{name}, inputs", "problem": name, "candidate": "inputs"})
        yield whole
        if left_out := _left_out(whole, lost, deadline):
            yield whole._replace(result=left_out)
            continue
        try:
            problem, right = make(), {}
        except RuntimeError as error:  # no memory, no kernel of torch
            yield whole._replace(result={"wrong": f"failed with {explain(error)}"})
            continue
        for candidate in problem.candidates:
            label = f"{name}, {candidate}"
            event = Event({"label": label, "problem": name, "candidate": candidate})
            yield event
            result = _left_out(event, lost, deadline) or _check(problem, candidate, dtype)
            if "error" in result and "wrong" not in result:
                right[candidate] = event._replace(result=result)
            else:
                yield event._replace(result=result)
        timed = [_timed(*problem.candidates[name]) for name in right]
        times = alternate(timed, device, repetitions) if timed else []
        for event, stages in zip(right.values(), times, strict=True):
            yield event._replace(result=event.result | _rates(stages, problem))


def _rates(stages: Sequence[Times], problem: Problem) -> dict[str, Any]:
    found = {}
    for direction, time, nbytes in zip(("forward", "backward"), stages, problem.nbytes):
        if nbytes:
            found[direction] = time.record() | {"gb_per_s": nbytes / time.median / 1e9}
    total = sum(time.median for time, nbytes in zip(stages, problem.nbytes) if nbytes)
    return found | {"gb_per_s": sum(problem.nbytes) / total / 1e9}


def _left_out(
    event: Event, lost: Mapping[tuple, str], deadline: float | None
) -> dict[str, Any] | None:
    if event.key in lost:
        return {"wrong": lost[event.key]}
    return {"unfinished": OUT_OF_TIME} if expired(deadline) else None


def _check(problem: Problem, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A candidate's distance from fp64 (`error`), and what is wrong with it."""
    forward, backward = problem.candidates[name]
    try:
        out = forward()
        error = _off((*out, *backward(out)), problem.wanted)
    except Exception as fault:  # a candidate that fails costs its own figures and no other's
        return {"wrong": f"failed with {explain(fault)}"}
    wrong = {} if error < TOLERANCE[dtype] else {"wrong": f"off by {error:.2g} of a norm"}
    return {"error": error} | wrong


def line(r: dict[str, Any]) -> str:
    """A result for people."""
    reason = r.get("wrong") or r.get("unfinished")
    return f"{r['label']:<36}{reason or format(r['gb_per_s'], '>9,.1f') + ' GB/s'}"


def _off(found: Tensors, wanted: Tensors) -> float:
    pairs = zip(found, wanted, strict=True)
    errors = [(a.double() - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]
    return max(float(error.detach()) for error in errors)


def _timed(forward: Callable[[], Tensors], backward: Callable) -> Callable[[Clock], None]:
    def once(clock: Clock) -> None:
        clock.start()
        out = forward()
        clock.mark()
        backward(out)
        clock.mark()

    return once
