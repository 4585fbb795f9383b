"""The numbers of a step: what its micro-batches hold on all data ranks, and what it gave. They travel
between device and host without either waiting for the other before it must."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from megaarch.checkpoint.record import Progress
from megaarch.data.batch import Batch, Counts
from megaarch.distributed.mesh import DATA, Grid


class Readback:
    """Numbers on their way from the device to the host, which waits for them when they are asked for, and
    not for what the device was given after them.

    numbers: float64 [N], on any device; they are copied now, behind what makes them.
    """

    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers.to("cpu", non_blocking=True)  # pinned, where it comes from a GPU
        self._arrived = None
        if numbers.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Returns the numbers. Waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


def upload(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Returns numbers of the host as float64 [N] on a device, without waiting for it; whole numbers exactly,
    up to 2**53."""
    held = torch.tensor(numbers, dtype=torch.float64)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)


class PendingTotals:
    """What a step's micro-batches hold on all data ranks, which make it together from those that each has
    (`batches`). Nothing waits before `read`."""

    def __init__(self, batches: list[Batch], grid: Grid):
        counts = sum((b.counts for b in batches[1:]), batches[0].counts)
        weight = float(sum(b.target_weights.sum() for b in batches))
        self._own, self._summed = (counts, weight), None
        if grid.data_ranks > 1:
            numbers, self._form = tree_flatten((astuple(counts), weight))
            self._summed = Readback(grid.sum(upload(numbers, grid.device), DATA))

    def read(self) -> tuple[Counts, float]:
        """Returns the counts, by which budgets and the learning rate go, and the sum of the targets' weights,
        by which the loss is divided; the same on every rank."""
        if self._summed is None:
            return self._own
        counts, weight = tree_unflatten(self._summed.read(), self._form)
        return Counts(*tree_map(int, counts)), weight


@dataclass(frozen=True)
class Step:
    """What one step did. loss: nats a target. seconds: of this step, with the wait for its batches.
    rate: learning rate. utilization: of its GPUs (`utilization.of_step`)."""

    progress: Progress
    share: float
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    tokens: int
    utilization: dict[str, float]

    def line(self) -> dict[str, float]:
        """Returns its line of metrics."""
        progress = self.progress
        return {
            "step": progress.step,
            "share": self.share,
            "loss": self.loss,
            "learning_rate": self.rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens / self.seconds,
            **self.utilization,
            "flops": progress.flops,
            "palm_flops": progress.palm_flops,
            "seen_tokens": progress.seen_tokens,
            "target_tokens": progress.target_tokens,
            "seconds": progress.seconds,
            "skipped": progress.skipped,
        }


@dataclass(frozen=True)
class Launched:
    """A step whose numbers have not been read. progress: after it, without `seconds` and `skipped`
    of the steps that are not read. started: as `Trainer.train_step` says."""

    progress: Progress
    rate: float
    started: float
    numbers: Readback
