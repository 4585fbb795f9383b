"""cuDNN frontend's flex attention (experimental, Hopper and later): for each query row a union of
key intervals, of which parts need one.

One call runs every mask on the tensors as they are: nothing is gathered, cut or computed twice.
Its mask plan is made on the device once a batch, and serves all layers and the backward. It cannot
be made before the step: the library sizes it by counts that it reads back, so each batch's first call
waits for the device once.

Letters of shapes: docs/shapes.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from megaarch.attention.kernel_interface import HALF, AttentionInputs
from megaarch.attention.key_intervals import IntervalKernel, intervals, tensors
from megaarch.attention.mask import Parts
from megaarch.attention.packages import Gpu, Package

LIBRARY = Package(
    "nvidia-cudnn-frontend",
    "pip install nvidia-cudnn-frontend nvidia-cutlass-dsl",
    "cudnn.flex_attention",
    "flex_attn_func",
)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))


def limit(gpu: Gpu, head_size: int, parts: Parts) -> str | None:
    """The limit of cudnn-frontend 1.32 (flex_attention/runtime/arch.py), which is deterministic when
    asked to be."""
    if gpu.capability not in CAPABILITIES:
        return "it is built for compute capabilities 9.0, 10.0 and 10.3, not {}.{}".format(
            *gpu.capability
        )
    return None


@dataclass(frozen=True, kw_only=True)
class CudnnFlex(IntervalKernel):
    """plans: the function that makes a mask plan."""

    plans: Package

    def run(self, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        assert self.package

        def plan() -> Any:
            rows = endpoints(inputs.parts, q.device)
            return self.plans.load()(rows, q, k, v, build_backward=True)

        key = ("cudnn_flex", q.device, q.dtype, q.shape, k.shape)
        return self.package.load()(
            q,
            k,
            v,
            mask_plan=intervals(inputs.parts).once(key, plan),
            softmax_scale=inputs.scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def endpoints(parts: Parts, device: torch.device) -> torch.Tensor:
    """Returns int32 [1, 3, B·Sq]: each row sees keys [0, F0) and [F1, F2), F0 being 0."""
    rows = tensors(intervals(parts), device)
    first, last = rows.first.flatten(), rows.last.flatten()
    return torch.stack((torch.zeros_like(first), first, last))[None]


KERNEL = CudnnFlex(
    "cudnn_flex",
    package=LIBRARY,
    plans=replace(LIBRARY, attribute="create_mask_plan"),
    devices=("cuda",),
    dtypes=HALF,
    head_sizes=(128, 8),
    limit=limit,
    operators="flex|flash|attention|cutlass",
)
