"""Plans, which a kernel derives from parts: made on the host, pinned with their batch, copied to a
device once."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Plan:
    """on_device: what was derived from the plan on devices; never pickled."""

    def __post_init__(self):
        self.on_device: dict[Any, Any]
        object.__setattr__(self, "on_device", {})

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


def to_device(plan: Any, device: torch.device) -> Any:
    """Returns a plan with its arrays as tensors, without waiting for the device."""

    def moved(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cpu":
            return tensor
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return _each_array(plan, moved)


def pinned(plan: Any) -> Any:
    """Returns a plan with its arrays in pinned memory, so that `to_device` has nothing left to do in
    the step but a copy that runs on its own."""
    return _each_array(plan, lambda array: torch.from_numpy(array).pin_memory().numpy())


def _each_array(plan: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """Returns a plan, which is made of dataclasses, tuples and dicts, with each of its arrays changed."""
    if isinstance(plan, np.ndarray):
        return change(plan)
    if isinstance(plan, dict):
        return {key: _each_array(x, change) for key, x in plan.items()}
    if isinstance(plan, tuple):
        return tuple(_each_array(x, change) for x in plan)
    if is_dataclass(plan) and not isinstance(plan, type):
        found = {f.name: _each_array(getattr(plan, f.name), change) for f in fields(plan)}
        return replace(plan, **found)
    return plan
