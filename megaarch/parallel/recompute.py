"""Activation checkpointing: a layer keeps its input, or little more, and its backward pass
computes the rest again (Chen et al. 2016; selective: Korthikanti et al. 2022).

No random state has to be restored: dropout is a function of the row and the step.
Selective mode sees only operators of torch: an attention kernel that is not one (flash4, cudnn_flex)
or a compiled region (flex) runs again in the backward pass. Where layers are compiled
(parallel/compile.py), attention is one operator whatever its kernel, and the checkpoint becomes part
of the layer's graph.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megaarch.attention import KERNELS
from megaarch.model import Transformer
from megaarch.model.layers import Context

ONEDNN = "mkldnn::_linear_pointwise"  # model/linear.py
ATTEND = "megaarch::attend"  # attention/torch_operator.py
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", ONEDNN)
# What follows a row-wise product, and the exchanges of heads around attention. Gathers are small
# before and large behind: they are sent again.
MESSAGES = ("_c10d_functional::reduce_scatter_tensor", "_c10d_functional::all_to_all_single")
# The operators that cost the most to compute again: attention's kernels, the products of linear
# layers, messages. The project's fused kernels (kernels/) are not among them: they only move memory.


def apply(model: Transformer, mode: str) -> None:
    """Makes every layer of `model` recompute: mode is `parallel.recompute`. Names do not change.

    Apply it after the tensor and context plans and before sharding.
    """
    if mode == "none":
        return
    whole = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    policy = _keep_costly if mode == "selective" else _keep_none
    chosen = partial(whole, context_fn=partial(create_selective_checkpoint_contexts, policy))
    for layer in model.layers.values():
        layer.forward = _recomputed(whole if mode == "full" else chosen, chosen, layer.forward)


def _recomputed(eager: Callable, compiled: Callable, forward: Callable) -> Callable:
    """Returns a layer's `forward` under a checkpoint. Compiled, it takes a policy: without one torch
    2.11 keeps all that an autograd function computes. The context is enclosed, not an argument: the
    compiler would take an argument apart down to the plans of the parts, and guard what it found."""

    def run(x_BSD: torch.Tensor, context: Context, *others: torch.Tensor | None) -> torch.Tensor:
        again = compiled if torch.compiler.is_compiling() else eager
        return again(lambda x, *others: forward(x, context, *others), x_BSD, *others)

    return run


@cache
def kept() -> frozenset[str]:
    """Names of the operators. At import a plugin's kernels are not there yet."""
    kernels = (kernel.forward_operators for kernel in KERNELS.values())
    return frozenset((*PRODUCTS, *MESSAGES, ATTEND)).union(*kernels)


def _keep_costly(_, operator, *args, **kwargs) -> CheckpointPolicy:
    costly = operator.name() in kept()
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_none(*args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE
