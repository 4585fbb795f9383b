"""The two ends of a model whose vocabulary is split over the tensor-parallel ranks.

Rank r of T holds ids r·V/T to (r+1)·V/T of the embedding and of the output layer. Looking up sums
over ranks, of which one has the token. The loss is model/loss.py's, which knows of the ranks.

Legend: B rows, S tokens, s = S / T of them, D width, V vocabulary, v = V / T ids held here,
R target rows.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Shard

from megaarch.model import loss
from megaarch.model.loss import RowLosses


def embed(tokens_BS: torch.Tensor, weight: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    """Returns [B, s, D]: this rank's share of the sequence, from all of its tokens.

    weight: [V, D], split by rows. torch's own rowwise embedding is right too, but its backward pass
    makes the gradient of the whole table on every rank before it takes a slice.
    """
    weight_vD = weight.to_local()
    local_BS = tokens_BS - mesh.get_local_rank() * len(weight_vD)
    outside_BS = (local_BS < 0) | (local_BS >= len(weight_vD))
    x_BSD = F.embedding(local_BS.masked_fill(outside_BS, 0), weight_vD)
    x_BSD = x_BSD.masked_fill(outside_BS[..., None], 0)
    x_BSD = DTensor.from_local(x_BSD, mesh, [Partial()], run_check=False)
    return x_BSD.redistribute(placements=[Shard(1)]).to_local()


def cross_entropy(
    hidden_RD: torch.Tensor,
    weight: DTensor,
    bias: DTensor | None,
    target_R: torch.Tensor,
    *,
    mesh: DeviceMesh,
    **options,
) -> RowLosses:
    """As `loss.cross_entropy`, for an output layer split by vocabulary: weight [V, D] and bias [V]
    are DTensors split by rows; all else is the same on every rank, and so is what it returns."""
    weight_vD = weight.to_local()
    return loss.cross_entropy(
        hidden_RD,
        weight_vD,
        None if bias is None else bias.to_local(),
        target_R,
        first=mesh.get_local_rank() * len(weight_vD),
        group=mesh.get_group(),
        **options,
    )
