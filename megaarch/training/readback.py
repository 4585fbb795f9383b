"""Figures on their way from the device to the host, which waits for them when they are asked for, and
not for what the device was given after them."""

from collections.abc import Sequence

import torch


class Readback:
    """figures: float64 [N], on any device; they are copied now, behind what makes them."""

    def __init__(self, figures: torch.Tensor):
        self._figures = figures.to("cpu", non_blocking=True)  # pinned, where it comes from a GPU
        self._arrived = None
        if figures.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The figures. Waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._figures.tolist()


def upload(figures: Sequence[float], device: torch.device) -> torch.Tensor:
    """Figures of the host as float64 [N] on a device, without waiting for it; whole numbers exactly,
    up to 2**53."""
    held = torch.tensor(figures, dtype=torch.float64)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)
