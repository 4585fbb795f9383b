"""Cross-entropy at target rows, in chunks: never a full [targets, vocabulary] tensor.

The vocabulary may be split over ranks. Then each rank holds the ids from `first` on, and the ranks
exchange three numbers a row in one collective: a log-sum-exp, the target's logit, and a log-sum-exp
over text tokens. Logits are never gathered.

One driver computes losses and gradients chunk by chunk; a `Slope` computes a chunk. Letters of
shapes: docs/shapes.md. v is V in one process.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed
from torch.autograd.function import once_differentiable

from megaarch.kernels.bindings import accumulator, serves
from megaarch.kernels.cross_entropy import gradient, less_target, log_sums
from megaarch.model.linear import linear, transposed_product


class Limits(NamedTuple):
    """logits: how many exist at a time. kept: bytes of slopes that are kept for the backward pass,
    which computes the other chunks again."""

    logits: int
    kept: int


CPU = Limits(1 << 22, 128 << 20)
ACCELERATOR = Limits(1 << 27, 2 << 30)
LEAST_ROWS = 128  # of a chunk


class Chunk(NamedTuple):
    """Logits of C target rows over the ids held here.

    logits_Cv: without the bias. target_C: int64, counted from the first id held here. text_v: bool, the
    text tokens, or None. known: how many of the ids are no padding.
    """

    logits_Cv: torch.Tensor
    bias_v: torch.Tensor | None
    target_C: torch.Tensor
    text_v: torch.Tensor | None
    known: int


# Returns the slope of each row's negative log-likelihood (its softmax over the ids held here, less
# 1 at the target) in the logits' dtype, and [L, C] in fp32 at least: log-sum-exp, the target's
# logit (-inf where another rank holds it), and the log-sum-exp over text tokens if asked for.
# It may overwrite the logits.
Slope = Callable[[Chunk], tuple[torch.Tensor, torch.Tensor]]


class TargetLosses(NamedTuple):
    """One number for each target slot, 0 in slots of zero weight.

    nll: fp32 [B, M], negative log-likelihood in nats.
    log_partition: fp32 [B, M], log of the softmax's denominator (for z-loss).
    text_nll: fp32 [B, M] without gradient, or None: nll with probabilities renormalized over the
        text tokens that were asked for. Meaningful where the target is one of them.

    `cross_entropy` returns them for R target rows, each [R].
    """

    nll: torch.Tensor
    log_partition: torch.Tensor
    text_nll: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TargetLosses":
        """Returns the losses with each tensor changed."""
        text_nll = None if self.text_nll is None else change(self.text_nll)
        return TargetLosses(change(self.nll), change(self.log_partition), text_nll)


def training_loss(
    losses: TargetLosses, target_weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weighted sum of the targets' negative log-likelihoods (nats), and what training
    minimizes: that sum plus `z_loss` times the weighted sum of squared log-partitions (PaLM,
    Chowdhery et al. 2022, section 5). Both are scalars; target_weights: [B, M]."""
    nll = (losses.nll * target_weights).sum()
    if not z_loss:
        return nll, nll
    return nll, nll + z_loss * (losses.log_partition.square() * target_weights).sum()


def cross_entropy(
    hidden_RD: torch.Tensor,
    weight_vD: torch.Tensor,
    bias_v: torch.Tensor | None,
    target_R: torch.Tensor,
    *,
    vocabulary_size: int,
    text_tokens: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    slope: Slope | None = None,
    first: int = 0,
    group: distributed.ProcessGroup | None = None,
) -> TargetLosses:
    """Returns the losses of R rows, differentiable in hidden, weight and bias with any upstream
    gradient. Products run in hidden's dtype; statistics, and the sum of the chunks' gradients of
    weight and bias, are fp32 at least.

    weight_vD, bias_v: the output layer's share of ids, from `first` on; ids from `vocabulary_size`
        on are padding. hidden and target are the same on every rank of `group`, and so is the result.
    target_R: int64, below `vocabulary_size`. text_tokens: bool [vocabulary_size], or None.
    chunk_rows: rows of logits that exist at a time; None: by the device's `Limits`.
    slope: what computes a chunk; None: the CPU's kernel where it serves, else torch.
    """
    ids, limits = len(weight_vD), limits_of(hidden_RD.device.type)
    if chunk_rows is None:
        chunk_rows = rows_of_chunk(limits, ids)
    if text_tokens is not None:
        padding = max(0, first + ids - len(text_tokens))
        text_tokens = F.pad(text_tokens, (0, padding), value=False)[first : first + ids]
    if slope is None:
        slope = torch_slope if group else cpu_slope
    known = min(max(vocabulary_size - first, 0), ids)
    kept = limits.kept if torch.is_grad_enabled() else 0
    options = (known, chunk_rows, kept, slope, group)
    return TargetLosses(
        *_ChunkedCrossEntropy.apply(
            hidden_RD, weight_vD, bias_v, target_R - first, text_tokens, options
        )
    )


