"""A batch of prompts, token by token over a cache, whatever the architecture.

As in training a `Batch` holds streams with parts, the rows that the head reads, and `counts`, which FLOPs
are counted from. Other than there, self-attention's keys are the cache's slots. Letters of shapes:
docs/shapes.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.attention.mask import CAUSAL, FULL, UNUSED, Parts, area
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.data.example import ConvertedStream
from megaarch.data.feature_converters import Part
from megaarch.inference.prompts import Prompt, window
from megaarch.model.kv_cache import Cache
from megaarch.model.transformer import Transformer


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


class Decoding:
    """Prompts of one form under way: `start`, then `step` by step a new token for each row.

    model: runs on every rank of a layout alike. chunk: tokens of the prompts that are run
    at a time; None: all. room: new tokens to make room for in the cache at once. counts: of all that
    ran, or None.
    """

    def __init__(
        self,
        model: Transformer,
        layout: Layout,
        prompts: Sequence[Prompt],
        chunk: int | None = None,
        room: int = 0,
    ):
        self.model, self.layout, self.form = model, layout, prompts[0].form
        assert all(p.form == self.form for p in prompts), "prompts of one form share a batch"
        self.prompts, self.chunk = list(prompts), chunk
        self.advance = np.array(self.form.advance)
        longest = max(len(p.stream.tokens) for p in prompts)
        slots = longest + self.form.width * (room + 1)
        self.cache = Cache(len(prompts), layout.axes, layout.device, slots)
        self.positions = np.stack([p.next_position for p in prompts])  # of each row's next token
        self.encoded: Encoded | None = None
        self.counts: Counts | None = None
        self._heads: Heads | None = None  # of every step

    def start(self) -> torch.Tensor:
        """Runs the prompts; returns the logits [B, V] of each row's first new token.

        UserError where the prompts' mask cannot be cut into chunks.
        """
        encoder, encoders = None, [p.encoder for p in self.prompts if p.encoder is not None]
        if encoders:
            tokens, positions = map(self.layout.tensor, arrays(encoders, self.layout))
            width = tokens.shape[1]
            encoder = Stream(tokens, positions, Parts.of([e.parts for e in encoders], width, width))
            lengths = np.array([len(e.tokens) for e in encoders])
            self.encoded = Encoded(lengths, width, self.layout)
        return self._rows([p.stream for p in self.prompts], encoder)

    def go_on(self, streams: Sequence[ConvertedStream]) -> torch.Tensor:
        """Adds tokens to each row, whose parts have the cache's slots as keys: a dialogue's next turn.
        Returns logits as `start`. For forms without a probe and models without an encoder."""
        assert self.form.probe is None and self.encoded is None
        self.positions = np.stack([s.positions[-1] for s in streams]) + self.advance
        return self._rows(streams, None)

    def step(self, tokens: np.ndarray) -> torch.Tensor:
        """Adds one token to each row, int64 [B]; returns the logits [B, V] of the next ones."""
        form, rows, width = self.form, len(tokens), self.form.width
        held = self.layout.stretched(width)
        token_BS = np.full((rows, held), self.layout.pad, dtype=np.int64)
        position_BSA = np.zeros((rows, held, len(self.advance)), dtype=np.int64)
        token_BS[:, 0], position_BSA[:, 0] = tokens, self.positions
        self.positions = self.positions + self.advance
        seen, shape = self.cache.lengths + width, FULL
        if form.probe is not None:
            token_BS[:, 1], position_BSA[:, 1] = form.probe, self.positions
            if form.sees_itself:
                shape = CAUSAL
            else:
                seen = seen - 1
        table = np.zeros((rows, 1, 5), dtype=np.int32)
        table[:, 0, 0], table[:, 0, 2], table[:, 0, 4] = shape, width, seen
        pairs = int(seen.sum()) * width - (rows if shape == CAUSAL else 0)
        ones = np.ones(rows, dtype=np.int64)
        if self._heads is None:
            self._heads = self.layout.heads(ones * (width - 1), np.arange(rows))
        return self._run(New(token_BS, position_BSA, table, pairs, ones * width, ones, self._heads))

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        self.cache.select(rows)
        self.positions, self._heads = self.positions[rows], None
        if self.encoded is not None:
            self.encoded = Encoded(self.encoded.lengths[rows], self.encoded.width, self.layout)

    def _rows(self, streams: Sequence[ConvertedStream], encoder: Stream | None) -> torch.Tensor:
        """Runs rows of any length, chunk by chunk; returns the logits [B, V] of their last tokens."""
        lengths = np.array([len(stream.tokens) for stream in streams])
        longest, held = int(lengths.max()), self.cache.lengths
        chunk = min(self.chunk or longest, longest)
        out = None
        for start in range(0, longest, chunk):
            stops = np.minimum(lengths, start + chunk)
            pieces = [
                window(stream, start, max(start, int(stop)), int(before))
                for stream, stop, before in zip(streams, stops, held, strict=True)
            ]
            counts = np.maximum(stops - start, 0)
            ending = np.flatnonzero((counts > 0) & (stops == lengths))
            kept = counts.copy()
            if self.form.probe is not None:
                kept[ending] -= 1
            heads = self.layout.heads(np.maximum(counts - 1, 0), ending)
            parts = [piece.parts for piece in pieces]
            pairs = sum(area(part) for row in parts for part in row)
            new = New(*arrays(pieces, self.layout), table(parts), pairs, counts, kept, heads)
            logits = self._run(new, encoder if start == 0 else None)
            if out is None:
                out = logits.new_empty(len(streams), logits.shape[1])
            out[new.heads[1]] = logits
        assert out is not None
        return out

    @torch.no_grad()
    def _run(self, new: New, encoder: Stream | None = None) -> torch.Tensor:
        slots = self.cache.begin(new.counts, new.positions)
        made = batch(new, slots, self.layout, encoder, self.encoded)
        logits = self.model(made, None, None, (), self.cache)
        self.cache.commit(new.kept)
        self.counts = made.counts if self.counts is None else self.counts + made.counts
        return logits


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
