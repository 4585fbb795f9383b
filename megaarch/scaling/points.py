"""Points of scaling laws: size, tokens and loss of finished runs, from a study or from a file."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaarch.config.catalogue import OBJECTIVES
from megaarch.errors import UserError
from megaarch.evaluation.heldout_scores import Paired
from megaarch.files import read_text
from megaarch.study.results import Results, without_seed

# Of the draws of documents, which no draw of points repeats, whatever its seed.
OF_DOCUMENTS = np.random.SeedSequence(0, spawn_key=(0,))


class Items(NamedTuple):
    """What a run was scored on, as `Paired` has it."""

    documents: tuple[float, ...]
    sizes: tuple[float, ...]
    amounts: tuple[float, ...]


class Run(NamedTuple):
    """A point, with the held-out items of its loss where they are known."""

    parameters: float
    tokens: float
    loss: float
    items: Items | None = None


@dataclass(frozen=True)
class Points:
    """Runs of one architecture, float64 [P] each. tokens: such that 6 N D is a run's training FLOPs, so
    that those of an encoder-decoder are (N_enc D_enc + N_dec D_dec) / N. sizes [G], amounts [P, G]: the bytes
    and the bits of each of the documents that all were scored on; None where they are not known."""

    name: str
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    sizes: np.ndarray | None = None
    amounts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        return 6 * self.parameters * self.tokens

    @property
    def documents(self) -> int | None:
        """How many documents can be drawn again; None where none can."""
        return None if self.sizes is None else len(self.sizes)

    def without_lowest_ratios(self, number: int) -> "Points":
        """Leaves out the points of the fewest tokens a parameter."""
        kept = np.sort(np.argsort(self.tokens / self.parameters, kind="stable")[number:])
        amounts = None if self.amounts is None else self.amounts[kept]
        columns = self.parameters[kept], self.tokens[kept], self.loss[kept]
        return Points(self.name, *columns, self.sizes, amounts)

    def redrawn_losses(self, draws: int) -> np.ndarray:
        """Losses [draws, P] on documents that are drawn again: all runs of all architectures on the same, so
        that what a draw favours is in every point of an architecture, as in the documents of the study."""
        if self.sizes is None or self.amounts is None:
            return np.broadcast_to(self.loss, (draws, len(self)))
        number = len(self.sizes)
        often = np.random.default_rng(OF_DOCUMENTS).multinomial(
            number, np.full(number, 1 / number), size=draws
        )
        redrawn = (often @ self.amounts.T) / (often @ self.sizes)[:, None]
        return self.loss * redrawn / (self.amounts.sum(axis=1) / self.sizes.sum())


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
    found: dict[str, list[Run]] = {}
    for row in rows:
        size, count, loss = (
            _number(row, name, f"{path}, line {rows.line_num}")
            for name in ("parameters", counted, "loss")
        )
        tokens = count if counted == "tokens" else count / (6 * size)
        found.setdefault(row.get("architecture") or path.stem, []).append(Run(size, tokens, loss))
    if not found:
        raise UserError(f"{path} has no points")
    return {name: of(name, rows) for name, rows in found.items()}


def of_study(results: Results) -> dict[str, Points]:
    """Returns the points of each architecture of a study."""
    return {name: of(name, runs) for name, runs in runs_of_study(results).items()}


def runs_of_study(results: Results) -> dict[str, tuple[Run, ...]]:
    """Returns the final points of a study's cells by their name: each ran its own schedule to its end, as
    points along a curve did not. The loss is the bits per byte of held-out continuations; cells whose value
    is a pseudo-likelihood or that were finetuned on pairs are left out; so are those of which a seed
    diverged, and those that begin with another's weights, whose schedule ran twice, unless they go on with
    its optimizer as one run would (training.start_optimizer) and all of it is counted."""
    found: dict[str, list[Run]] = {}
    gone = {without_seed(cell) for cell in results.diverged}
    for cell in results.cells:
        loss, size = cell.heldout.continuation_bits_per_byte, cell.parameters
        flops = (cell.flops or 0) + (cell.inherited_flops or 0)
        objective = OBJECTIVES.get(cell.objective)
        of_pairs = objective is not None and objective.of_pairs
        goes_on = cell.settings.get("training", {}).get("start_optimizer")
        one_run = (
            cell.adaptation is None
            and without_seed(cell) not in gone
            and (cell.start is None or (goes_on and cell.start_known))
            and not of_pairs
        )
        if one_run and cell.heldout.comparable and loss and size and flops:
            run = Run(size, flops / (6 * size), loss, _items(cell.heldout.paired))
            found.setdefault(cell.name, []).append(run)
    if not found:
        raise UserError(
            "the study has no finished cell of one run on text whose held-out value is a likelihood"
        )
    return {name: tuple(runs) for name, runs in found.items()}


def _items(paired: Paired | None) -> Items | None:
    """Returns a run's items; None where their columns are not of one length."""
    if paired is None or not len(paired.documents) == len(paired.sizes) == len(paired.amounts):
        return None
    return Items(tuple(paired.documents), tuple(paired.sizes), tuple(paired.amounts))


def of(name: str, runs: Sequence[Run]) -> Points:
    columns = np.array([run[:3] for run in runs], dtype=np.float64).T
    return Points(name, *columns, *_by_document([run.items for run in runs]))


def _by_document(items: Sequence[Items | None]) -> tuple[np.ndarray, np.ndarray] | tuple[()]:
    """Returns bytes [G] and bits [P, G]; nothing where the runs were not all scored on the same items, of two
    documents or more, or where bits are not above 0, as those of a likelihood are."""
    found = [one for one in items if one is not None]
    if len(found) < len(items) or len({(one.documents, one.sizes) for one in found}) > 1:
        return ()
    names, place = np.unique(found[0].documents, return_inverse=True)
    holds = place == np.arange(len(names))[:, None]
    sizes = holds @ np.array(found[0].sizes)
    amounts = np.array([one.amounts for one in found]) @ holds.T
    known = len(names) > 1 and (sizes > 0).all() and (amounts > 0).all()
    return (sizes, amounts) if known else ()


def _number(row: Mapping[str, str | None], name: str, where: str) -> float:
    given = row[name]
    try:
        value = float(given or "")
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise UserError(f"{where}: {name} is {given!r}, which is no positive number")
    return value
