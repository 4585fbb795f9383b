"""Dropout whose mask is a function of (seed, step, global row, module name) and nothing else.

No random state is read or written, so a row has the same mask on every rank, in every micro-batch
split and when a layer is recomputed for its backward pass. Slots and channels are hashed apart, in 64
bits; tensors as large as the hidden state are 32-bit and take three operations. Letters of shapes:
docs/shapes.md.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

# Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64): its
# increment and the multipliers of its hash, as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@dataclass(frozen=True)
class DropoutKeys:
    """The keys from which every mask of one micro-batch is drawn.

    rows: int64 [B], global row numbers.
    """

    seed: int
    step: int
    rows: torch.Tensor

    def of(self, name: str) -> torch.Tensor:
        """Returns the key of each row in the module of this global name, int64 [B]."""
        text = f"{self.seed} {self.step} {name}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return self._rows ^ int.from_bytes(digest, "little", signed=True)

    @cached_property
    def _rows(self) -> torch.Tensor:
        return _hash(self.rows)


def dropout(
    x_BSD: torch.Tensor, key_B: torch.Tensor, rate: float, branch: int = 0, first: int = 0
) -> torch.Tensor:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate).

    `branch` distinguishes several masks drawn from one key. Slot s, channel d of a row has the same
    fate whatever the other rows of the batch are. `first` is the slot of x's first one, where x is
    a shard of a longer sequence.
    """
    _, S, D = x_BSD.shape
    slot_S = torch.arange(first, first + S, device=x_BSD.device)
    key_BS = _hash((key_B + branch * 2**32)[:, None] + slot_S)
    bits_BSD = _combine(key_BS, _hash(torch.arange(D, device=x_BSD.device)))
    dropped_BSD = bits_BSD < int(rate * 2**32) - 2**31
    return (x_BSD * (1 / (1 - rate))).masked_fill(dropped_BSD, 0.0)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Returns 64-bit integers; a changed bit of the input changes each of theirs about half the time.
    Products wrap, and a shift extends the sign, which costs one bit of 64."""
    # so that zero is no fixed point; a sum would overflow in inductor's index arithmetic
    x = x ^ _INCREMENT
    for multiplier in _MULTIPLIERS:
        x = (x ^ (x >> 32)) * multiplier
    return x ^ (x >> 32)


def _combine(slot_BS: torch.Tensor, channel_D: torch.Tensor) -> torch.Tensor:
    """Returns int32 [B, S, D], evenly spread, from hashes: the exclusive or of their upper halves, times
    that of their lower ones, made odd. A product's upper bits depend on all bits of its factors,
    and no two elements have the same pair of these."""
    slot_BS1 = slot_BS[..., None]
    bits_BSD = (slot_BS1 >> 32).to(torch.int32) ^ (channel_D >> 32).to(torch.int32)
    factor_BSD = (slot_BS1 & -2).to(torch.int32) ^ (channel_D | 1).to(torch.int32)
    return bits_BSD.mul_(factor_BSD)
