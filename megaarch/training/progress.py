"""How far a run has come, what it may spend, and the learning rate that follows from the two."""

import math
from dataclasses import dataclass, fields

from megaarch.config.schema import Training
from megaarch.data.batch import Counts
from megaarch.errors import UserError
from megaarch.training.record import SavedTotals


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

    def after(
        self, counts: Counts, *, flops: int, palm_flops: float, seconds: float, skipped: bool
    ) -> "Progress":
        """The totals one step later."""
        return Progress(
            self.step + 1,
            self.flops + flops,
            self.palm_flops + palm_flops,
            self.seen_tokens + sum(counts.tokens),
            self.target_tokens + counts.targets,
            self.slots + sum(counts.slots),
            self.seconds + seconds,
            self.skipped + skipped,
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
        """From the settings. ValueError where neither steps nor a budget is given."""
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


def learning_rate(training: Training, step: int, share: float) -> float:
    """The rate of step number `step` (from 1), after which `share` of the limit is spent.

    Schedules end where the run's own limit ends, and of a run that continues with another limit where
    that ends (`limit_change`).

    cosine: linear warmup, then a half cosine down to `minimum_learning_rate` (Loshchilov and
    Hutter 2017). wsd: warmup, stable, and a linear decay over the last `decay` of the run (Hu et
    al. 2024). inverse_square_root: constant for `warmup`, then falling with 1/sqrt(step)
    (Raffel et al. 2020, 3.1.2). constant: linear warmup, then constant.
    """
    floor, warmup = training.minimum_learning_rate, training.warmup
    if warmup >= 1:  # in steps
        warmup = warmup * share / step
    ramp = share / warmup if warmup else math.inf
    if training.schedule == "inverse_square_root":
        return training.learning_rate / math.sqrt(max(ramp, 1.0) if warmup else step)
    rate = min(ramp, 1.0)
    if training.schedule == "cosine" and ramp > 1:
        through = (share - warmup) / (1 - warmup)
        rate = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * through))
    if training.schedule == "wsd" and share > 1 - training.decay:
        rate = min(rate, floor + (1 - floor) * (1 - share) / training.decay)
    return training.learning_rate * rate


def limit_change(before: Training, after: Training, progress: Progress) -> str:
    """What a changed limit does to the learning rate of a run that continues at `progress`, in a
    sentence; "" where the limit is as before, or already reached. The rate is exact where the limit
    is one of steps, and else that of a step of the mean cost so far."""
    old, new = Limit.of(before), Limit.of(after)
    step = progress.step
    if old == new or not step or new.reached(progress):
        return ""
    was = learning_rate(before, step, old.share(progress))
    rate = learning_rate(after, step + 1, new.share(progress, more=1))
    return (
        f"the run's limit was {old} and is {new}, and the schedule ({after.schedule}) is that of the "
        f"new one: the learning rate goes from {was:.2e} at step {step} to {rate:.2e} at step {step + 1}"
    )
