"""Decomposition A for libraries of variable lengths: all rectangles of a batch in one call, all
bottom-right triangles in another.

    parts --build--> two lists of segments --gather--> [T, H, D] and cumulative lengths --library-->

What is computed is exactly the parts' area. Rows are gathered once, and not at all where the
segments are the whole tensor in order. Segments travel to the device; what counts rows is made
there. The libraries differ only in how they are called and in what they cannot do: flash2.py,
flash3.py, flash4.py, cudnn_ragged.py and torch_varlen.py each say that, and nothing else.

Shape suffixes: B rows, S length, H heads, D head size, T rows of all segments, N segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from megaarch.attention import fused_rows
from megaarch.attention.bias import RelativeBias
from megaarch.attention.gpu import Gpu, describe
from megaarch.attention.package import Package
from megaarch.attention.parts import CAUSAL, FULL, Parts
from megaarch.attention.rows import HALF, Put, Ranges, Take, Where, nothing
from megaarch.attention.sdpa_plan import visible_tiles


@dataclass(frozen=True)
class Segments:
    """One call: N segments of query rows, each with its keys.

    q, k: their rows. q_longest, k_longest: of a segment.
    """

    causal: bool
    q: Ranges
    k: Ranges
    q_longest: int
    k_longest: int

    @property
    def q_starts(self) -> Any:
        """int32 [N + 1], cumulative lengths."""
        return self.q.starts

    @property
    def k_starts(self) -> Any:
        return self.k.starts


@dataclass(frozen=True)
class Plan:
    """The calls of a batch. whole: the one call's result is the output. filled: every row of the
    output is written. on_device: what is derived from it on a device; never pickled."""

    calls: tuple[Segments, ...]
    whole: bool
    filled: bool
    on_device: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"on_device": {}}


class Call(Protocol):
    """A library's function, as this file calls it: causal is aligned at the bottom right."""

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor: ...


def plan(parts: Parts) -> Plan:
    """The calls of these parts, remembered on them."""
    return parts.plan("varlen", build)


def build(parts: Parts) -> Plan:
    """The plan of a batch. Host only."""
    tiles = sorted(visible_tiles(parts), key=lambda tile: (tile.row, tile.q_start))
    calls = []
    for shape in (FULL, CAUSAL):
        table = np.array([tile[1:6] for tile in tiles if tile.shape == shape], dtype=np.int64)
        if len(table):
            row, q0, q1, k0, k1 = table.T
            q, k = row * parts.queries + q0, row * parts.keys + k0
            calls.append(
                Segments(
                    shape == CAUSAL,
                    _ranges(q, q1 - q0, len(parts) * parts.queries),
                    _ranges(k, k1 - k0, len(parts) * parts.keys),
                    int((q1 - q0).max()),
                    int((k1 - k0).max()),
                )
            )
    filled = sum(tile.q for tile in tiles) == len(parts) * parts.queries
    return Plan(tuple(calls), filled and len(calls) == 1 and calls[0].q.whole, filled)


def _ranges(first: np.ndarray, lengths: np.ndarray, rows: int) -> Ranges:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    total = int(starts[-1])
    whole = total == rows and bool((first == starts[:-1]).all())
    return Ranges(first, starts.astype(np.int32), total, whole)


def no_limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """Of a library without documented limits besides those of `Kernel`'s fields."""
    return None


