"""The FLOPs of a batch, or of a row before there is data."""

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.model import flops
from megaarch.study.describe import describe


def count_flops(settings: Settings, batch: Batch | None = None) -> float:
    """Returns the exact training FLOPs of `batch` or, without one, those of a row, as a mean over
    rows of made-up text (exact where the objective's lengths are fixed)."""
    if batch is not None:
        return flops.training(settings.model, batch.counts)
    return describe(settings, "").flops_per_row
