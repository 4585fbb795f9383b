"""The class of all kernels and the inputs that they get. dispatch.py lists the kernels and chooses one.

Letters of shapes: docs/shapes.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megaarch.attention.bias import RelativeBias, axis_0
from megaarch.attention.gather import Gather
from megaarch.attention.mask import Parts
from megaarch.attention.packages import Gpu, Package, describe
from megaarch.attention.plan import CallPlan

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of one `attend` (attend.py gives their shapes), `scale` being a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    parts: Parts
    scale: float = 1.0
    bias: RelativeBias | None = None
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None
    fused_rows: bool = False

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, Sq] and [B, Sk], of axis 0, in a call with a bias."""
        assert self.query_positions is not None and self.key_positions is not None
        return axis_0(self.query_positions), axis_0(self.key_positions)

    def zeros(self) -> torch.Tensor:
        """Returns the output of a batch in which nothing is seen: zero, with zero gradients for all
        inputs, whatever they hold."""
        tables = () if self.bias is None else (self.bias.table,)
        always = torch.ones((), dtype=torch.bool, device=self.device)
        out, *others = (x.masked_fill(always, 0) for x in (self.q, self.k, self.v, *tables))
        return out + sum(x.sum() for x in others)


@dataclass(frozen=True)
class Kernel(ABC):
    """One way to run parts.

    name: in `model.attention`.
    devices, dtypes, head_sizes (largest and divisor): those that it takes; None: all.
    refuses_bias: why it takes no bias; None: it takes one.
    package: the optional package that it calls.
    limit(gpu, head_size, parts): the first limit that its library documents and these break, as a
        sentence, or None. It asks no device: tests call it for GPUs that are not there. None: it documents
        none.
    tflops: its published speed, forward and backward, of causal rows of 8k tokens and head size 128;
        None: nobody has published one, and `auto` leaves the kernel alone.
    operators: matches the names of its GPU kernels.
    forward_operators: the torch operators that compute its results, which selective recomputation
        keeps (parallel/recompute.py); a library that registers no operator has none.
    """

    name: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_sizes: tuple[int, int] | None = None
    refuses_bias: str | None = "it takes no position bias"
    package: Package | None = None
    limit: Callable[[Gpu, int, Parts], str | None] | None = None
    tflops: tuple[float, float] | None = None
    operators: str | None = None
    forward_operators: tuple[str, ...] = ()

    @abstractmethod
    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns what `attend.attend` promises."""

    def cannot_run(self, inputs: AttentionInputs) -> str | None:
        """Returns the first reason not to run here, or None."""
        q, size = inputs.q, inputs.q.shape[-1]
        kind, dtype = q.device.type, self.compute_dtype(q)
        if self.devices and kind not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {kind}"
        if inputs.bias is not None and self.refuses_bias:
            return self.refuses_bias
        if self.dtypes and dtype not in self.dtypes:
            return f"it takes {' and '.join(map(str, self.dtypes))}, not {dtype}"
        if self.head_sizes:
            largest, divisor = self.head_sizes
            if size > largest or size % divisor:
                return f"its head sizes are multiples of {divisor} up to {largest}, not {size}"
        if reason := self.refuses(inputs):
            return reason
        if self.package and (reason := self.package.obstacle(q.device)):
            return reason
        if kind != "cuda" or self.limit is None:
            return None
        return self.limit(describe(q.device), size, inputs.parts)

    def compute_dtype(self, q: torch.Tensor) -> torch.dtype:
        """Returns the dtype that the library gets: autocast's where autocast would cast."""
        kind = q.device.type
        if q.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return q.dtype

    def refuses(self, inputs: AttentionInputs) -> str | None:
        """Returns a reason of its own not to run on these inputs, or None."""
        return None

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        """Plans on the host what a step would have to; here nothing."""
        return

    def cost(self, parts: Parts) -> tuple[int, int]:
        """Returns the (query, key) pairs that it computes and its calls, for `auto` on a GPU."""
        return parts.area(), 1

    def steady(self, parts: Parts) -> bool:
        """Returns whether these parts leave its library no plan to build in later batches. One that
        builds a plan for each exact shape of a call says for which parts shapes never change."""
        return True


@dataclass(frozen=True)
class CallsKernel(Kernel):
    """A kernel that runs parts as several calls of a library: rows are gathered into each call, and
    the results scattered to the rows of the output."""

    @abstractmethod
    def plan(self, parts: Parts) -> CallPlan:
        """Returns the calls of these parts, remembered on them."""

    @abstractmethod
    def on_device(self, inputs: AttentionInputs) -> Gather:
        """Returns the plan's calls on the inputs' device, and what moves rows there."""

    @abstractmethod
    def run_call(self, call: Any, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        """Returns the result of one call, in q's shape [G, Q, H, Dh]."""

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        self.plan(parts)

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns what `attend.attend` promises."""
        q, plan = inputs.q, self.plan(inputs.parts)
        if not plan.calls:
            return inputs.zeros()
        dtype, rows = self.compute_dtype(q), self.on_device(inputs)
        qkv = zip((q, inputs.k, inputs.v), "qkk", strict=True)
        gathered = [rows.gather(x.to(dtype), side) for x, side in qkv]
        with torch.autocast(q.device.type, enabled=False):
            results = [
                self.run_call(call, inputs, *rows_of_call)
                for call, *rows_of_call in zip(rows.calls, *gathered, strict=True)
            ]
        out = results[0] if plan.whole else rows.scatter(results, q.shape)
        return out.to(q.dtype)
