"""Decomposition A for libraries of variable lengths: all rectangles of a batch in one call, all
bottom-right triangles in another.

    parts --build--> two lists of segments --gather--> [T, H, Dh] and cumulative lengths --library-->

What is computed is exactly the parts' area. Rows are gathered once, and not at all where the
segments are the whole tensor in order. Segments travel to the device; what counts rows is made
there. The libraries differ only in how they are called and in what they cannot do: flash.py and
cudnn_ragged.py say that, and nothing else.

Letters of shapes: docs/shapes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.attention.fused_gather import FusedGather, Pieces
from megaarch.attention.gather import Gather, IndexGather, Rows, Segments
from megaarch.attention.kernel_interface import HALF, AttentionInputs, CallsKernel
from megaarch.attention.mask import CAUSAL, FULL, Parts, visible_tiles
from megaarch.attention.plan import CallPlan, to_device


@dataclass(frozen=True)
class VarlenCall:
    """One call: N segments of query rows, q, each with its keys, k. causal: at the bottom right."""

    causal: bool
    q: Segments
    k: Segments

    @property
    def out(self) -> Segments:
        """The rows of its result."""
        return self.q


def plan(parts: Parts) -> CallPlan:
    """Returns the calls of these parts, remembered on them."""
    return parts.plan("varlen", _build)


def _build(parts: Parts) -> CallPlan:
    tiles = sorted(visible_tiles(parts), key=lambda tile: (tile.row, tile.q_start))
    calls, size = [], len(parts)
    for shape in (FULL, CAUSAL):
        table = np.array([tile[1:6] for tile in tiles if tile.shape == shape], dtype=np.int64)
        if len(table):
            row, q0, q1, k0, k1 = table.T
            q = Segments.of(row * parts.queries + q0, q1 - q0, size * parts.queries)
            k = Segments.of(row * parts.keys + k0, k1 - k0, size * parts.keys)
            calls.append(VarlenCall(shape == CAUSAL, q, k))
    filled = sum(tile.q for tile in tiles) == size * parts.queries
    return CallPlan(tuple(calls), filled and len(calls) == 1 and calls[0].q.whole)


def pieces(parts: Parts) -> dict[str, Pieces]:
    """Returns what FusedGather adds up by, remembered on the parts."""

    def build(parts: Parts) -> dict[str, Pieces]:
        calls, size = plan(parts).calls, len(parts)
        q = Pieces.of([call.q for call in calls], size * parts.queries)
        k = Pieces.of([call.k for call in calls], size * parts.keys)
        return {"q": q, "k": k}

    return parts.plan("varlen pieces", build)


def on_device(parts: Parts, device: torch.device, fused_rows: bool) -> Gather:
    """Returns what moves rows on `device`, made once."""

    def make() -> Gather:
        calls = to_device(plan(parts).calls, device)
        if fused_rows:
            rows = to_device(pieces(parts), device)
            return FusedGather(calls, rows | {"out": rows["q"]})
        q = [_rows(call.q, len(parts), parts.queries) for call in calls]
        k = [_rows(call.k, len(parts), parts.keys) for call in calls]
        # once: a query is in one part
        return IndexGather(calls, {"q": q, "k": k, "out": q}, once=("q", "out"))

    return plan(parts).once((device, fused_rows), make)


def _rows(segments: Segments, size: int, length: int) -> Rows:
    return (slice(0, size), slice(0, length)) if segments.whole else segments.index()


@dataclass(frozen=True, kw_only=True)
class VarlenKernel(CallsKernel):
    """A library of variable lengths.

    run(function, q, k, v, call, scale): calls the library's function for a call's rows [T, H, Dh].
    rebuilds: the library builds a plan for each shape of a call, and shapes follow from the parts.
    """

    run: Callable[..., torch.Tensor]
    rebuilds: bool = False
    devices: tuple[str, ...] | None = ("cuda",)
    dtypes: tuple[torch.dtype, ...] | None = HALF
    head_sizes: tuple[int, int] | None = (256, 8)

    def steady(self, parts: Parts) -> bool:
        return not self.rebuilds

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        if plan(parts).calls and fused_rows:
            pieces(parts)

    def cost(self, parts: Parts) -> tuple[int, int]:
        return parts.area(), len(plan(parts).calls)

    def plan(self, parts: Parts) -> CallPlan:
        return plan(parts)

    def on_device(self, inputs: AttentionInputs) -> Gather:
        return on_device(inputs.parts, inputs.device, inputs.fused_rows)

    def run_call(self, call: VarlenCall, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        assert self.package
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return self.run(self.package.load(), *rows, call, inputs.scale).view(q.shape)
