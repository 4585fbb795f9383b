"""Dropout whose mask is a function of (seed, step, global row, module name) and nothing else.

No random state is read or written, so a row has the same mask on every rank, in every micro-batch
split and when a layer is recomputed for its backward pass. Legend: B rows, S tokens, D width.
"""

import hashlib
from dataclasses import dataclass

import torch

_LOW = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in int64) in which every input bit moves every output
    bit about half the time: Wellons, "Prospecting for hash functions", lowbias32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


@dataclass(frozen=True)
class DropoutKeys:
    """What every mask of one micro-batch is drawn from.

    rows: int64 [B], global row numbers.
    """

    seed: int
    step: int
    rows: torch.Tensor

    def of(self, name: str) -> torch.Tensor:
        """int64 [B]: the key of each row in the module of this global name."""
        text = f"{self.seed} {self.step} {name}".encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        low = _mix((self.rows & _LOW) ^ (digest & _LOW))
        return _mix(low ^ (self.rows >> 32) ^ (digest >> 32))


def dropout(
    x_BSD: torch.Tensor, key_B: torch.Tensor, rate: float, branch: int = 0, first: int = 0
) -> torch.Tensor:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate).

    `branch` tells apart several masks drawn from one key. Slot s, channel d of a row has the same
    fate whatever the other rows of the batch are. `first` is the slot of x's first one, where x is
    a shard of a longer sequence.
    """
    _, S, D = x_BSD.shape
    element_SD = _mix(torch.arange(first * D, (first + S) * D, device=x_BSD.device).view(S, D))
    bits_BSD = _mix(element_SD ^ _mix((key_B + branch) & _LOW)[:, None, None])
    keep_BSD = bits_BSD >= int(rate * 2**32)
    return x_BSD * (keep_BSD.to(x_BSD.dtype) * (1 / (1 - rate)))
