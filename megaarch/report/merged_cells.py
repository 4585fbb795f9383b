"""The cells of a study as the report reads them: seeds merged into one cell."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from megaarch.config import catalogue
from megaarch.evaluation.heldout_scores import INTERVALS, Heldout
from megaarch.report.yardsticks import CHOICE, CONTINUATION, GAIN, MIDDLE, Score, Yardstick
from megaarch.study.results import (
    CellResult,
    CurvePoint,
    DivergedCell,
    LossPoint,
    Point,
    Results,
    without_seed,
)

FLOPS_TOLERANCE = 0.02
FIELDS = {
    "continuation_bits_per_byte": CONTINUATION,
    "choice_accuracy": CHOICE,
    "middle_bits_per_byte": MIDDLE,
    "prefix_gain": GAIN,
}
AnyPoint = TypeVar("AnyPoint", bound=Point)
OVER_SEEDS = "bootstrap over documents and Student's t over seeds"


class MergedHeldout(Heldout):
    """Means over seeds. each: the values of every seed."""

    each: list[Heldout] = Field(default_factory=list)

    def score(self, yardstick: Yardstick) -> Score:
        return yardstick.score(self.each)


class MergedCell(CellResult):
    """A cell of a study with the mean over its seeds in place of each value.

    label: its name, with its size where the study has several. seeds: how many. digests: theirs. heir: it began with
    another cell's weights, and has with what these cost more than the cells that it would rank with. diverged: how
    many seeds more have no value, for they diverged, or what they start from.
    """

    label: str
    seeds: int
    digests: list[str] = Field(default_factory=list)
    heir: bool = False
    diverged: int = 0
    heldout: MergedHeldout  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)

    @property
    def ranks(self) -> bool:
        """Whether it ranks with others. A mean over the seeds that did not diverge would favour it."""
        return not (self.heir or self.diverged)


def merged_cells(results: Results) -> list[MergedCell]:
    """One cell for each (name, size, budget), in the order of their first appearance."""
    groups: dict[tuple, list[CellResult]] = {}
    for cell in results.cells:
        groups.setdefault(without_seed(cell), []).append(cell)
    cells = [merge(group) for group in groups.values()]
    gone = Counter(map(without_seed, results.diverged))
    several = len(sizes(results)) > 1
    for cell in cells:
        cell.diverged = gone[without_seed(cell)]
        cell.label = label(cell, several)
    mark_heirs(cells, results.budget.match)
    return cells


def sizes(results: Results) -> set[str | None]:
    return {cell.size for cell in (*results.cells, *results.diverged)}


def label(cell: CellResult | DivergedCell, several: bool) -> str:
    """The cell's name, with its size where the study has several."""
    return f"{cell.name} {cell.size}" if several and cell.size else cell.name


def mark_heirs(cells: Sequence[MergedCell], match: str) -> None:
    """Marks the heirs of each place: cells with more ancestors than others that rank there, and with more than
    any of these in all of what the study matches (tokens where parameters are matched), or not known how much."""
    by_key = {seedless(cell.key): cell for cell in cells if cell.key}
    groups: dict[tuple, list[tuple[int, float, MergedCell]]] = {}
    for cell in cells:
        line = _line(cell, by_key)
        number = len(line) - 1 + bool(line[-1].start)  # from outside, or of another study
        amount = {
            "flops": cell.total_flops,
            "target_tokens": sum(each.target_tokens or 0 for each in line),
        }.get(match, cell.total_tokens)
        groups.setdefault((place(cell, match), finetuned(cell)), []).append(
            (number, amount or 0.0, cell)
        )
    for group in groups.values():
        fewest = min(number for number, _, _ in group)
        most = max(amount for number, amount, _ in group if number == fewest)
        for number, amount, cell in group:
            longer = bool(most) and amount > (1 + FLOPS_TOLERANCE) * most
            cell.heir = number > fewest and (longer or not cell.start_known)


def _line(cell: MergedCell, by_key: dict[str, MergedCell]) -> list[MergedCell]:
    """The cell, the one that its weights are of, and so on, as far as the study has them."""
    line = [cell]
    while (parent := by_key.get(seedless(line[-1].parent))) and parent not in line:
        line.append(parent)
    return line


def seedless(key: str | None) -> str:
    """A cell's key without its seed."""
    return re.sub(r"-seed\d+$", "", key or "")


