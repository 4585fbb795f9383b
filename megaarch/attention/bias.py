"""Position-based attention biases: a small table and a rule, never a dense [S, S] tensor.

Letters of shapes: docs/shapes.md. G is the batch's rows, or those of a call.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from megaarch.config.validate import bucket_fault
from megaarch.errors import UserError

CHUNK = 1 << 26  # elements of one-hot buckets that lie in memory at a time


def relative_bucket(
    distance: torch.Tensor, bidirectional: bool, buckets: int, max_distance: int
) -> torch.Tensor:
    """Returns T5's bucket of each `distance` (key position - query position), int64, same shape.

    The first half of the buckets holds one distance each; the second half grows
    logarithmically up to `max_distance`, and everything farther shares the last. Bidirectional
    halves the buckets between keys behind and keys ahead; otherwise keys ahead count as distance
    0. (Raffel et al. 2020, section 2.1.)
    """
    ahead = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        ahead = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # fp32, and in this order, so that boundaries round as in the published models.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    grown = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(distance < exact, distance, grown)


def axis_0(positions: torch.Tensor) -> torch.Tensor:
    """Returns positions [G, S] of those, or axis 0 of [G, S, A]."""
    return positions[..., 0] if positions.ndim == 3 else positions


@dataclass(frozen=True)
class RelativeBias:
    """T5's relative attention bias (Raffel et al. 2020, section 2.1).

    table: [buckets, H], one learned scalar for each bucket and query head; differentiable.
    bidirectional: whether keys ahead of the query have buckets of their own, else that of distance 0
        (megaarch/config/catalogue.py says which stream has which).
    max_distance: tokens; farther keys share one bucket.

    Raises UserError where the buckets leave no room for the logarithmic half.
    """

    table: torch.Tensor
    bidirectional: bool
    max_distance: int = 128

    def __post_init__(self):
        if fault := bucket_fault(self.table.shape[0], self.bidirectional, self.max_distance):
            raise UserError(fault)

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    def bucket_by_distance(self) -> torch.Tensor:
        """Returns the buckets of distances -max_distance to max_distance (key position - query position),
        int64 [2 * max_distance + 1]. Farther distances have the buckets of the two ends."""
        reach, buckets = self.max_distance, self.table.shape[0]
        distance = torch.arange(-reach, reach + 1, device=self.table.device)
        return relative_bucket(distance, self.bidirectional, buckets, reach)

    def block(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns the dense bias [G, H, Q, K] of queries and keys at these integer positions.

        Positions are [G, Q] and [G, K]; of [G, Q, A] and [G, K, A], axis 0 is used.
        """
        distance_GQK = axis_0(keys)[:, None, :] - axis_0(queries)[:, :, None]
        reach = self.max_distance
        bucket_GQK = self.bucket_by_distance()[distance_GQK.clamp(-reach, reach) + reach]
        return _Lookup.apply(self.table, bucket_GQK)


class _Lookup(torch.autograd.Function):
    """The table's rows [buckets, H] at bucket_GQK, as [G, H, Q, K]."""

    @staticmethod
    def forward(ctx, table, bucket_GQK):
        ctx.save_for_backward(bucket_GQK)
        ctx.buckets, heads = table.shape
        groups, *shape = bucket_GQK.shape
        bias = table.new_empty(groups, heads, *shape)
        # Along the buckets: the fastest of the gathers on a CPU.
        for out_HQK, bucket_QK in zip(bias, bucket_GQK, strict=True):
            torch.index_select(table.t(), 1, bucket_QK.flatten(), out=out_HQK.flatten(1))
        return bias

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_GHQK):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        (bucket_GQK,) = ctx.saved_tensors
        total = add_up if grad_GHQK.device.type == "cpu" else multiply_out
        return total(grad_GHQK.flatten(2), bucket_GQK.flatten(1), ctx.buckets).t(), None


def add_up(grad_GHN: torch.Tensor, bucket_GN: torch.Tensor, buckets: int) -> torch.Tensor:
    """Returns the sums of a gradient by bucket, [H, buckets]: the fastest on a CPU."""
    total = grad_GHN.new_zeros(grad_GHN.shape[1], buckets)
    for grad_HN, bucket_N in zip(grad_GHN, bucket_GN, strict=True):
        total.index_add_(1, bucket_N, grad_HN)
    return total


def multiply_out(grad_GHN: torch.Tensor, bucket_GN: torch.Tensor, buckets: int) -> torch.Tensor:
    """Returns the same by products with one-hot buckets, of CHUNK elements each, in fp32 at least.

    For a GPU, where adding up means atomics: half a billion of them to 512 addresses in T5. It is
    deterministic.
    """
    dtype = torch.promote_types(grad_GHN.dtype, torch.float32)
    total = grad_GHN.new_zeros(grad_GHN.shape[1], buckets, dtype=dtype)
    every, step = torch.arange(buckets, device=bucket_GN.device), max(CHUNK // buckets, 1)
    for grad_HN, bucket_N in zip(grad_GHN, bucket_GN, strict=True):
        for grad, bucket in zip(grad_HN.split(step, 1), bucket_N.split(step), strict=True):
            total.addmm_(grad.to(dtype), (bucket[:, None] == every).to(dtype))
    return total.to(grad_GHN.dtype)
