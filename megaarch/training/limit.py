"""What a run may spend, held against how far it has come."""

from dataclasses import dataclass

from megaarch.checkpoint.record import Progress
from megaarch.config.schema import Training
from megaarch.errors import UserError


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
