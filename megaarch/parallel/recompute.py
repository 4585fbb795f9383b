"""Activation checkpointing: a layer keeps its input, or little more, and its backward pass
computes the rest again (Chen et al. 2016; selective: Korthikanti et al. 2022).

Nothing has to be restored: dropout is a function of the row and the step, not of random state.
"""

from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megaarch.model import Transformer

# What costs the most to compute again: attention's kernels and the products of linear layers.
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def apply(model: Transformer, mode: str) -> None:
    """Lets every layer of `model` recompute: mode is `parallel.recompute`. Names do not change.

    Apply it after the tensor and context plans and ahead of sharding.
    """
    if mode == "none":
        return
    assert mode in ("selective", "full"), mode
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    for layer in model.layers.values():
        layer.forward = partial(again, layer.forward)


def _policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
