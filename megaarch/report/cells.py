"""The cells of a study as the report reads them: seeds merged, ranked, told apart or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from megaarch.config import catalogue
from megaarch.report.notation import are, budget, listed
from megaarch.study.intervals import paired_interval, seed_half_width, widened
from megaarch.study.results import (
    INTERVALS,
    CellResult,
    CurvePoint,
    Heldout,
    LossPoint,
    Paired,
    Point,
    Results,
)

FLOPS_TOLERANCE = 0.02
MOST = {"choice_accuracy": 1.0}  # of measures with a largest value; none is below zero
AnyPoint = TypeVar("AnyPoint", bound=Point)
OVER_SEEDS = "bootstrap over documents and Student's t over seeds"


class MergedHeldout(Heldout):
    """Means over seeds. by_seed: the bits per byte of each that has some; empty without seeds."""

    by_seed: list[float] = Field(default_factory=list)


class MergedCell(CellResult):
    """A cell of a study with the mean over its seeds in place of each value.

    label: its name, with its size where the study has several. seeds: how many.
    """

    label: str
    seeds: int
    heldout: MergedHeldout  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)


def merged_cells(results: Results) -> list[MergedCell]:
    """One cell for each (name, size, budget), in the order of their first appearance."""
    groups: dict[tuple, list[CellResult]] = {}
    for cell in results.cells:
        groups.setdefault((cell.name, cell.size, cell.budget), []).append(cell)
    cells = [merge(group) for group in groups.values()]
    for cell in cells:
        sizes = {other.size for other in cells if other.name == cell.name}
        if len(sizes) > 1 and cell.size:
            cell.label = f"{cell.name} {cell.size}"
    return cells


def merge(cells: Sequence[CellResult]) -> MergedCell:
    """The seeds of one cell as one: means, and intervals that hold the spread over seeds too."""
    first: dict[str, Any] = dict(cells[0])
    heldout = merged_heldout([cell.heldout for cell in cells])
    merged = first | {"label": cells[0].name, "seeds": len(cells), "heldout": heldout}
    if len(cells) > 1:
        for key, value in first.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and key not in ("seed", "budget"):
                merged[key] = mean_of([getattr(cell, key, None) for cell in cells])
        warnings = dict.fromkeys(warning for cell in cells for warning in cell.warnings)
        merged |= {
            "curve": mean_curve([cell.curve for cell in cells]),
            "losses": interpolated([cell.losses for cell in cells], LossPoint, "loss"),
            "tuned": all(cell.tuned for cell in cells),
            "learning_rate_at_edge": any(cell.learning_rate_at_edge for cell in cells),
            "warnings": list(warnings),
        }
    return MergedCell.model_construct(**merged)


def merged_heldout(helds: Sequence[Heldout]) -> MergedHeldout:
    """The held-out values of several seeds. A seed without one leaves the mean without one."""
    by_seed = [v for held in helds if (v := held.continuation_bits_per_byte) is not None]
    merged: dict[str, Any] = dict(helds[0]) | {"by_seed": by_seed}
    if len(helds) == 1:
        return MergedHeldout.model_construct(**merged)
    for measure, name in INTERVALS.items():
        values = [getattr(held, measure) for held in helds]
        intervals = [interval for held in helds if (interval := held.interval(measure))]
        mean = merged[measure] = mean_of(values)
        merged[name] = None
        if mean is not None and len(intervals) == len(helds):
            ends = [sum(side) / len(helds) for side in zip(*intervals, strict=True)]
            low, high = widened(ends, mean, seed_half_width([values]))
            merged[name] = [max(low, 0.0), min(high, MOST.get(measure, high))]
    raw = "continuation_bits_per_byte_raw"
    merged[raw] = mean_of([getattr(held, raw) for held in helds])
    merged["paired"] = mean_paired([held.paired for held in helds])
    merged["interval_kind"] = OVER_SEEDS
    return MergedHeldout.model_construct(**merged)


def mean_paired(paired: Sequence[Paired | None]) -> Paired | None:
    """Returns what each item cost, as a mean over seeds; None where seeds were scored on other items."""
    known = [p for p in paired if p]
    first = known[0] if known else None
    if first is None or len(known) < len(paired):
        return None
    if any((p.documents, p.sizes) != (first.documents, first.sizes) for p in known):
        return None
    items = zip(*(p.amounts for p in known), strict=True)
    return first.model_copy(update={"amounts": [sum(item) / len(known) for item in items]})


def mean_of(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


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


def flops_spread(cells: Sequence[CellResult]) -> float:
    """How much more FLOPs the cell that spent most spent than the one that spent least, a share."""
    amounts = [cell.total_flops for cell in cells if cell.total_flops]
    return max(amounts) / min(amounts) - 1 if amounts else 0.0


def value_of(cell: CellResult) -> float:
    """The bits per byte of a cell that has them."""
    assert cell.bits_per_byte is not None
    return cell.bits_per_byte


def interval_kinds(cells: Sequence[CellResult]) -> list[str]:
    return sorted({cell.heldout.interval_kind for cell in cells if cell.heldout.interval_kind})


def knows_length(cell: CellResult) -> bool:
    """Says whether the cell is given how many tokens the middle has that it is to fill."""
    objective = catalogue.OBJECTIVES.get(cell.objective)
    return objective is not None and objective.gap_length


def ranked(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Comparable cells with the lowest bits per byte first; cells without a value last."""
    comparable = [cell for cell in cells if cell.heldout.comparable]
    return sorted(comparable, key=lambda c: (c.bits_per_byte is None, c.bits_per_byte or 0.0))


