"""Plans, which a kernel derives from parts: made on the host, pinned with their batch, copied to a
device once."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """on_device: what was derived from the plan on devices; never pickled."""

    on_device: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"on_device": {}}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns `make()` of the first call with this key, which names the device."""
        if key not in self.on_device:
            self.on_device[key] = make()
        return self.on_device[key]


@dataclass(frozen=True)
class CallPlan(Plan):
    """The calls of a batch. whole: there is one, and its result is the output as it stands."""

    calls: tuple[Any, ...]
    whole: bool


def to_device(x: Any, device: torch.device) -> Any:
    """Returns an array as a tensor, without waiting for the device, and anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    tensor = torch.from_numpy(x)
    if device.type == "cpu":
        return tensor
    tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pinned(plan: Any) -> Any:
    """Returns a plan with its arrays in pinned memory, so that `to_device` has nothing left to do in
    the step but a copy that runs on its own. A plan is made of dataclasses, tuples and dicts."""
    if isinstance(plan, np.ndarray):
        return torch.from_numpy(plan).pin_memory().numpy()
    if isinstance(plan, dict):
        return {key: pinned(x) for key, x in plan.items()}
    if isinstance(plan, tuple):
        return tuple(map(pinned, plan))
    if is_dataclass(plan) and not isinstance(plan, type):
        return replace(plan, **{f.name: pinned(getattr(plan, f.name)) for f in fields(plan)})
    return plan
