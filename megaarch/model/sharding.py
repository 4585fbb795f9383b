"""How the tensors that this process holds make up the whole ones (letters: docs/shapes.md)."""

import torch

from megaarch.kernels.library import accumulator
from megaarch.model.loss import TargetLosses, cross_entropy
from megaarch.model.product import product


class Sharding:
    """One process holds everything whole. Tensor parallelism overrides all five methods
    (parallel/tensor.py): the model calls them, and so knows no process group."""

    def gather_sequence(self, x_BsD: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states [B, S, D] that the head reads, from the tokens held here."""
        return x_BsD

    def first_token(self, length: int) -> int:
        """Returns the index, among `length` tokens of a stream, of the first one held here."""
        return 0

    def own_heads(self, table: torch.Tensor) -> torch.Tensor:
        """Returns the columns of a relative-bias table [buckets, H] whose heads run here."""
        return table

    def cross_entropy(
        self,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_R: torch.Tensor,
        **options,
    ) -> TargetLosses:
        """As `loss.cross_entropy`; the output layer may be split by vocabulary."""
        return cross_entropy(hidden_RD, weight_VD, bias_V, target_R, **options)

    def logits(
        self, hidden: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the logits [..., V] of hidden [..., D], in fp32 at least."""
        logits = product(hidden, weight_VD.t())
        logits = logits.to(accumulator(logits.dtype))
        return logits if bias_V is None else logits + bias_V