@dataclass(frozen=True)
class Kernel:
    """A variable-length library as a kernel of `attend`.

    package: where its function is found. call: how it is called. head_sizes: largest and divisor.
    limit: as gpu.py says.
    tflops: published, forward and backward, packed causal rows of 8k tokens and head size 128; None
    where nobody has published it, and then `auto` leaves the kernel alone. fused_rows: rows move by
    attention/fused_rows.py. rebuilds: the library builds a plan for each shape of a call.
    forward_operators: as dispatch.py says.
    """

    package: Package
    call: Callable[[Any], Call]
    head_sizes: tuple[int, int] = (256, 8)
    limit: Callable[[Gpu, int, Parts], str | None] = no_limit
    tflops: tuple[float, float] | None = None
    operators: str | None = None
    forward_operators: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = HALF
    rebuilds: bool = False
    fused_rows: bool = False

    def steady(self, parts: Parts) -> bool:
        """As dispatch.py says. The shapes of a call follow from the parts."""
        return not self.rebuilds

    def cannot_run(
        self, q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None
    ) -> str | None:
        """The first reason not to run here, or None."""
        if q.device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {q.device.type}"
        if bias is not None:
            return "it takes no position bias"
        dtype, (largest, divisor) = compute_dtype(q), self.head_sizes
        if dtype not in self.dtypes:
            return f"it takes {' and '.join(map(str, self.dtypes))}, not {dtype}"
        if q.shape[-1] > largest or q.shape[-1] % divisor:
            return f"its head sizes are multiples of {divisor} up to {largest}, not {q.shape[-1]}"
        if (obstacle := self.package.obstacle(q.device)) or q.device.type != "cuda":
            return obstacle
        return self.limit(describe(q.device), q.shape[-1], parts)

    def warm(self, parts: Parts, device_type: str = "cuda") -> None:
        plan(parts)
        if self.fused_rows and plan(parts).calls:
            pieces(parts)

    def cost(self, parts: Parts) -> tuple[int, int]:
        """(query, key) pairs that it computes, and its calls."""
        return parts.area(), len(plan(parts).calls)

    def attend(
        self,
        q_BSHD: torch.Tensor,
        k_BSHD: torch.Tensor,
        v_BSHD: torch.Tensor,
        parts: Parts,
        scale: float,
        bias: RelativeBias | None = None,
        query_positions: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend.attend`, whose contract this fulfils."""
        assert bias is None
        calls_plan, dtype = plan(parts), compute_dtype(q_BSHD)
        if not calls_plan.calls:
            return nothing(q_BSHD, k_BSHD, v_BSHD)
        qkv = (x.to(dtype) for x in (q_BSHD, k_BSHD, v_BSHD))
        move = on_device(parts, q_BSHD.device, self.fused_rows)
        function, results = self.call(self.package.load()), []
        taken = [move.take(x, side) for x, side in zip(qkv, "qkk", strict=True)]
        with torch.autocast(q_BSHD.device.type, enabled=False):
            for call, *tensors in zip(move.calls, *taken, strict=True):
                q, k, v = (x.flatten(0, 1) for x in tensors)
                results.append(function(q, k, v, call, scale).view(tensors[0].shape))
        out = results[0] if calls_plan.whole else move.put(results, q_BSHD.shape)
        return out.to(q_BSHD.dtype)


@dataclass(frozen=True)
class ByIndex:
    """Rows moved by torch, which takes an index of each row. calls: on the device. where: of each
    call, by side (q, k), flat rows [1, T] or slices. filled: as of the plan."""

    calls: tuple[Segments, ...]
    where: dict[str, list[Where]]
    filled: bool

    def take(self, x_BSHD: torch.Tensor, side: str) -> tuple[torch.Tensor, ...]:
        """The rows that each call reads, [1, T, H, D]."""
        return Take.apply(x_BSHD, self.where[side], side == "q")  # a query is in one part

    def put(self, results: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """The calls' results as rows of one tensor."""
        puts = [(to, 0) if isinstance(to, tuple) else (to[0], None) for to in self.where["q"]]
        return Put.apply(puts, shape, self.filled, *results)


@dataclass(frozen=True)
class BySegment:
    """The same by attention/fused_rows.py, which takes segments. cut: of q and k, the transpose."""

    calls: tuple[Segments, ...]
    cut: dict[str, fused_rows.Pieces]

    def take(self, x_BSHD: torch.Tensor, side: str) -> tuple[torch.Tensor, ...]:
        sides = [getattr(call, side) for call in self.calls]
        return fused_rows.Take.apply(x_BSHD, sides, self.cut[side])

    def put(self, results: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        sides = [call.q for call in self.calls]
        return fused_rows.Put.apply(sides, self.cut["q"], shape, *results)


def pieces(parts: Parts) -> dict[str, fused_rows.Pieces]:
    """What BySegment adds up by, of q and k; remembered on the parts."""

    def cut(parts: Parts) -> dict[str, fused_rows.Pieces]:
        calls, count = plan(parts).calls, len(parts)
        return {
            "q": fused_rows.pieces([call.q for call in calls], count * parts.queries),
            "k": fused_rows.pieces([call.k for call in calls], count * parts.keys),
        }

    return parts.plan("varlen pieces", cut)


def on_device(parts: Parts, device: torch.device, fused_rows: bool) -> ByIndex | BySegment:
    """What moves rows on `device`, made once."""
    found = plan(parts)
    key = device, fused_rows
    if key not in found.on_device:
        calls = tuple(replace(c, q=c.q.on(device), k=c.k.on(device)) for c in found.calls)
        if fused_rows:
            cut = {side: x.on(device) for side, x in pieces(parts).items()}
            found.on_device[key] = BySegment(calls, cut)
        else:
            where = {
                "q": [_where(c.q, len(parts), parts.queries) for c in calls],
                "k": [_where(c.k, len(parts), parts.keys) for c in calls],
            }
            found.on_device[key] = ByIndex(calls, where, found.filled)
    return found.on_device[key]


def _where(side: Ranges, count: int, length: int) -> Where:
    return (slice(0, count), slice(0, length)) if side.whole else side.index()


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype that the library gets: autocast's, where autocast would cast."""
    kind = q.device.type
    if q.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return q.dtype
