"""The state of a run beside its model: how far it has come, and what it may spend."""

from dataclasses import dataclass, fields

from megaarch.checkpoint.record import SavedTotals
from megaarch.config.schema import Training
from megaarch.data.batch import Counts
from megaarch.errors import UserError


@dataclass(frozen=True)
class Progress:
    """Running totals of a run, saved with each checkpoint. The loader's position is `step`.

    flops: exact training FLOPs. palm_flops: the same by PaLM's convention. seen_tokens: tokens
    that passed through the model, padding left out. target_tokens: targets of non-zero weight.
    slots: tokens with padding. seconds: wall time of the steps and of waiting for their batches;
    evaluation and checkpoints are left out.
    skipped: steps whose loss or gradient was not finite.
    """

    step: int = 0
    flops: int = 0
    palm_flops: float = 0.0
    seen_tokens: int = 0
    target_tokens: int = 0
    slots: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def after(self, counts: Counts, *, flops: int, palm_flops: float) -> "Progress":
        """Returns the totals behind one step more; how it went (`seconds`, `skipped`) is not in them."""
        return Progress(
            self.step + 1,
            self.flops + flops,
            self.palm_flops + palm_flops,
            self.seen_tokens + sum(counts.tokens),
            self.target_tokens + counts.targets,
            self.slots + sum(counts.slots),
            self.seconds,
            self.skipped,
        )

    def since(self, begin: "Progress") -> "Progress":
        """What was added to the totals `begin`."""
        return Progress(*(getattr(self, f.name) - getattr(begin, f.name) for f in fields(self)))

    @classmethod
    def of(cls, saved: SavedTotals) -> "Progress":
        """Returns the totals that a checkpoint's record holds."""
        return cls(**{f.name: getattr(saved, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Limit:
    """What ends a run: an amount of `step`, `flops`, `seen_tokens` or `target_tokens`."""

    kind: str
    amount: float

    @classmethod
    def of(cls, training: Training) -> "Limit":
        """From the settings. UserError where neither steps nor a budget is given."""
        if training.steps is not None:
            return cls("step", training.steps)
        if training.budget is not None:
            return cls(training.budget.match, training.budget.amount)
        raise UserError("training.steps: give the number of steps, or training.budget")

    def __str__(self) -> str:
        if self.kind == "step":
            return f"{self.amount:,.0f} steps"
        return f"{self.amount:.4g} {self.kind.replace('_', ' ').replace('flops', 'FLOPs')}"

    def share(self, progress: Progress, more: int = 0) -> float:
        """Share of the limit that is spent, 0 to 1; after `more` steps of the mean cost so far."""
        spent = getattr(progress, self.kind)
        if more:
            spent = spent * (progress.step + more) / progress.step
        return min(spent / self.amount, 1.0)

    def reached(self, progress: Progress) -> bool:
        """Whether another step of the mean cost so far would end further from the limit."""
        if progress.step == 0:
            return False
        spent = getattr(progress, self.kind)
        return self.amount - spent < 0.5 * spent / progress.step
