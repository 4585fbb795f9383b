"""Cross-entropy at target rows, in chunks: never a full [targets, vocabulary] tensor.

Legend: R target rows, C rows of one chunk, D width, V vocabulary (padded to a multiple of 128).
"""

from typing import NamedTuple

import torch

LOGITS_PER_CHUNK = 1 << 22
KEPT_BYTES = 128 << 20  # log-probabilities kept for the backward pass; chunks beyond are recomputed


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
    logits = (hidden @ weight_VD.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias_V is not None:
        logits += bias_V
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
            logits_CV = head_logits(hidden_CD.to(dtype), cast_VD, bias_V, vocabulary_size)
            log_p_CV = logits_CV.log_softmax(-1)
            nll_C = -log_p_CV.gather(1, target_C[:, None])[:, 0]
            partition_C = logits_CV.gather(1, target_C[:, None])[:, 0] + nll_C
            text_C = None
            if text_V is not None:
                text_C = nll_C + log_p_CV.masked_fill(~text_V, float("-inf")).logsumexp(-1)
            columns.append((nll_C, partition_C, text_C))
            kept_bytes += log_p_CV.nbytes
            if keep and kept_bytes <= KEPT_BYTES:
                kept.append(log_p_CV)
        nll, partition, text = zip(*columns, strict=True)
        nll_R, partition_R = torch.cat(nll), torch.cat(partition)
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, target_R, partition_R, *kept)
        ctx.vocabulary_size, ctx.chunk_rows, ctx.dtype = vocabulary_size, chunk_rows, dtype
        if text_V is None:
            return nll_R, partition_R, None
        text_R = torch.cat(text)
        ctx.mark_non_differentiable(text_R)
        return nll_R, partition_R, text_R

    @staticmethod
    def backward(ctx, grad_nll_R, grad_partition_R, _):
        hidden_RD, weight_VD, bias_V, target_R, partition_R, *kept = ctx.saved_tensors
        cast_VD = weight_VD.to(ctx.dtype)
        # Logits' gradient: softmax·(grad_nll + grad_partition), less grad_nll at the target.
        grad_softmax_R = grad_nll_R + grad_partition_R
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        for start in range(0, len(hidden_RD), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            hidden_CD = hidden_RD[chunk].to(ctx.dtype)
            if start // ctx.chunk_rows < len(kept):
                grad_CV = kept[start // ctx.chunk_rows].exp()
            else:
                logits_CV = head_logits(hidden_CD, cast_VD, bias_V, ctx.vocabulary_size)
                grad_CV = logits_CV.sub_(partition_R[chunk, None]).exp_()
            grad_CV *= grad_softmax_R[chunk, None]
            grad_CV.scatter_add_(1, target_R[chunk, None], -grad_nll_R[chunk, None])
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(ctx.dtype)
            grad_hidden_RD[chunk] = grad_CV @ cast_VD
            if grad_weight_VD.dtype == ctx.dtype:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD)
            else:
                grad_weight_VD += grad_CV.t() @ hidden_CD
        return grad_hidden_RD, grad_weight_VD, grad_bias_V, None, None, None, None


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
        text_tokens = torch.nn.functional.pad(text_tokens, (0, padding), value=False)
    options = (chunk_rows, dtype, torch.is_grad_enabled())
    return RowLosses(
        *_ChunkedCrossEntropy.apply(
            hidden_RD, weight_VD, bias_V, target_R, text_tokens, vocabulary_size, options
        )
    )
