"""How the tensors that this process holds make up the whole ones (letters: docs/shapes.md)."""

from typing import Any

import torch

from megaarch.kernels.bindings import accumulator
from megaarch.model.linear import linear


class Sharding:
    """One process holds everything whole. Tensor parallelism overrides all six methods
    (parallel/tensor_parallel.py): the model calls them, and so knows no process group.

    summands: names of the parameters that every rank of `group` holds whole, and of whose gradients it
    has a summand.
    """

    summands: frozenset[str] = frozenset()
    group: Any = None

    def gather_sequence(self, x_BsD: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states [B, S, D] that the head reads, from the tokens held here."""
        return x_BsD

    def gather_memory(self, memory_BtD: torch.Tensor) -> torch.Tensor:
        """Returns the encoder's output [B, T, D] that all layers of a decoder attend to, from its tokens held
        here."""
        return memory_BtD

    def first_token(self, length: int) -> int:
        """Returns the index, among `length` tokens of a stream, of the first one held here."""
        return 0

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the share of a parameter that runs here: the heads of a relative-bias table [buckets, H],
        the ids of the output layer [V, D] and of its bias [V]."""
        return parameter

    def vocabulary(self, ids: int) -> dict[str, Any]:
        """Returns the options of `loss.cross_entropy` that say which `ids` of the output layer are held
        here, and by which ranks the others."""
        return {}

    def logits(
        self, hidden: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the logits [..., V] of hidden [..., D], in fp32 at least."""
        logits = linear(hidden, self.local(weight_VD))
        logits = logits.to(accumulator(logits.dtype))
        return logits if bias_V is None else logits + self.local(bias_V)
