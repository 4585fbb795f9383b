"""Kernels that run parts as several calls of a library: rows are gathered into each call, and the
results scattered to the rows of the output."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from megaarch.attention.gather import Gather
from megaarch.attention.kernel import AttentionInputs, Kernel, compute_dtype
from megaarch.attention.parts import Parts
from megaarch.attention.plan import CallPlan


@dataclass(frozen=True)
class CallsKernel(Kernel):
    @abstractmethod
    def plan(self, parts: Parts, device_type: str) -> CallPlan:
        """Returns the calls of these parts, remembered on them."""

    @abstractmethod
    def on_device(self, inputs: AttentionInputs) -> Gather:
        """Returns the plan's calls on the inputs' device, and what moves rows there."""

    @abstractmethod
    def run_call(
        self, call: Any, inputs: AttentionInputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Returns the result of one call, in q's shape [G, Q, H, Dh]."""

    def compute_dtype(self, q: torch.Tensor) -> torch.dtype:
        return compute_dtype(q)

    def warm(self, parts: Parts, device_type: str, fused_rows: bool = False) -> None:
        self.plan(parts, device_type)

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns what `attend.attend` promises."""
        q, device = inputs.q, inputs.device
        plan = self.plan(inputs.parts, device.type)
        if not plan.calls:
            return inputs.zeros()
        dtype, rows = self.compute_dtype(q), self.on_device(inputs)
        qkv = zip((q, inputs.k, inputs.v), "qkk", strict=True)
        gathered = [rows.gather(x.to(dtype), side) for x, side in qkv]
        with torch.autocast(device.type, enabled=False):
            results = [
                self.run_call(call, inputs, *rows_of_call)
                for call, *rows_of_call in zip(rows.calls, *gathered, strict=True)
            ]
        out = results[0] if plan.whole else rows.scatter(results, q.shape)
        return out.to(q.dtype)
