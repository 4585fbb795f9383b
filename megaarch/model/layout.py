"""What a parallel layout replaces in a forward pass: in one process, nothing is split.

Legend: B rows, S tokens, D width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megaarch.model.loss import RowLosses, Slope, cross_entropy


def unsplit(x: torch.Tensor) -> torch.Tensor:
    return x


def from_the_start(length: int) -> int:
    return 0


@dataclass(frozen=True)
class Layout:
    """How the tensors that this process holds make up the whole ones.

    cross_entropy: as `loss.cross_entropy`; the output layer may be split by vocabulary. slope: what
        computes its chunks.
    gather: hidden states [B, S held here, D] to the [B, S, D] that the head reads.
    own_heads: a relative-bias table [buckets, H] to the columns of the heads that run here.
    first: of a batch's stream of so many tokens, the first whose hidden state is held here.
    """

    cross_entropy: Callable[..., RowLosses] = cross_entropy
    slope: Slope | None = None
    gather: Callable[[torch.Tensor], torch.Tensor] = unsplit
    own_heads: Callable[[torch.Tensor], torch.Tensor] = unsplit
    first: Callable[[int], int] = from_the_start