def apart(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells whose value is a pseudo-likelihood, which ranks with no other."""
    return [cell for cell in cells if not cell.heldout.comparable]


def distinguishable(a: MergedHeldout, b: MergedHeldout) -> bool:
    """Whether the bits per byte of two merged cells differ by more than chance, at 95%.

    Scored on the same items: the interval of their difference leaves out zero. It holds the choice
    of documents (a paired bootstrap of the means over seeds) and, where there are several, the
    spread over seeds. Otherwise: the cells' own intervals leave a gap. A cell without an interval
    is distinguishable from none; nor is one that is not comparable. The unigram model (`unigram`)
    may stand for one of them: it has no seeds, and so no spread over them.
    """
    mine, theirs = a.continuation_bits_per_byte, b.continuation_bits_per_byte
    if not (a.comparable and b.comparable) or mine is None or theirs is None:
        return False
    between = paired_interval(a.paired, b.paired) if a.paired and b.paired else None
    if between:
        half = seed_half_width([held.by_seed for held in (a, b)])
        low, high = widened(between, mine - theirs, half)
        return low > 0 or high < 0
    own, other = a.interval(), b.interval()
    if own is None or other is None:
        return False
    return own[1] < other[0] or other[1] < own[0]


def unigram(results: Results) -> MergedHeldout | None:
    """The unigram model as the values of a cell that others can be told apart from; None where they
    are not known. Results without what each item cost it know its value alone."""
    value = results.unigram_bits_per_byte
    if value is None:
        return None
    return MergedHeldout(
        continuation_bits_per_byte=value,
        continuation_interval=[value, value],
        paired=results.unigram_paired,
    )


@dataclass(frozen=True)
class Finding:
    """The answer at one budget.

    order: the comparable cells that have a value, best first.
    tied: those of them that are not distinguishable from the best.
    """

    budget: float
    cells: list[MergedCell]
    order: list[MergedCell]
    tied: list[MergedCell]


def findings(results: Results) -> list[Finding]:
    """One finding for each budget, the largest first."""
    cells = merged_cells(results)
    found = []
    for amount in sorted({cell.budget for cell in cells}, reverse=True):
        group = [cell for cell in cells if cell.budget == amount]
        order = [cell for cell in ranked(group) if cell.bits_per_byte is not None]
        tied = [cell for cell in order[1:] if not distinguishable(order[0].heldout, cell.heldout)]
        found.append(Finding(amount, group, order, tied))
    return found


def headline(results: Results, plain: bool = False) -> list[str]:
    """The answer: for each budget who is best, by how much and who ties; then what bounds it."""
    found = findings(results)
    sentences = [answer(results.budget.match, finding, plain) for finding in found]
    sentences += against_unigram(results, found, plain)
    names = list(dict.fromkeys(cell.label for finding in found for cell in apart(finding.cells)))
    if names:
        sentences.append(
            f"{are(names)} scored by pseudo-likelihood, which is not comparable, and ranked apart."
        )
    return sentences


def against_unigram(results: Results, found: list[Finding], plain: bool) -> list[str]:
    """Which comparable cells a unigram model of the training tokens is better than, by the test that
    tells two cells apart."""
    reference, match = unigram(results), results.budget.match
    order = [cell for finding in found for cell in finding.order]
    if reference is None or not order:
        return []
    value = results.unigram_bits_per_byte or 0.0
    tied, behind = [], []
    for cell in order:
        name = cell.label
        if len(found) > 1:
            name += f" at {budget(match, cell.budget, plain)}"
        if not distinguishable(cell.heldout, reference):
            tied.append(name)
        elif value_of(cell) > value:
            behind.append(name)
    verdicts = []
    if len(tied) + len(behind) == len(order):
        verdicts.append("no comparable cell beats it")
    if tied:
        verdicts.append(f"{are(tied)} not distinguishable from it")
    if behind and len(behind) < len(order):
        verdicts.append(f"{listed(behind)} did worse")
    verdict = "; ".join(verdicts or ["every comparable cell beats it"])
    return [f"A unigram model needs {value:.3f} bits per byte; {verdict}."]


def answer(match: str, finding: Finding, plain: bool) -> str:
    """Who is best at one budget, in a sentence."""
    amount = budget(match, finding.budget, plain)
    if not finding.order:
        return f"At {amount} no comparable cell has a held-out value."
    best, *others = finding.order
    when = f"At {amount} each"
    if match == "flops":
        equal = flops_spread(finding.cells) <= FLOPS_TOLERANCE
        when = f"At equal compute ({amount} each)"
        if not equal:
            when = f"At a budget of {amount} each, which was not spent equally"
    value = value_of(best)
    sentence = f"{when}, {best.label} predicts held-out text best, with {value:.3f} bits per byte"
    if not others:
        return sentence + "; there is no other comparable cell."
    second = value_of(others[0])
    share = 100 * (second - value) / second if second else 0.0
    sentence += f", {second - value:.3f} ({share:.1f}%) below {others[0].label}"
    if finding.tied == others[:1]:
        return f"{sentence}, but the two are not distinguishable."
    if finding.tied:
        names = listed([cell.label for cell in finding.tied])
        return f"{sentence}, but is not distinguishable from {names}."
    several = len(others) > 1
    rest = (
        "every other cell is distinguishable from it" if several else "the two are distinguishable"
    )
    return f"{sentence}; {rest}."
