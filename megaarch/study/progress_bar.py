"""Progress bars while cells train: one for each cell, live on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megaarch.training.steps_in_flight import Step

PLAIN_EVERY = 15.0  # seconds between lines of a cell where the output is no terminal

Show = Callable[[str, float | None, str], None]  # name, share of the budget or None, text


class ProgressDisplay:
    """All progress bars of a study. A context manager; `show` may be called for any name."""

    def __init__(self, console: Console):
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.printed: dict[str, float] = {}
        self.progress: Progress | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=12),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def show(self, name: str, share: float | None, text: str) -> None:
        """Sets the text of a bar and, where `share` is given, how far it has come."""
        if self.console.quiet:
            return
        if self.progress is None:
            now = time.monotonic()
            if share is None or share >= 1 or now - self.printed.get(name, 0) > PLAIN_EVERY:
                self.printed[name] = now
                part = "" if share is None else f"{share:4.0%}  "
                print(f"{name}: {part}{text}", file=sys.stderr, flush=True)
            return
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=1.0, text="")
        self.progress.update(self.tasks[name], completed=share, text=text)
        if text.startswith("done"):
            self.progress.stop_task(self.tasks[name])


class ProgressBar:
    """The bar of one run; `show` is a display's, or leads to one in another process."""

    def __init__(self, name: str, show: Show):
        self.name, self.show = name, show

    def set_text(self, text: str) -> None:
        """Replaces the text, e.g. while scoring."""
        self.show(self.name, None, text)

    def update(self, step: Step) -> None:
        """Shows how far the run is. Called after every training step."""
        progress = step.progress
        speed = progress.seen_tokens / max(progress.seconds, 1e-9)
        left = clock(progress.seconds * (1 - step.share) / max(step.share, 1e-9))
        mfu = f"  {step.utilization['mfu']:.0%} MFU" if "mfu" in step.utilization else ""
        text = f"step {progress.step}  loss {step.loss:.3f}  {speed:,.0f} tok/s{mfu}  {left} left"
        self.show(self.name, step.share, text)


def clock(seconds: float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
