"""The two ends of a model whose vocabulary is split over the tensor-parallel ranks.

Rank r of T holds ids r·V/T to (r+1)·V/T of the embedding and of the output layer. Looking up sums
over ranks, of which one has the token. The cross-entropy exchanges three figures a target row, in
one collective: a log-sum-exp, another over text tokens, the target's logit. Logits are never
gathered. What is done with a chunk of them is torch's or kernels/cross_entropy.py's.

Legend: B rows, S tokens, s = S / T of them, D width, V vocabulary, v = V / T ids held here,
R target rows, C rows of one chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Shard

from megaarch.kernels import cross_entropy as fused
from megaarch.model import loss
from megaarch.model.loss import RowLosses, finished
from megaarch.model.product import product


def embed(tokens_BS: torch.Tensor, weight: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    """[B, s, D]: this rank's share of the sequence, from all of its tokens.

    weight: [V, D], split by rows. torch's own rowwise embedding is right too, but its backward
    pass makes the gradient of the whole table on every rank before it takes a slice.
    """
    weight_vD = weight.to_local()
    local_BS = tokens_BS - mesh.get_local_rank() * len(weight_vD)
    outside_BS = (local_BS < 0) | (local_BS >= len(weight_vD))
    x_BSD = F.embedding(local_BS.masked_fill(outside_BS, 0), weight_vD)
    x_BSD = x_BSD.masked_fill(outside_BS[..., None], 0)
    x_BSD = DTensor.from_local(x_BSD, mesh, [Partial()], run_check=False)
    return x_BSD.redistribute(placements=[Shard(1)]).to_local()


@dataclass(frozen=True)
class CrossEntropy:
    """`loss.cross_entropy` for an output layer split by vocabulary: weight [V, D] and bias [V] are
    DTensors split by rows, all else is the same on every rank, and so is what it returns. Without a
    mesh they are plain tensors, all in one process. fused: by kernels/cross_entropy.py."""

    mesh: DeviceMesh | None = None
    fused: bool = False

    def __call__(
        self,
        hidden_RD: torch.Tensor,
        weight: DTensor,
        bias: DTensor | None,
        target_R: torch.Tensor,
        *,
        vocabulary_size: int,
        text_tokens: torch.Tensor | None = None,
        chunk_rows: int | None = None,
    ) -> RowLosses:
        weight_vD, bias_v, first, group = weight, bias, 0, None
        if self.mesh is not None:
            weight_vD, group = weight.to_local(), self.mesh.get_group()
            bias_v = None if bias is None else bias.to_local()
            first = self.mesh.get_local_rank() * len(weight_vD)
        device, dtype = hidden_RD.device.type, hidden_RD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        ids = len(weight_vD)
        if chunk_rows is None:
            chunk_rows = max(128, loss.LOGITS_PER_CHUNK // ids // 128 * 128)
        if text_tokens is not None:
            padding = weight.shape[0] - len(text_tokens)
            text_tokens = F.pad(text_tokens, (0, padding), value=False)[first : first + ids]
        known = min(max(vocabulary_size - first, 0), ids)  # the rest pads the vocabulary
        chunk = fused if self.fused else TorchChunk
        options = (known, chunk_rows, dtype, torch.is_grad_enabled(), group, chunk)
        return RowLosses(
            *_CrossEntropy.apply(
                hidden_RD, weight_vD, bias_v, target_R - first, text_tokens, options
            )
        )


class _CrossEntropy(torch.autograd.Function):
    """target_R counts from the first id held here; outside of 0..v another rank has the target."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_vD, bias_v, target_R, text_v, options):
        known, chunk_rows, dtype, keep, group, chunk = options
        cast_vD = weight_vD.to(dtype)
        figures, kept, kept_bytes = [], [], 0
        for hidden_CD, target_C in zip(
            hidden_RD.split(chunk_rows), target_R.split(chunk_rows), strict=True
        ):
            logits_Cv = product(hidden_CD.to(dtype), cast_vD.t())
            figures.append(chunk.figures(logits_Cv, bias_v, target_C, text_v, known))
            kept_bytes += logits_Cv.nbytes
            if keep and kept_bytes <= loss.KEPT_BYTES:
                kept.append(logits_Cv)
        partition_R, target_logit_R, *text = _of_ranks(torch.cat(figures, 1), group)
        ctx.save_for_backward(hidden_RD, weight_vD, bias_v, target_R, partition_R, *kept)
        ctx.options = options
        text_R = text[0] - target_logit_R if text else None
        if text:
            ctx.mark_non_differentiable(text_R)
        return partition_R - target_logit_R, partition_R, text_R

    @staticmethod
    def backward(ctx, grad_nll_R, grad_partition_R, _):
        hidden_RD, weight_vD, bias_v, target_R, partition_R, *kept = ctx.saved_tensors
        known, chunk_rows, dtype, _, group, chunk = ctx.options
        cast_vD = weight_vD.to(dtype)
        # Logits' gradient: softmax·(grad_nll + grad_partition), less grad_nll at the target.
        grad_softmax_R = grad_nll_R + grad_partition_R
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_vD = torch.zeros_like(weight_vD)
        grad_bias_v = None if bias_v is None else torch.zeros_like(bias_v)
        for start in range(0, len(hidden_RD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_CD = hidden_RD[rows].to(dtype)
            if start // chunk_rows < len(kept):
                logits_Cv = kept[start // chunk_rows]
            else:
                logits_Cv = product(hidden_CD, cast_vD.t())
            of_rows = (x[rows] for x in (target_R, partition_R, grad_softmax_R, grad_nll_R))
            grad_Cv = chunk.gradient(logits_Cv, bias_v, *of_rows, known)
            if grad_bias_v is not None:
                grad_bias_v += grad_Cv.sum(0, dtype=partition_R.dtype)
            grad_Cv = grad_Cv.to(dtype)
            grad_hidden_RD[rows] = product(grad_Cv, cast_vD)
            if grad_weight_vD.dtype == dtype:
                grad_weight_vD.addmm_(grad_Cv.t(), hidden_CD)
            else:
                grad_weight_vD += product(grad_Cv.t(), hidden_CD)
        if group is not None:
            distributed.all_reduce(grad_hidden_RD, group=group)
        return grad_hidden_RD, grad_weight_vD, grad_bias_v, None, None, None


def _of_ranks(ours_FR: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Figures [F, R], each the log of a rank's sum, as those of the sums over ranks."""
    if group is None:
        return ours_FR
    of_ranks = [torch.empty_like(ours_FR) for _ in range(group.size())]
    distributed.all_gather(of_ranks, ours_FR, group=group)
    return torch.stack(of_ranks).logsumexp(0)


class TorchChunk:
    """kernels/cross_entropy.py's functions by torch."""

    @staticmethod
    def figures(logits_Cv, bias_v, target_C, text_v, known) -> torch.Tensor:
        logits_Cv = finished(logits_Cv, bias_v, known)
        column_C, held_C = _columns(target_C, known)
        target_logit_C = logits_Cv.gather(1, column_C[:, None])[:, 0]
        found = [logits_Cv.logsumexp(-1), target_logit_C.masked_fill(~held_C, float("-inf"))]
        if text_v is not None:
            found.append(logits_Cv.masked_fill(~text_v, float("-inf")).logsumexp(-1))
        return torch.stack(found)

    @staticmethod
    def gradient(
        logits_Cv, bias_v, target_C, partition_C, grad_softmax_C, grad_nll_C, known
    ) -> torch.Tensor:
        grad_Cv = logits_Cv.to(partition_C.dtype)
        if bias_v is not None:
            grad_Cv = grad_Cv + bias_v
        grad_Cv = (grad_Cv - partition_C[:, None]).exp_()
        grad_Cv[:, known:] = 0
        grad_Cv *= grad_softmax_C[:, None]
        column_C, held_C = _columns(target_C, known)
        grad_target_C = torch.where(held_C, -grad_nll_C, 0)
        return grad_Cv.scatter_add_(1, column_C[:, None], grad_target_C[:, None])


def _columns(target_C: torch.Tensor, ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' columns, 0 where another rank has it; and whether they are held here."""
    held_C = (target_C >= 0) & (target_C < ids)
    return target_C.masked_fill(~held_C, 0), held_C
