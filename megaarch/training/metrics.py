"""Metrics of a run: `metrics.jsonl`, one object a step, `heldout.jsonl`, one for each time that held-out text
was scored, and the boards that draw them."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from megaarch.config.schema import Logging
from megaarch.errors import UserError, in_brief
from megaarch.files import naming, open_regular, replacing
from megaarch.training.trackers import Board, TensorBoard, WandB

log = logging.getLogger(__name__)

HELD_OUT = "heldout.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file with a `step`; a last line that was cut off is left out, and so is
    one that is damaged (a crash of the machine may leave NULs), which is told."""
    if not path.exists():
        return
    with TextIOWrapper(open_regular(path), errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                if (found := parse_line(line)) is not None:
                    yield found
                else:
                    log.warning("%s: line %d is damaged and left out", path, number)


def parse_line(line: str) -> dict[str, Any] | None:
    """A step's object, None where the line is damaged. What a crash left before it, as NULs, does not count."""
    try:
        found = json.loads(line.lstrip("\0"))
        return found if type(found["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`: what a resumed run will write again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if path.exists():
        with replacing(path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))


class Metrics:
    """Writes a step's numbers everywhere they are wanted. Close it at the end. A board that fails, at
    the start or on the way, is left out with a warning.

    directory: of the run. start: step that the run continues from; later lines are cut. scored: the last
    step whose scores stay, of a run that scores held-out text. UserError where Weights & Biases is wanted
    and not installed.
    """

    def __init__(
        self, logging: Logging, start: int, settings: dict[str, Any], scored: int | None = None
    ):
        directory = Path(logging.directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.boards: list[Board] = []
        if logging.tensorboard:
            with self._goes_on_without(TensorBoard.name):
                self.boards.append(TensorBoard(directory, start))
        if logging.wandb:
            with self._goes_on_without(WandB.name):
                self.boards.append(WandB(directory, settings))
        self.path = directory / "metrics.jsonl"
        cut_back(self.path, start)
        self.file = self.path.open("a", buffering=1)
        self.heldout = directory / HELD_OUT
        if scored is not None:
            cut_back(self.heldout, scored)

    def write(self, line: Mapping[str, float]) -> None:
        """line: has at least `step`; the other numbers go to the boards too. One that is not finite (a
        skipped step's loss) is null: JSON knows no NaN."""
        numbers = {name: number for name, number in line.items() if math.isfinite(number)}
        with naming(self.path):
            self.file.write(
                json.dumps({name: numbers.get(name) for name in line}, allow_nan=False) + "\n"
            )
        self._draw(int(numbers.pop("step")), numbers)

    def write_heldout(self, step: int, flops: int, seconds: float, value: float | None) -> None:
        """value: held-out bits per byte after `step`. flops, seconds: that the run itself has taken."""
        value = value if value is not None and math.isfinite(value) else None
        point = {"step": step, "flops": flops, "seconds": seconds, "heldout": value}
        with naming(self.heldout), self.heldout.open("a") as file:
            file.write(json.dumps(point) + "\n")
        if value is not None:
            self._draw(step, {"heldout_bits_per_byte": value})

    def _draw(self, step: int, numbers: dict[str, float]) -> None:
        for board in tuple(self.boards):
            with self._goes_on_without(board.name):
                board.write(numbers, step)

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
        for board in tuple(self.boards):
            with self._goes_on_without(board.name):
                board.close()

    @contextmanager
    def _goes_on_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:  # it is not installed
            raise
        except Exception as error:
            log.warning(
                "%s fails (%s): the run goes on without it, and metrics.jsonl has every step",
                name,
                in_brief(error),
            )
            self.boards = [board for board in self.boards if board.name != name]
