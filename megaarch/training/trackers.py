"""Where a run's numbers go besides metrics.jsonl: TensorBoard and Weights & Biases."""

import logging
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megaarch.errors import UserError
from megaarch.files import read_text, replacing

log = logging.getLogger(__name__)
ID = "wandb.id"  # in a run's directory: W&B's name for the run


class TensorBoard:
    """Event files in `directory`/tensorboard. start: step that the run continues from; TensorBoard
    drops what earlier files hold after it."""

    name = "TensorBoard"

    def __init__(self, directory: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same one at each start in `directory`, online or offline. Steps
    that an earlier start has drawn stay: W&B takes each step once.

    settings: of this start, which replace those of the one before.
    """

    name = "Weights & Biases"

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.run = _wandb().init(
            project="megaarch",
            id=run_id(directory),
            resume="allow",
            name=run_name(directory),
            dir=str(directory),
            config=settings,
        )
        self.run.config.update(settings, allow_val_change=True)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


Board = TensorBoard | WandB  # draws the numbers of each step; any of its calls may raise


def run_name(directory: Path) -> str:
    """The name that W&B shows: STUDY/CELL for the folder STUDY/cells/CELL, whose last part many cells
    share; else the folder's own."""
    *above, folder = directory.absolute().parts
    if "cells" not in above[2:]:
        return folder
    at = len(above) - 1 - above[::-1].index("cells")
    return "/".join((above[at - 1], *above[at + 1 :], folder))


def run_id(directory: Path) -> str:
    """W&B's id of the run in this directory, made at its first start and kept."""
    path = directory / ID
    if path.exists():
        with suppress(ValueError):
            found = read_text(path, limit=1024).strip()
            if re.fullmatch(r"[a-z0-9]{1,64}", found):
                return found
        log.warning("%s is damaged: this start is a new run in Weights & Biases", path)
    new = secrets.token_hex(8)
    with replacing(path) as aside:
        aside.write_text(f"{new}\n")
    return new


def _wandb() -> ModuleType:
    try:
        return import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise UserError(
            "logging.wandb: Weights & Biases is not installed: pip install wandb, or set it false"
        ) from None
