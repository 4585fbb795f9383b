"""The cross-entropy of a chunk of logits: one pass for its log-sums, one for its gradient; on a CPU, unasked, one
pass for both (`less_target`).

Logits stay in the dtype of their matrix product; nothing wider of their size exists.

Letters of shapes: docs/shapes.md.
"""

import torch

from megaarch.kernels.bindings import accumulator, call, operator


def _log_sums(logits_Cv, bias_v, target_C, text_v, known):
    count = 2 if text_v is None else 3
    return logits_Cv.new_empty((count, len(logits_Cv)), dtype=accumulator(logits_Cv.dtype))


@operator("cross_entropy_log_sums", _log_sums)
def log_sums(
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
    logits_Cv, out = logits_Cv.contiguous(), _log_sums(logits_Cv, bias_v, target_C, text_v, known)
    given = (logits_Cv, _wide(bias_v, out.dtype), target_C, text_v, out)
    call("cross_entropy_forward", out.device, *given, *logits_Cv.shape, known, logits_Cv.dtype)
    return out


def _gradient(logits_Cv, *_):
    return torch.empty_like(logits_Cv, memory_format=torch.contiguous_format)


@operator("cross_entropy_gradient", _gradient)
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
    logits_Cv, out = logits_Cv.contiguous(), _gradient(logits_Cv)
    rows = (x.contiguous() for x in (target_C, partition_C, grad_softmax_C, grad_nll_C))
    given = (logits_Cv, _wide(bias_v, accumulator(out.dtype)), *rows, out)
    call("cross_entropy_backward", out.device, *given, *logits_Cv.shape, known, logits_Cv.dtype)
    return out


def _wide(bias_v: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias_v is None else bias_v.to(dtype).contiguous()


def less_target(
    logits_CV: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-sum-exp and the target's logit of each row, [C], of fp32 at least. `logits_CV`,
    contiguous, becomes in place the softmax, less 1 at the target."""
    wide = accumulator(logits_CV.dtype)
    partition_C, target_logit_C = logits_CV.new_empty(2, len(logits_CV), dtype=wide).unbind(0)
    out = (partition_C, target_logit_C, *logits_CV.shape, logits_CV.dtype)
    call("softmax_less_target", logits_CV.device, logits_CV, target_C.contiguous(), *out)
    return partition_C, target_logit_C
