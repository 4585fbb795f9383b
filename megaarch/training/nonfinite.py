"""Steps whose loss or gradient is not finite: skipped, counted, and past a limit the run's end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaarch.config.schema import Training

FILE = "nonfinite.json"


class Guard:
    """Keeps what was skipped. All ranks skip the same steps (engine/native.py), and end alike.

    directory: of the run. samples: those of a step, counted from 0. writes: whether this process
    writes its files.
    """

    def __init__(
        self, directory: Path, training: Training, samples: Callable[[int], range], writes: bool
    ):
        self.directory, self.samples, self.writes = directory, samples, writes
        self.limit = training.skip_limit
        self.skipped: list[dict[str, Any]] = []  # in a row, up to now

    def see(self, step: int, loss: float, norm: float, finite: bool) -> None:
        """Step number `step` (from 1); finite: whether the optimizer took it. FloatingPointError
        once more than `training.skip_limit` in a row were skipped; what they were is in the run's
        nonfinite.json."""
        if finite:
            self.skipped = []
            return
        samples = list(self.samples(step - 1))
        self.skipped.append(
            {"step": step, "loss": str(loss), "gradient_norm": str(norm), "samples": samples}
        )
        if len(self.skipped) <= self.limit:
            return
        path = self.directory / FILE
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"skipped": self.skipped}, indent=1) + "\n")
        last = self.skipped[-1]
        raise FloatingPointError(
            f"loss or gradient was not finite in {len(self.skipped)} steps in a row, up to step "
            f"{last['step']} with samples {last['samples'][0]} to {last['samples'][-1]} (all of "
            f"them are in {path}): look at these samples; to go on past them, run the same command "
            "with a larger training.skip_limit; to lower training.learning_rate, begin a new run "
            "in another logging.directory, from the newest checkpoint if there is one "
            f"(training.start_from={self.directory})"
        )
