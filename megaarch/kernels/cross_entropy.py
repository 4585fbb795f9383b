"""The cross-entropy of a chunk of logits: one pass for its figures, one for its gradient.

Logits stay in the dtype of their matrix product; nothing wider of their size exists.

Letters of shapes: docs/shapes.md.
"""

import torch

from megaarch.kernels.library import accumulator, call


@torch.library.custom_op("megaarch::cross_entropy_figures", mutates_args=())
def figures(
    logits_Cv: torch.Tensor,
    bias_v: torch.Tensor | None,
    target_C: torch.Tensor,
    text_v: torch.Tensor | None,
    known: int,
) -> torch.Tensor:
    """fp32 [2, C], or [3, C] with text: the log-sum-exp, the target's logit (-inf where another
    rank holds it), the log-sum-exp over text tokens.

    target: int64, counted from the first id held here. text: bool. known: ids that are not padding.
    """
    logits_Cv, (rows, columns) = logits_Cv.contiguous(), logits_Cv.shape
    out, bias_v = (
        _figures_shape(logits_Cv, bias_v, target_C, text_v, known),
        _wide(bias_v, logits_Cv.dtype),
    )
    figures = (out, rows, columns, known, logits_Cv.dtype)
    call("cross_entropy_forward", out.device, logits_Cv, bias_v, target_C, text_v, *figures)
    return out


@figures.register_fake
def _figures_shape(logits_Cv, bias_v, target_C, text_v, known):
    count = 2 if text_v is None else 3
    return logits_Cv.new_empty((count, len(logits_Cv)), dtype=accumulator(logits_Cv.dtype))


@torch.library.custom_op("megaarch::cross_entropy_gradient", mutates_args=())
def gradient(
    logits_Cv: torch.Tensor,
    bias_v: torch.Tensor | None,
    target_C: torch.Tensor,
    partition_C: torch.Tensor,
    grad_softmax_C: torch.Tensor,
    grad_nll_C: torch.Tensor,
    known: int,
) -> torch.Tensor:
    """The logits' gradient [C, v] in their dtype: softmax times grad_softmax, less grad_nll at the
    target. partition: the log-sum-exp over all ranks."""
    logits_Cv, (rows, columns) = logits_Cv.contiguous(), logits_Cv.shape
    out, bias_v = torch.empty_like(logits_Cv), _wide(bias_v, logits_Cv.dtype)
    of_rows = (x.contiguous() for x in (target_C, partition_C, grad_softmax_C, grad_nll_C))
    figures = (out, rows, columns, known, logits_Cv.dtype)
    call("cross_entropy_backward", out.device, logits_Cv, bias_v, *of_rows, *figures)
    return out


@gradient.register_fake
def _gradient_shape(logits_Cv, *_):
    return torch.empty_like(logits_Cv, memory_format=torch.contiguous_format)


def slope(
    logits_Cv: torch.Tensor,
    bias_v: torch.Tensor | None,
    target_C: torch.Tensor,
    text_v: torch.Tensor | None,
    known: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Slope` of model/loss.py: the gradient with both factors one, over the ids held here."""
    sums_LC = figures(logits_Cv, bias_v, target_C, text_v, known)
    ones_C = torch.ones_like(sums_LC[0])
    slope_Cv = gradient(logits_Cv, bias_v, target_C, sums_LC[0], ones_C, ones_C, known)
    return slope_Cv, sums_LC


def _wide(bias_v: torch.Tensor | None, logits: torch.dtype) -> torch.Tensor | None:
    return None if bias_v is None else bias_v.to(accumulator(logits)).contiguous()