def limits_of(device_type: str) -> Limits:
    """Returns the limits on devices of this type."""
    return CPU if device_type == "cpu" else ACCELERATOR


def rows_of_chunk(limits: Limits, ids: int) -> int:
    """Returns the rows of a chunk of logits over so many ids, a multiple of 128."""
    return max(LEAST_ROWS, limits.logits // ids // LEAST_ROWS * LEAST_ROWS)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_vD, bias_v, target_R, text_v, options):
        known, chunk_rows, kept_bytes, slope, group = options
        cast_vD = weight_vD.to(hidden_RD.dtype)
        found, kept = [], []
        for hidden_CD, target_C in zip(
            hidden_RD.split(chunk_rows), target_R.split(chunk_rows), strict=True
        ):
            logits_Cv = linear(hidden_CD, cast_vD)
            slope_Cv, sums_LC = slope(Chunk(logits_Cv, bias_v, target_C, text_v, known))
            found.append(sums_LC)
            kept_bytes -= slope_Cv.nbytes
            if kept_bytes >= 0:
                kept.append(slope_Cv)
        here_LR = torch.cat(found, 1)
        partition_R, target_logit_R, *text = _over_ranks(here_LR, group)
        share_R = None if group is None else (here_LR[0] - partition_R).exp()
        ctx.save_for_backward(hidden_RD, weight_vD, bias_v, target_R, share_R, *kept)
        ctx.options = options
        ctx.set_materialize_grads(False)
        nll_R = partition_R - target_logit_R
        if not text:
            return nll_R, partition_R.clone(), None
        text_R = text[0] - target_logit_R
        ctx.mark_non_differentiable(text_R)
        return nll_R, partition_R.clone(), text_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll_R, grad_partition_R, _):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        hidden_RD, weight_vD, bias_v, target_R, share_R, *kept = ctx.saved_tensors
        known, chunk_rows, _, slope, group = ctx.options
        cast_vD = weight_vD.to(hidden_RD.dtype)
        # Logits' gradient: softmax · (grad_nll + grad_partition), less grad_nll at the target. That
        # is slope · factor, plus `rest` at the target. A row's factor goes to the narrow side of
        # each product.
        given = [grad for grad in (grad_nll_R, grad_partition_R) if grad is not None]
        factor_R, rest_R = sum(given[1:], given[0]), grad_partition_R
        if share_R is not None:
            factor_R = factor_R * share_R
            rest_R = factor_R - (0 if grad_nll_R is None else grad_nll_R)
        wide = accumulator(hidden_RD.dtype)
        grad_hidden_RD, grad_weight_vD = torch.empty_like(hidden_RD), None
        grad_bias_v = None if bias_v is None else torch.zeros_like(bias_v, dtype=wide)
        for start in range(0, len(hidden_RD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_CD, factor_C1 = hidden_RD[rows], factor_R[rows, None]
            if start // chunk_rows < len(kept):
                slope_Cv = kept[start // chunk_rows]
            else:
                logits_Cv = linear(hidden_CD, cast_vD)
                slope_Cv, _ = slope(Chunk(logits_Cv, bias_v, target_R[rows], None, known))
            if grad_bias_v is not None:
                grad_bias_v += torch.mv(slope_Cv.t().to(wide), factor_C1[:, 0])
            slope_Cv = slope_Cv.to(hidden_RD.dtype)
            grad_hidden_RD[rows] = linear(slope_Cv, cast_vD.t()) * factor_C1
            of_chunk = transposed_product(slope_Cv, (hidden_CD * factor_C1).to(hidden_RD.dtype))
            grad_weight_vD = of_chunk if grad_weight_vD is None else grad_weight_vD.add_(of_chunk)
            del of_chunk  # a table in fp32, which the next chunk's product need not find
        if grad_weight_vD is None:
            grad_weight_vD = torch.zeros_like(weight_vD)
        if rest_R is not None:
            column_R, held_R = _columns(target_R, known)
            rest_R1 = rest_R.masked_fill(~held_R, 0)[:, None]
            grad_hidden_RD += (rest_R1 * cast_vD.index_select(0, column_R)).to(hidden_RD.dtype)
            of_rows = (rest_R1 * hidden_RD).to(grad_weight_vD.dtype)
            grad_weight_vD.index_add_(0, column_R, of_rows)
            if grad_bias_v is not None:
                grad_bias_v.index_add_(0, column_R, rest_R1[:, 0])
        if group is not None:
            distributed.all_reduce(grad_hidden_RD, group=group)
        # torch's fused optimizers read a gradient as if it lay like its weight
        of_weight = grad_weight_vD.to(weight_vD.dtype).contiguous()
        if bias_v is not None and grad_bias_v is not None:
            grad_bias_v = grad_bias_v.to(bias_v.dtype)
        return grad_hidden_RD, of_weight, grad_bias_v, None, None, None


def _over_ranks(here_LR: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Turns numbers [L, R], each the log of a sum over this rank's ids, into those of all ids."""
    if group is None:
        return here_LR
    every_LR = [torch.empty_like(here_LR) for _ in range(group.size())]
    distributed.all_gather(every_LR, here_LR, group=group)
    return torch.stack(every_LR).logsumexp(0)


def torch_slope(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Slope` by torch's operations. Compiled, it reads the logits and writes the slope once."""
    logits_Cv, bias_v, target_C, text_v, known = chunk
    wide_Cv = _wide(logits_Cv) if bias_v is None else _wide(logits_Cv) + bias_v
    wide_Cv[:, known:] = float("-inf")
    column_C, held_C = _columns(target_C, known)
    numbers = [wide_Cv.gather(1, column_C[:, None])[:, 0].masked_fill(~held_C, float("-inf"))]
    if text_v is not None:
        numbers.append(_log_sum(wide_Cv, text_v))
    if not known:  # all of this rank's ids are padding
        partition_C, slope_Cv = numbers[0], torch.zeros_like(wide_Cv)
    elif torch.compiler.is_compiling():
        partition_C = wide_Cv.logsumexp(-1)
        ids_v = torch.arange(wide_Cv.shape[1], device=wide_Cv.device)
        at_target_Cv = (ids_v == column_C[:, None]) & held_C[:, None]
        slope_Cv = (wide_Cv - partition_C[:, None]).exp() - at_target_Cv.to(wide_Cv.dtype)
    else:
        slope_Cv = wide_Cv.softmax(-1)
        # the most likely token's probability is at least 1/V: its logarithm loses nothing
        partition_C = wide_Cv.amax(-1) - slope_Cv.amax(-1).log()
        slope_Cv.scatter_add_(1, column_C[:, None], -held_C.to(slope_Cv.dtype)[:, None])
    return slope_Cv.to(logits_Cv.dtype), torch.stack([partition_C, *numbers])


def cpu_slope(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Slope` by the CPU's kernel (kernels/cross_entropy.py) where it serves, else `torch_slope`. All
    targets are held here."""
    logits_Cv, bias_v, target_C, text_v, known = chunk
    if not (logits_Cv.is_contiguous() and serves(logits_Cv)):
        return torch_slope(chunk)
    if bias_v is not None:
        logits_Cv = _wide(logits_Cv) + bias_v
    logits_Cv[:, known:] = float("-inf")
    text = [] if text_v is None else [_log_sum(_wide(logits_Cv), text_v)]
    return logits_Cv, torch.stack([*less_target(logits_Cv, target_C), *text])


def fused_slope(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Slope` by the fused kernels (kernels/cross_entropy.py): the gradient with both factors one."""
    sums_LC = log_sums(*chunk)
    ones_C = torch.ones_like(sums_LC[0])
    logits_Cv, bias_v, target_C, _, known = chunk
    slope_Cv = gradient(logits_Cv, bias_v, target_C, sums_LC[0], ones_C, ones_C, known)
    return slope_Cv, sums_LC


def _log_sum(logits_Cv: torch.Tensor, chosen_v: torch.Tensor) -> torch.Tensor:
    """Returns the log-sum-exp over the chosen ids, [C]."""
    return logits_Cv.masked_fill(~chosen_v, float("-inf")).logsumexp(-1)


def _columns(target_R: torch.Tensor, known: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the targets' columns, 0 where another rank has one; and whether they are held here."""
    held_R = (target_R >= 0) & (target_R < known)
    return target_R.masked_fill(~held_R, 0), held_R


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(accumulator(x.dtype))
