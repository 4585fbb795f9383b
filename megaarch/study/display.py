"""What a person sees while cells train: one line a cell, live on a terminal, plain in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megaarch.training.trainer import Step

PLAIN_EVERY = 20.0  # seconds between lines where the output is no terminal


class CellLine:
    """The progress line of one run. Use as a context manager; call `step` after every step."""

    def __init__(self, name: str, console: Console):
        self.name, self.console = name, console
        self.started = time.monotonic()
        self.printed = 0.0
        self.smooth: float | None = None
        self.bar = None

    def __enter__(self) -> "CellLine":
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=1.0, text="preparing")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Replace the text of the line, e.g. while evaluating."""
        if self.bar:
            self.bar.update(self.task, text=text)
        else:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def step(self, step: Step) -> None:
        self.smooth = step.loss if self.smooth is None else 0.9 * self.smooth + 0.1 * step.loss
        speed = step.progress.seen_tokens / max(step.progress.seconds, 1e-9)
        left = step.progress.seconds * (1 - step.share) / max(step.share, 1e-9)
        text = (
            f"step {step.progress.step}  loss {self.smooth:.3f}  "
            f"{speed:,.0f} tok/s  {_clock(left)} left"
        )
        if self.bar:
            self.bar.update(self.task, completed=step.share, text=text)
        elif time.monotonic() - self.printed > PLAIN_EVERY or step.share >= 1.0:
            self.printed = time.monotonic()
            print(f"{self.name}: {step.share:4.0%}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
