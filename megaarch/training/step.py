"""A step of a run: launched, and once its figures have been read."""

from dataclasses import dataclass
from typing import Any

from megaarch.training.progress import Progress
from megaarch.training.readback import Readback
from megaarch.training.totals import Totals


@dataclass(frozen=True)
class Step:
    """What one step did. loss: nats a target. seconds: of this step, with the wait for its batches.
    rate: learning rate."""

    progress: Progress
    share: float
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    tokens: int

    def line(self) -> dict[str, Any]:
        """What metrics hold of it."""
        progress = self.progress
        return {
            "step": progress.step,
            "share": self.share,
            "loss": self.loss,
            "learning_rate": self.rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens / self.seconds,
            "flops": progress.flops,
            "palm_flops": progress.palm_flops,
            "seen_tokens": progress.seen_tokens,
            "target_tokens": progress.target_tokens,
            "seconds": progress.seconds,
            "skipped": progress.skipped,
        }


@dataclass(frozen=True)
class Launched:
    """A step whose figures have not been read. progress: after it, without `seconds` and `skipped`
    of the steps that are not read. started: as `Trainer.launch` says."""

    progress: Progress
    totals: Totals
    rate: float
    started: float
    figures: Readback
