"""Cross-entropy at target rows, in chunks: never a full [targets, vocabulary] tensor.

Legend: R target rows, C rows of one chunk, D width, V vocabulary (padded to a multiple of 128).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megaarch.kernels.library import serves
from megaarch.kernels.softmax import less_target
from megaarch.model.product import product, turned_product

LOGITS_PER_CHUNK = 1 << 22
KEPT_BYTES = 128 << 20  # probabilities kept for the backward pass; chunks beyond are recomputed


class TargetLosses(NamedTuple):
    """What the model returns: one figure for each target slot, 0 in slots of zero weight.

    nll: fp32 [B, M], negative log-likelihood in nats.
    log_partition: fp32 [B, M], log of the softmax's denominator (for z-loss).
    text_nll: fp32 [B, M] without gradient, or None: nll with probabilities renormalized over the
        text tokens that were asked for. Meaningful where the target is one of them.
    """

    nll: torch.Tensor
    log_partition: torch.Tensor
    text_nll: torch.Tensor | None = None


class RowLosses(NamedTuple):
    """`TargetLosses` of R rows, each [R]."""

    nll: torch.Tensor
    log_partition: torch.Tensor
    text_nll: torch.Tensor | None


def head_logits(
    hidden: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, vocabulary_size: int
) -> torch.Tensor:
    """[..., V] in fp32 at least; ids of the vocabulary's padding have probability zero."""
    return finished(product(hidden, weight_VD.t()), bias_V, vocabulary_size)


