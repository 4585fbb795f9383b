"""The learning rate of a step, by the share of the limit that a run has spent."""

import math

from megaarch.checkpoint.record import Progress
from megaarch.config.schema import Training
from megaarch.training.limit import Limit


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


def unfinished_warmup(training: Training) -> str:
    """Says that a run of so many steps ends within its warmup, and at what learning rate; "" where it does not."""
    steps, warmup = training.steps or math.inf, training.warmup
    if steps >= warmup or warmup < 1 or training.schedule == "inverse_square_root":
        return ""
    last = learning_rate(training, int(steps), 1.0)
    return (
        f"training.warmup: the run ends after {steps} of its {warmup:g} steps, at a learning rate of {last:.2e}, "
        "and never has that of training.learning_rate"
    )


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
