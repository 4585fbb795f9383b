"""Batches of new tokens over a cache: what one call of the model takes in generation.

As in training a `Batch` holds streams with parts, the rows that the head reads, and `counts`, which FLOPs
are counted from. Other than there, self-attention's keys are the cache's slots. Letters of shapes:
docs/shapes.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.attention.mask import FULL, UNUSED, Parts, area
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.data.example import ConvertedStream
from megaarch.data.feature_converters import Part


@dataclass(frozen=True)
class Layout:
    """What batches are made for. axes: of positions. pad: the id that fills rows. multiple: streams'
    lengths are multiples of it."""

    device: torch.device
    axes: int
    pad: int
    multiple: int = 1

    def stretched(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)

    def heads(self, index: np.ndarray, rows: np.ndarray) -> "Heads":
        return self.tensor(index[:, None]), self.tensor(rows)


Heads = tuple[torch.Tensor, torch.Tensor]  # int64 [B, 1], int64 [R]


@dataclass(frozen=True)
class New:
    """New tokens of each row, first among the S of a call.

    tokens: int64 [B, S]; positions: int64 [B, S, A]. table: parts [B, P, 5], whose keys are slots; pairs:
    their area. counts, kept: int64 [B], a row's new tokens, and how many of these stay in the cache. heads:
    where logits are read, the token of each row and the rows.
    """

    tokens: np.ndarray
    positions: np.ndarray
    table: np.ndarray
    pairs: int
    counts: np.ndarray
    kept: np.ndarray
    heads: Heads


class Encoded:
    """Rows of an encoder that ran. lengths: int64 [B], real tokens. width: those that its output has. rest:
    the stream of the encoder now that nothing is left to run."""

    def __init__(self, lengths: np.ndarray, width: int, layout: Layout):
        self.lengths, self.width = lengths, width
        tokens = torch.zeros(len(lengths), 0, dtype=torch.int64, device=layout.device)
        positions = tokens[..., None].expand(len(lengths), 0, layout.axes)
        self.rest = Stream(tokens, positions, Parts.of([[]] * len(lengths), 0, 0))


def new_rows(
    streams: Sequence[ConvertedStream], kept: np.ndarray, heads: Heads, layout: Layout
) -> New:
    """Returns rows of any length, padded to the longest."""
    counts = np.array([len(s.tokens) for s in streams])
    tokens, positions = arrays(streams, layout)
    parts = [s.parts for s in streams]
    pairs = sum(area(part) for row in parts for part in row)
    return New(tokens, positions, table(parts), pairs, counts, kept, heads)


def encoder_stream(encoders: Sequence[ConvertedStream], layout: Layout) -> Stream:
    """Returns the stream of an encoder that sees each row whole."""
    tokens, positions = arrays(encoders, layout)
    width = tokens.shape[1]
    parts = Parts.of([e.parts for e in encoders], width, width)
    return Stream(layout.tensor(tokens), layout.tensor(positions), parts)


def batch(
    new: New,
    slots: int,
    layout: Layout,
    encoder: Stream | None = None,
    encoded: Encoded | None = None,
) -> Batch:
    """Returns the batch of a call. slots: of the cache, in use. encoder: its stream, in the call that runs it.
    encoded: its rows, which all new tokens see."""
    rows, width = new.tokens.shape
    cross, crossed = None, 0
    if encoded is not None:
        encoder = encoder or encoded.rest
        seen = np.where(new.counts > 0, encoded.lengths, 0)
        cross_table = np.zeros((rows, 1, 5), dtype=np.int32)
        cross_table[:, 0, 0] = np.where(seen > 0, FULL, UNUSED)
        cross_table[:, 0, 2], cross_table[:, 0, 4] = new.counts * (seen > 0), seen
        cross = Parts(cross_table, width, encoded.width)
        crossed = int((new.counts * seen).sum())
    parts = Parts(new.table, width, slots)
    last = Stream(layout.tensor(new.tokens), layout.tensor(new.positions), parts, cross)
    streams = (last,) if encoder is None else (encoder, last)
    (index, head_rows), targets = new.heads, len(new.heads[1])
    of_streams = [(int(new.counts.sum()), new.pairs, crossed, rows * width)]
    if encoder is not None:
        assert encoded is not None
        ran = int(encoded.lengths.sum()) if encoder.slots else 0
        of_streams.insert(0, (ran, encoder.parts.area(), 0, encoder.slots))
    tokens, areas, cross_areas, of_slots = zip(*of_streams, strict=True)
    count = Counts(rows, tokens, areas, cross_areas, targets, of_slots)
    return Batch(streams, index, index, index, head_rows, targets, index[:, 0], count)


def arrays(streams: Sequence[ConvertedStream], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [B, S] and positions [B, S, A], padded to the longest."""
    width = layout.stretched(max(len(s.tokens) for s in streams))
    tokens = np.full((len(streams), width), layout.pad, dtype=np.int64)
    positions = np.zeros((len(streams), width, layout.axes), dtype=np.int64)
    for b, stream in enumerate(streams):
        tokens[b, : len(stream.tokens)] = stream.tokens
        positions[b, : len(stream.tokens)] = stream.positions
    return tokens, positions


def table(rows: Sequence[list[Part]]) -> np.ndarray:
    """Returns the table [B, P, 5] of each row's parts."""
    found = np.zeros((len(rows), max(map(len, rows)), 5), dtype=np.int32)
    for b, row in enumerate(rows):
        if row:
            found[b, : len(row)] = row
    return found