def finished(
    logits: torch.Tensor, bias_V: torch.Tensor | None, vocabulary_size: int
) -> torch.Tensor:
    """A matrix product as logits: `head_logits`. In place where there is nothing to convert, add or
    differentiate."""
    logits = _wide(logits)
    if bias_V is not None:
        logits = logits + bias_V
    if logits.requires_grad:  # a product may be a view
        padding = logits.shape[-1] - vocabulary_size
        return F.pad(logits[..., :vocabulary_size], (0, padding), value=float("-inf"))
    logits[..., vocabulary_size:] = float("-inf")
    return logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, target_R, text_V, vocabulary_size, options):
        chunk_rows, dtype, keep = options
        cast_VD = weight_VD.to(dtype)
        columns, kept, kept_bytes = [], [], 0
        for hidden_CD, target_C in zip(
            hidden_RD.split(chunk_rows), target_R.split(chunk_rows), strict=True
        ):
            logits_CV = _logits(hidden_CD.to(dtype), cast_VD, bias_V, vocabulary_size)
            text_C = None
            if text_V is not None:
                text_C = _wide(logits_CV).masked_fill(~text_V, float("-inf")).logsumexp(-1)
            slope_CV, partition_C, target_logit_C = _less_target(logits_CV, target_C)
            if text_C is not None:
                text_C -= target_logit_C
            columns.append((partition_C - target_logit_C, partition_C, text_C))
            kept_bytes += slope_CV.nbytes
            if keep and kept_bytes <= KEPT_BYTES:
                kept.append(slope_CV)
        nll, partition, text = zip(*columns, strict=True)
        nll_R, partition_R = torch.cat(nll), torch.cat(partition)
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, target_R, *kept)
        ctx.vocabulary_size, ctx.chunk_rows, ctx.dtype = vocabulary_size, chunk_rows, dtype
        ctx.set_materialize_grads(False)
        if text_V is None:
            return nll_R, partition_R, None
        text_R = torch.cat(text)
        ctx.mark_non_differentiable(text_R)
        return nll_R, partition_R, text_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll_R, grad_partition_R, _):
        hidden_RD, weight_VD, bias_V, target_R, *kept = ctx.saved_tensors
        cast_VD = weight_VD.to(ctx.dtype)
        # Logits' gradient: slope · (grad_nll + grad_partition), and grad_partition at the target. The
        # factor of a row goes to the narrow side of each product.
        given = [grad for grad in (grad_nll_R, grad_partition_R) if grad is not None]
        factor_R = sum(given[1:], given[0])
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        for start in range(0, len(hidden_RD), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            hidden_CD = hidden_RD[chunk].to(ctx.dtype)
            if start // ctx.chunk_rows < len(kept):
                slope_CV = kept[start // ctx.chunk_rows]
            else:
                logits_CV = _logits(hidden_CD, cast_VD, bias_V, ctx.vocabulary_size)
                slope_CV, _, _ = _less_target(logits_CV, target_R[chunk])
            factor_C = factor_R[chunk, None]
            if (
                grad_partition_R is not None
            ):  # what is kept stays as it is, for another backward pass
                at_target = grad_partition_R[chunk, None]
                slope_CV = (slope_CV * factor_C).scatter_add_(1, target_R[chunk, None], at_target)
                factor_C = torch.ones_like(factor_C)
            if grad_bias_V is not None:
                grad_bias_V += torch.mv(slope_CV.t(), factor_C[:, 0])
            slope_CV = slope_CV.to(ctx.dtype)
            grad_hidden_RD[chunk] = product(slope_CV, cast_VD) * factor_C
            scaled_CD = (hidden_CD * factor_C).to(ctx.dtype)
            of_chunk = turned_product(slope_CV, scaled_CD).to(weight_VD.dtype)
            grad_weight_VD = of_chunk if grad_weight_VD is None else grad_weight_VD.add_(of_chunk)
        if grad_weight_VD is None:
            grad_weight_VD = torch.zeros_like(weight_VD)
        # torch's fused optimizers read a gradient as if it lay like its weight
        grad_weight_VD = grad_weight_VD.contiguous()
        return grad_hidden_RD, grad_weight_VD, grad_bias_V, None, None, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, known: int
) -> torch.Tensor:
    """`head_logits` for `_less_target`; in half precision where its kernel reads that, for then the
    slope is rounded once, as it would be for the products after it."""
    logits_CV = product(hidden_CD, weight_VD.t())
    if bias_V is not None or not serves(logits_CV):
        return finished(logits_CV, bias_V, known)
    logits_CV[:, known:] = float("-inf")
    return logits_CV


def _less_target(
    logits_CV: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slope of each row's negative log-likelihood: its softmax, less 1 at the target; and [C]
    log-sum-exp and target's logit. What `logits_CV` holds afterwards is undefined."""
    if logits_CV.is_contiguous() and serves(logits_CV):
        return logits_CV, *less_target(logits_CV, target_C)
    target_logit_C = logits_CV.gather(1, target_C[:, None])[:, 0]
    slope_CV = logits_CV.softmax(-1)
    # the most likely token's probability is at least 1/V: its logarithm loses nothing
    partition_C = logits_CV.amax(-1) - slope_CV.amax(-1).log()
    slope_CV.scatter_add_(1, target_C[:, None], slope_CV.new_full((len(slope_CV), 1), -1))
    return slope_CV, partition_C, target_logit_C


def cross_entropy(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_R: torch.Tensor,
    *,
    vocabulary_size: int,
    text_tokens: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> RowLosses:
    """The losses of R rows, differentiable in hidden, weight and bias with any upstream gradient.

    weight_VD, bias_V: the output layer; ids from `vocabulary_size` up to V are padding.
    target_R: int64, below `vocabulary_size`. text_tokens: bool [vocabulary_size], or None.
    chunk_rows: rows of logits that exist at a time; None: about `LOGITS_PER_CHUNK` figures.
    """
    device, dtype = hidden_RD.device.type, hidden_RD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if chunk_rows is None:
        chunk_rows = max(128, LOGITS_PER_CHUNK // weight_VD.shape[0] // 128 * 128)
    if text_tokens is not None:
        padding = weight_VD.shape[0] - len(text_tokens)
        text_tokens = F.pad(text_tokens, (0, padding), value=False)
    options = (chunk_rows, dtype, torch.is_grad_enabled())
    return RowLosses(
        *_ChunkedCrossEntropy.apply(
            hidden_RD, weight_VD, bias_V, target_R, text_tokens, vocabulary_size, options
        )
    )
