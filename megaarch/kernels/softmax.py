"""A chunk of logits turned into the gradient of its cross-entropy, in one pass on a CPU."""

import torch

from megaarch.kernels.bindings import accumulator, call


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
