"""The Batch: fixed shapes for a whole run, and what was counted when it was made.

Shape suffixes: B rows, S tokens of a stream, A position axes, P parts, M targets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megaarch.attention.mask import Parts


@dataclass(frozen=True)
class Stream:
    """One stack's input.

    tokens: int64 [B, S]; positions: int64 [B, S, A].
    parts: self-attention. cross: attention from this stream to the one before it, or None.
    segments: int64 [B, S] token types (BERT), or None.
    first: slot of the row at which tokens and segments begin. Above 0 only in a shard of a stream
        (context parallelism), whose positions and parts are still those of the whole row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    parts: Parts
    cross: Parts | None = None
    segments: torch.Tensor | None = None
    first: int = 0

    @property
    def slots(self) -> int:
        """B·S."""
        return self.tokens.numel()

    @property
    def token_positions(self) -> torch.Tensor:
        """[B, S, A] of this stream's own tokens."""
        return self.positions[:, self.first : self.first + self.tokens.shape[1]]


@dataclass(frozen=True)
class Counts:
    """Counts of what a batch really holds, padding left out. The only input of the FLOP count.

    rows: batch rows. tokens: per stream, rows of some part's example.
    areas: per stream, visible pairs of its self-attention. cross_areas: per stream (0 if none).
    targets: targets of non-zero weight. slots: per stream, B·S, to report the share of padding.
    """

    rows: int
    tokens: tuple[int, ...]
    areas: tuple[int, ...]
    cross_areas: tuple[int, ...]
    targets: int
    slots: tuple[int, ...]

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(_sum(a, b) for a, b in pairs))


def _sum(a: Any, b: Any) -> Any:
    """Returns the sum of two numbers, or of two tuples by their places."""
    return tuple(map(sum, zip(a, b, strict=True))) if isinstance(a, tuple) else a + b


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    streams: in stack order; the last one carries the targets.
    target_index: int64 [B, M], row of the last stream at which a target is read off.
    target_tokens: int64 [B, M]. target_weights: float32 [B, M], 0 where a slot is unused.
    head_rows: int64 [R], flat indices into [B·M] of the slots of non-zero weight, R padded to a
        multiple of 128 with slot 0 (the head runs on these rows only); real slots come first,
        and `head_count` says how many they are.
    sample_index: int64 [B], global row numbers: they key dropout and name a bad batch.
    """

    streams: tuple[Stream, ...]
    target_index: torch.Tensor
    target_tokens: torch.Tensor
    target_weights: torch.Tensor
    head_rows: torch.Tensor
    head_count: int
    sample_index: torch.Tensor
    counts: Counts

    def to(self, device: torch.device | str) -> "Batch":
        """Returns tensors on `device`; parts and counts stay on the host."""

        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns tensors and the plans of parts in pinned memory, from which copies to a GPU run
        on their own. torch's DataLoader calls it."""
        for stream in self.streams:
            for parts in (stream.parts, stream.cross):
                if parts is not None:
                    parts.pin_memory()
        return self._each(lambda x: x.contiguous().pin_memory())

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def moved(held: "Batch | Stream") -> dict[str, torch.Tensor]:
            return {k: move(v) for k, v in vars(held).items() if isinstance(v, torch.Tensor)}

        streams = tuple(replace(s, **moved(s)) for s in self.streams)
        return replace(self, streams=streams, **moved(self))
