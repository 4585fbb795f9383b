"""The oracle: dense attention in fp64, one softmax over the dense mask. Slow and obviously right.

Shape suffixes: B rows, S length (q queries, k keys), H heads, D head size.
"""

import torch

from megaarch.attention.bias import RelativeBias
from megaarch.attention.parts import Parts


def cannot_run(q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None) -> None:
    """It runs everything."""
    return None


def warm(parts: Parts, device_type: str) -> None:
    """It plans nothing."""


def attend(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    parts: Parts,
    scale: float,
    bias: RelativeBias | None = None,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k' * scale + bias) v over what the parts let each query see; see `attend.attend`."""
    seen = torch.from_numpy(parts.dense()).to(q_BSHD.device)[:, None]
    empty = ~seen.any(3, keepdim=True)
    # Rows that nobody sees may hold anything, NaN as well: 0 * NaN is NaN, so they become zero.
    q = q_BSHD.double().transpose(1, 2).masked_fill(empty, 0.0)
    unseen_keys = ~seen.any(2)[..., None]
    k, v = (x.double().transpose(1, 2).masked_fill(unseen_keys, 0.0) for x in (k_BSHD, v_BSHD))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))

    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.block(query_positions, key_positions).double()
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores.masked_fill(empty, 0.0)  # a softmax of nothing is NaN
    weights = torch.softmax(scores, dim=3).masked_fill(~seen, 0.0)
    return (weights @ v).masked_fill(empty, 0.0).transpose(1, 2).to(q_BSHD.dtype)
