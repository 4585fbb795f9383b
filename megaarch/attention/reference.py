"""The oracle: dense attention in fp64, one softmax over the dense mask. Slow and obviously right.

Letters of shapes: docs/shapes.md.
"""

from dataclasses import dataclass

import torch

from megaarch.attention.kernel_interface import AttentionInputs, Kernel


@dataclass(frozen=True)
class Reference(Kernel):
    """Runs everything."""

    refuses_bias: str | None = None

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns softmax(q k' * scale + bias) v over what the parts let each query see."""
        seen = visible(inputs)
        out = weights(scores(inputs, seen), seen) @ heads(inputs.v, seen, inputs.q.shape[2])
        # so that the gradient of a row that sees nothing, which may be NaN, reaches nothing
        out = out.masked_fill(~seen.any(3, keepdim=True), 0.0)
        return out.transpose(1, 2).to(inputs.q.dtype)


def visible(inputs: AttentionInputs) -> torch.Tensor:
    """Returns which keys each query sees, bool [B, 1, Sq, Sk]."""
    return torch.from_numpy(inputs.parts.dense()).to(inputs.device)[:, None]


def heads(x: torch.Tensor, seen: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns keys or values [B, H, Sk, Dh] for each query head. Those that nobody sees may hold anything,
    NaN as well: 0 * NaN is NaN, so they become zero."""
    unseen = ~seen.any(2)[..., None]
    x = x.double().transpose(1, 2).masked_fill(unseen, 0.0)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def scores(inputs: AttentionInputs, seen: torch.Tensor) -> torch.Tensor:
    """Returns q k' * scale + bias in fp64, [B, H, Sq, Sk], of unseen pairs too; zero where nobody sees
    the key, or the query sees nothing, but for the bias."""
    q = inputs.q.double().transpose(1, 2).masked_fill(~seen.any(3, keepdim=True), 0.0)
    k = heads(inputs.k, seen, q.shape[1])
    found = q @ k.transpose(2, 3) * inputs.scale
    if inputs.bias is not None:
        found = found + inputs.bias.block(*inputs.positions).double()
    return found


def weights(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Returns the softmax of scores [B, H, Sq, Sk] over the keys that each query sees; a query that sees
    none has zeros."""
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores.masked_fill(~seen.any(3, keepdim=True), 0.0)  # a softmax of nothing is NaN
    return torch.softmax(scores, dim=3).masked_fill(~seen, 0.0)


KERNEL = Reference("reference")
