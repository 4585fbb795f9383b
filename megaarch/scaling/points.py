"""Points of scaling laws: size, tokens and loss of finished runs, from a study or from a file."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaarch.config.catalogue import OBJECTIVES
from megaarch.errors import UserError
from megaarch.files import read_text
from megaarch.study.results import Results


@dataclass(frozen=True)
class Points:
    """Runs of one architecture, float64 [P] each. tokens: such that 6 N D is a run's training FLOPs, so
    that those of an encoder-decoder are (N_enc D_enc + N_dec D_dec) / N."""

    name: str
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        return 6 * self.parameters * self.tokens

    def without_lowest_ratios(self, number: int) -> "Points":
        """Leaves out the points of the fewest tokens a parameter."""
        kept = np.sort(np.argsort(self.tokens / self.parameters, kind="stable")[number:])
        return Points(self.name, self.parameters[kept], self.tokens[kept], self.loss[kept])


def read(path: Path) -> dict[str, Points]:
    """Returns the points of a CSV file by architecture: columns `parameters`, `loss`, `tokens` or
    `training_flops`, and perhaps `architecture`. UserError for a file that holds something else."""
    text = io.StringIO(
        read_text(path).removeprefix("\ufeff"), newline=None
    )  # the mark of spreadsheets
    try:
        return _points(csv.DictReader(text), path)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file: {error}") from None


def _points(rows: csv.DictReader, path: Path) -> dict[str, Points]:
    columns = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = columns
    counted = "tokens" if "tokens" in columns else "training_flops"
    lacking = [name for name in ("parameters", counted, "loss") if name not in columns]
    if lacking:
        raise UserError(
            f"{path}: it has no column {' and no column '.join(lacking)}: its first line must name "
            "parameters, loss, and tokens or training_flops"
        )
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        size, count, loss = (
            _number(row, name, f"{path}, line {rows.line_num}")
            for name in ("parameters", counted, "loss")
        )
        tokens = count if counted == "tokens" else count / (6 * size)
        found.setdefault(row.get("architecture") or path.stem, []).append((size, tokens, loss))
    if not found:
        raise UserError(f"{path} has no points")
    return {name: of(name, rows) for name, rows in found.items()}


def of_study(results: Results) -> dict[str, Points]:
    """Returns the final points of a study's cells by their name: each ran its own schedule to its end, as
    points along a curve did not. The loss is the bits per byte of held-out continuations; cells whose
    value is a pseudo-likelihood or that were finetuned on pairs are left out; so are those that begin with another's
    weights, whose schedule ran twice, unless they go on with its optimizer as one run would
    (training.start_optimizer)."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for cell in results.cells:
        loss, size = cell.heldout.continuation_bits_per_byte, cell.parameters
        flops = (cell.flops or 0) + (cell.inherited_flops or 0)
        objective = OBJECTIVES.get(cell.objective)
        of_pairs = objective is not None and objective.of_pairs
        goes_on = cell.settings.get("training", {}).get("start_optimizer")
        one_run = cell.adaptation is None and (cell.parent is None or goes_on) and not of_pairs
        if one_run and cell.heldout.comparable and loss and size and flops:
            found.setdefault(cell.name, []).append((size, flops / (6 * size), loss))
    if not found:
        raise UserError(
            "the study has no finished cell of one run on text whose held-out value is a likelihood"
        )
    return {name: of(name, rows) for name, rows in found.items()}


def of(name: str, rows: Sequence[tuple[float, float, float]]) -> Points:
    """Points of (parameters, tokens, loss)."""
    return Points(name, *np.array(rows, dtype=np.float64).T)


def _number(row: Mapping[str, str | None], name: str, where: str) -> float:
    given = row[name]
    try:
        value = float(given or "")
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise UserError(f"{where}: {name} is {given!r}, which is no positive number")
    return value