def merge(cells: Sequence[CellResult]) -> MergedCell:
    """The seeds of one cell as one: means, and intervals that hold the spread over seeds too."""
    first: dict[str, Any] = dict(cells[0])
    heldout = merged_heldout([cell.heldout for cell in cells])
    digests = [cell.digest for cell in cells if cell.digest]
    merged = first | {"label": cells[0].name, "seeds": len(cells), "heldout": heldout}
    merged["digests"] = digests
    if len(cells) > 1:
        for key, value in first.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and key not in ("seed", "budget"):
                merged[key] = mean_of([getattr(cell, key, None) for cell in cells])
        merged |= {
            "curve": mean_curve([cell.curve for cell in cells]),
            "losses": interpolated([cell.losses for cell in cells], LossPoint, "loss"),
            "tuned": all(cell.tuned for cell in cells),
            "learning_rate_at_edge": any(cell.learning_rate_at_edge for cell in cells),
        }
    return MergedCell.model_construct(**merged)


def merged_heldout(helds: Sequence[Heldout]) -> MergedHeldout:
    """The held-out values of several seeds. A seed without one leaves the mean without one."""
    merged: dict[str, Any] = dict(helds[0]) | {"each": list(helds)}
    if len(helds) > 1:
        for name, yardstick in FIELDS.items():
            score = yardstick.score(helds)
            merged[name], merged[INTERVALS[name]] = score.value, score.interval
        raw = "continuation_bits_per_byte_raw"
        merged[raw] = mean_of([getattr(held, raw) for held in helds])
        merged["paired"] = CONTINUATION.score(helds).paired
        merged["interval_kind"] = OVER_SEEDS
        gain = merged["prefix_gain_interval"]  # None where a seed has none: it cannot be told then
        merged["reads_prefix"] = gain[0] > 0 if gain else None
    return MergedHeldout.model_construct(**merged)


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is missing. Of equal values it is their value, to the last bit: by it cells of one place meet."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers)


def mean_curve(curves: list[list[CurvePoint]]) -> list[CurvePoint]:
    """The mean of curves whose points lie at the same shares of the budget: point by point."""
    if len({len(curve) for curve in curves}) > 1:
        return interpolated(curves, CurvePoint, "heldout")
    means = []
    for points in zip(*curves, strict=True):
        mean: dict[str, Any] = {
            key: mean_of([getattr(point, key) for point in points]) for key, _ in points[0]
        }
        means.append(CurvePoint.model_construct(**mean))
    return means


def interpolated(
    curves: Sequence[Sequence[AnyPoint]], form: type[AnyPoint], value: str
) -> list[AnyPoint]:
    """The mean of curves at the FLOPs of the first one's points, as far as all of them reach."""
    curves = [[p for p in curve if getattr(p, value) is not None] for curve in curves]
    if not all(curves):
        return []
    places = [[point.flops for point in curve] for curve in curves]
    reach = min(place[-1] for place in places)
    at = [place for place in places[0] if place <= reach]

    def mean(key: str) -> list[float]:
        columns = [
            np.interp(at, place, [getattr(point, key) for point in curve])
            for place, curve in zip(places, curves, strict=True)
        ]
        return np.mean(columns, axis=0).tolist()

    keys = ("step", "seconds", value)
    rows = zip(at, *map(mean, keys), strict=True)
    return [form.model_construct(**dict(zip(("flops", *keys), row, strict=True))) for row in rows]


class Place(NamedTuple):
    """Where cells compare: at a budget, after what study.adapt added to it, and at one size, None where sizes
    compare too, as at equal FLOPs."""

    budget: float
    adaptation: float | None
    size: str | None


def place(cell: CellResult | DivergedCell, match: str) -> Place:
    """match: what the study matches."""
    return Place(cell.budget, cell.adaptation, None if match == "flops" else cell.size)


def before_adaptation(cells: Sequence[MergedCell], child: MergedCell) -> MergedCell | None:
    """The cell of `cells` that `child` starts from, whatever its seeds; None where it is not there."""
    wanted = seedless(child.parent)
    return next((cell for cell in cells if wanted and seedless(cell.key) == wanted), None)


def finetuned(cell: CellResult) -> bool:
    """Whether the cell was trained on pairs of input and target: text without a question is not what
    it does, and ranks it with no other."""
    row = catalogue.OBJECTIVES.get(cell.objective)
    return row is not None and row.of_pairs


def without_positions(cell: CellResult) -> bool:
    """Whether the cell's model is given no positions."""
    return cell.section("model").get("position_encoding") == "none"


def flops_spread(cells: Sequence[CellResult]) -> float:
    """How much more FLOPs the cell that spent most spent than the one that spent least of those that are
    ranked together, a share."""
    spreads = [0.0]
    for kind in (False, True):
        amounts = [c.total_flops for c in cells if finetuned(c) is kind and c.total_flops]
        spreads += [max(amounts) / min(amounts) - 1] if amounts else []
    return max(spreads)


def value_of(cell: CellResult) -> float:
    """The bits per byte of a cell that has them."""
    assert cell.bits_per_byte is not None
    return cell.bits_per_byte


def interval_kinds(cells: Sequence[CellResult]) -> list[str]:
    return sorted({cell.heldout.interval_kind for cell in cells if cell.heldout.interval_kind})
