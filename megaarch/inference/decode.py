"""A batch of prompts, token by token over a cache, whatever the architecture. Letters of shapes:
docs/shapes.md.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megaarch.attention.mask import CAUSAL, FULL
from megaarch.data.batch import Counts, Stream
from megaarch.data.example import ConvertedStream
from megaarch.inference.batches import Encoded, Heads, Layout, New, batch, encoder_stream, new_rows
from megaarch.inference.prompts import Prompt, window
from megaarch.model.kv_cache import Cache
from megaarch.model.transformer import Transformer


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
            encoder = encoder_stream(encoders, self.layout)
            lengths = np.array([len(e.tokens) for e in encoders])
            self.encoded = Encoded(lengths, encoder.tokens.shape[1], self.layout)
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
            kept = np.maximum(stops - start, 0)
            ending = np.flatnonzero((kept > 0) & (stops == lengths))
            last = np.maximum(kept - 1, 0)
            if self.form.probe is not None:
                kept[ending] -= 1
            new = new_rows(pieces, kept, self.layout.heads(last, ending), self.layout)
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
