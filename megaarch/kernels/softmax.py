"""A chunk of logits turned into the gradient of its cross-entropy, in one pass on a CPU."""

import torch

from megaarch.kernels.library import call


def less_target(
    logits_CV: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log-sum-exp and target's logit of each row, [C]. `logits_CV`, contiguous, fp32 or fp64, becomes
    in place the softmax, less 1 at the target."""
    partition_C, target_logit_C = logits_CV.new_empty(2, len(logits_CV)).unbind(0)
    out = (partition_C, target_logit_C, *logits_CV.shape, logits_CV.dtype)
    call("softmax_less_target", logits_CV.device, logits_CV, target_C.contiguous(), *out)
    return partition_C, target_logit_C
