"""The oracle: dense attention in fp64, one softmax over the dense mask. Slow and obviously right.

Letters of shapes: docs/shapes.md.
"""

from dataclasses import dataclass

import torch

from megaarch.attention.kernel import AttentionInputs, Kernel


@dataclass(frozen=True)
class Reference(Kernel):
    """Runs everything."""

    refuses_bias: str | None = None

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns softmax(q k' * scale + bias) v over what the parts let each query see."""
        seen = torch.from_numpy(inputs.parts.dense()).to(inputs.device)[:, None]
        empty = ~seen.any(3, keepdim=True)
        # Rows that nobody sees may hold anything, NaN as well: 0 * NaN is NaN, so they become zero.
        q = inputs.q.double().transpose(1, 2).masked_fill(empty, 0.0)
        unseen = ~seen.any(2)[..., None]
        k, v = (x.double().transpose(1, 2).masked_fill(unseen, 0.0) for x in (inputs.k, inputs.v))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))

        scores = q @ k.transpose(2, 3) * inputs.scale
        if inputs.bias is not None:
            scores = scores + inputs.bias.block(*inputs.positions).double()
        scores = scores.masked_fill(~seen, float("-inf"))
        scores = scores.masked_fill(empty, 0.0)  # a softmax of nothing is NaN
        weights = torch.softmax(scores, dim=3).masked_fill(~seen, 0.0)
        return (weights @ v).masked_fill(empty, 0.0).transpose(1, 2).to(inputs.q.dtype)


KERNEL = Reference("reference")
