"""Keys and values that generation keeps, so that a step runs the new tokens alone.

One `Cache` serves a batch. Rows are of unequal lengths: row b's kept tokens stand in slots
0 .. lengths[b] - 1 of every layer, and what a step adds behind them. Which of them a query sees is
said by parts whose keys are slots, so that every attention kernel runs a step as it runs a training
batch with fewer queries than keys. A tensor rank keeps the key heads that it runs.

Letters of shapes: docs/shapes.md. C is the number of slots.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

SLOTS = 64  # at first, unless more are asked for


class LayerCache:
    """What one layer keeps, in `tensors`: keys and values [B, C, Hkv, Dh], none before the first step; and
    memory_keys and memory_values [B, T, Hkv, Dh] of the encoder's output, in a layer with cross-attention."""

    def __init__(self, cache: "Cache"):
        self.cache = cache
        self.tensors: dict[str, torch.Tensor] = {}

    def extend(
        self, k_BSHDh: torch.Tensor, v_BSHDh: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stores a step's keys and values; returns those of all slots in use, and their positions
        [B, slots, A]."""
        cache = self.cache
        for name, new in (("keys", k_BSHDh), ("values", v_BSHDh)):
            self.tensors[name] = cache.put(self.tensors.get(name), new)
        k, v = (self.tensors[name][:, : cache.in_use] for name in ("keys", "values"))
        return k, v, cache.positions[:, : cache.in_use]


class Cache:
    """What the layers keep of a batch of `rows` prompts.

    A step is `begin`, the model's forward pass with this cache, `commit`. lengths: int64 [B], how many
    tokens of each row are kept; positions: int64 [B, C, A], on the device. slots: to make room for at
    once; more are made by doubling.
    """

    def __init__(self, rows: int, axes: int, device: torch.device, slots: int = SLOTS):
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.slots = max(slots, 1)
        self.positions = torch.zeros(rows, self.slots, axes, dtype=torch.int64, device=device)
        self.layers: dict[int, LayerCache] = {}
        self.in_use = 0
        self.slot_BS = np.zeros((rows, 0), dtype=np.int64)
        self.kernels: dict[range, Any] = {}  # of model/fused_decode.py, by layers
        self._to: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None

    def layer(self, index: int) -> LayerCache:
        """Returns what the layer of this global index keeps."""
        if index not in self.layers:
            self.layers[index] = LayerCache(self)
        return self.layers[index]

    def begin(self, counts: np.ndarray, positions: np.ndarray) -> int:
        """Makes room for a step; returns the slots that it uses, of the longest row. counts: int [B],
        new tokens of each row, which stand first among the S of the step; positions: int64 [B, S, A]."""
        rows, width = positions.shape[:2]
        ends = self.lengths + counts
        self.in_use = int(ends.max())
        while self.slots < self.in_use:
            self.slots *= 2
        self.slot_BS = self.lengths[:, None] + np.arange(width)
        to_BS = self.slot_BS + np.arange(rows)[:, None] * self.slots
        self._taken = None
        if (counts != width).any():
            taken = np.arange(width) < counts[:, None]
            self._taken = self._on_device(np.flatnonzero(taken))
            self.slot_BS, to_BS = np.where(taken, self.slot_BS, -1), to_BS[taken]
        self._to = self._on_device(to_BS.reshape(-1))
        self.positions = self.put(self.positions, self._on_device(positions))
        return self.in_use

    def commit(self, kept: np.ndarray) -> None:
        """Ends a step. kept: int [B], how many of each row's new tokens stay, its first ones."""
        self.lengths = self.lengths + kept

    def put(self, held: torch.Tensor | None, new_BS: torch.Tensor) -> torch.Tensor:
        """Writes a step's rows [B, S, ...] into their slots [B, C, ...], growing these to the slots there
        are; returns them."""
        assert self._to is not None, "begin comes first"
        held = self.grown(held, new_BS)
        flat = new_BS.flatten(0, 1)
        if self._taken is not None:
            flat = flat.index_select(0, self._taken)
        held.flatten(0, 1).index_copy_(0, self._to, flat)
        return held

    def grown(self, held: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Returns held [B, C, ...] with the slots that there are. None: zeros like new rows [B, S, ...]."""
        if held is not None and held.shape[1] == self.slots:
            return held
        # zero, for a kernel may multiply what it masks
        grown = like.new_zeros(len(like), self.slots, *like.shape[2:])
        if held is not None:
            grown[:, : held.shape[1]] = held
        return grown

    def select(self, rows: list[int]) -> None:
        """Keeps these rows alone, in this order."""
        index = self._on_device(np.array(rows, dtype=np.int64))
        self.lengths = self.lengths[rows]
        self.positions = self.positions.index_select(0, index)
        for layer in self.layers.values():
            layer.tensors = {n: x.index_select(0, index) for n, x in layer.tensors.items()}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields all tensors that are kept."""
        yield self.positions
        for layer in self.layers.values():
            yield from layer.tensors.values()

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds on this rank, room for later tokens included."""
        return sum(x.nbytes for x in self.tensors())

    def _on_device(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(self.positions.device, non_blocking=True)
