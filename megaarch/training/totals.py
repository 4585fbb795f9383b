"""What the micro-batches of a step hold on all data ranks: the loss is divided by it, and budgets and
the learning rate count it."""

from dataclasses import dataclass

from megaarch.data.batch import Batch, Counts
from megaarch.distributed.mesh import DATA, Grid
from megaarch.training.readback import Readback, upload


@dataclass(frozen=True)
class Totals:
    """counts: of all micro-batches. weight: the sum of their targets' weights."""

    counts: Counts
    weight: float


class Sum:
    """The totals of a step whose micro-batches here are `batches`, added up by the data ranks, which
    make it together. Nothing waits before `read`."""

    def __init__(self, batches: list[Batch], grid: Grid):
        counts = sum((b.counts for b in batches[1:]), batches[0].counts)
        weight = float(sum(b.target_weights.sum() for b in batches))
        self._own, self._summed = Totals(counts, weight), None
        if grid.data_ranks > 1:
            figures = upload([weight, *_flat(counts)], grid.device)
            self._summed = Readback(grid.sum(figures, DATA))

    def read(self) -> Totals:
        """The totals, the same on every rank."""
        if self._summed is None:
            return self._own
        weight, *figures = self._summed.read()
        return Totals(_counts(figures, len(self._own.counts.tokens)), weight)


def _flat(counts: Counts) -> list[float]:
    return [
        counts.rows,
        counts.targets,
        *counts.tokens,
        *counts.areas,
        *counts.cross_areas,
        *counts.slots,
    ]


def _counts(figures: list[float], streams: int) -> Counts:
    rows, targets, *rest = (int(x) for x in figures)
    tokens, areas, cross, slots = (
        tuple(rest[i : i + streams]) for i in range(0, 4 * streams, streams)
    )
    return Counts(rows, tokens, areas, cross, targets, slots)
