"""The cells of a study as the report reads them: seeds merged, ranked, told apart or not.

A merged cell has the shape of a cell of `results.json`, with means over seeds in place of values,
`seeds` (how many), and `label` (its name, with its size where the study has several). Its
`heldout` also has `by_seed`, the bits per byte of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaarch.config import catalogue
from megaarch.report import notation
from megaarch.report.notation import finite
from megaarch.study.intervals import paired_interval, seed_half_width, widened

FLOPS_TOLERANCE = 0.02
MEASURES = {
    "continuation_bits_per_byte": "continuation_interval",
    "choice_accuracy": "choice_interval",
    "middle_bits_per_byte": "middle_interval",
}
MOST = {"choice_accuracy": 1.0}  # of measures with a largest value; none is below zero
OVER_SEEDS = "bootstrap over documents and Student's t over seeds"

NEEDED = [
    "name",
    "architecture",
    "objective",
    "budget",
    "seed",
    "parameters",
    "flops",
    "seen_tokens",
    "target_tokens",
    "steps",
    "train_seconds",
    "tokens_per_second",
    "final_loss",
    "heldout",
    "curve",
    "losses",
    "masks",
    "settings",
]


def check(results: dict) -> None:
    """KeyError, TypeError or IndexError where `results` lacks what every report reads."""
    if results["format"] != 1:
        raise KeyError(f"format {results['format']}")
    results["study"], results["budget"]["match"], results["cells"][0]
    for cell in results["cells"]:
        for key in NEEDED:
            cell[key]
        cell["heldout"]["continuation_bits_per_byte"]
        cell["curve"][0], cell["losses"][0]


def merged_cells(results: dict) -> list[dict]:
    """One cell for each (name, size, budget), in the order of their first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for cell in results["cells"]:
        groups.setdefault((cell["name"], cell.get("size"), cell["budget"]), []).append(cell)
    sizes: dict[str, set] = {}
    for name, size, _ in groups:
        sizes.setdefault(name, set()).add(size)
    cells = [merge(group) for group in groups.values()]
    for cell in cells:
        several = len(sizes[cell["name"]]) > 1 and cell.get("size")
        cell["label"] = f"{cell['name']} {cell['size']}" if several else cell["name"]
    return cells


def merge(cells: list[dict]) -> dict:
    """The seeds of one cell as one: means, and intervals that hold the spread over seeds too."""
    first = cells[0]
    merged = dict(first) | {"seeds": len(cells), "heldout": merged_heldout(cells)}
    if len(cells) == 1:
        return merged
    for key, value in first.items():
        if finite(value) is not None and key not in ("seed", "budget"):
            merged[key] = mean_of([cell.get(key) for cell in cells])
    merged["curve"] = mean_curve([cell["curve"] for cell in cells])
    merged["losses"] = interpolated([cell["losses"] for cell in cells], "loss")
    merged["tuned"] = all(cell.get("tuned") for cell in cells)
    merged["learning_rate_at_edge"] = any(cell.get("learning_rate_at_edge") for cell in cells)
    merged["warnings"] = list(dict.fromkeys(w for cell in cells for w in cell.get("warnings", [])))
    return merged


def merged_heldout(cells: list[dict]) -> dict:
    """The `heldout` of several seeds. A seed without a value leaves the mean without one."""
    helds = [cell["heldout"] for cell in cells]
    merged = dict(helds[0]) | {"by_seed": [bits(cell) for cell in cells]}
    if len(cells) == 1:
        return merged
    for measure, name in MEASURES.items():
        merged[measure] = mean_of([held.get(measure) for held in helds])
        intervals = [interval_of(cell, measure) for cell in cells]
        merged[name] = None
        if merged[measure] is not None and None not in intervals:
            ends = [mean_of(side) for side in zip(*intervals, strict=True)]
            half = seed_half_width([[held[measure] for held in helds]])
            low, high = widened(ends, merged[measure], half)
            merged[name] = [max(low, 0.0), min(high, MOST.get(measure, high))]
    raw = "continuation_bits_per_byte_raw"
    merged[raw] = mean_of([held.get(raw) for held in helds])
    merged["paired"] = mean_paired([held.get("paired") for held in helds])
    merged["interval_kind"] = OVER_SEEDS
    return merged


def mean_paired(paired: list[dict | None]) -> dict | None:
    """What each item cost, as a mean over seeds; None where seeds were scored on other items."""
    first = paired[0]
    if not all(paired) or any(
        p[key] != first[key] for p in paired for key in ("documents", "sizes")
    ):
        return None
    items = zip(*(p["amounts"] for p in paired), strict=True)
    return first | {"amounts": [sum(item) / len(paired) for item in items]}


def mean_of(values: Sequence) -> float | None:
    numbers = [finite(value) for value in values]
    return None if None in numbers else sum(numbers) / len(numbers)


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """The mean of curves whose points lie at the same shares of the budget: point by point."""
    if len({len(curve) for curve in curves}) > 1:
        return interpolated(curves, "heldout")
    return [
        {key: mean_of([point.get(key) for point in points]) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def interpolated(curves: list[list[dict]], value: str) -> list[dict]:
    """The mean of curves at the FLOPs of the first one's points, as far as all of them reach."""
    curves = [
        [point for point in curve if finite(point.get(value)) is not None] for curve in curves
    ]
    if not all(curves):
        return []
    places = [[point["flops"] for point in curve] for curve in curves]
    reach = min(place[-1] for place in places)
    at = [place for place in places[0] if place <= reach]
    keys = [key for key in ("step", "seconds", value) if key in curves[0][0]]
    means = {
        key: np.mean(
            [
                np.interp(at, place, [point[key] for point in curve])
                for place, curve in zip(places, curves, strict=True)
            ],
            axis=0,
        )
        for key in keys
    }
    return [
        {"flops": place} | {key: float(means[key][i]) for key in keys} for i, place in enumerate(at)
    ]


def spent(cell: dict) -> float | None:
    """Training FLOPs behind a cell's figure: its own and those of the weights it starts from."""
    own = finite(cell.get("flops"))
    return None if own is None else own + inherited(cell)


def inherited(cell: dict) -> float:
    """Training FLOPs that all its ancestors spent."""
    return finite(cell.get("inherited_flops")) or 0.0


def flops_spread(cells: list[dict]) -> float:
    """How much more FLOPs the cell that spent most spent than the one that spent least, a share."""
    amounts = [amount for amount in map(spent, cells) if amount]
    return max(amounts) / min(amounts) - 1 if amounts else 0.0


def bits(cell: dict) -> float | None:
    """Held-out bits per byte of the continuation."""
    return finite(cell["heldout"].get("continuation_bits_per_byte"))


def comparable(cell: dict) -> bool:
    return bool(cell["heldout"].get("comparable", True))


def told_length(cell: dict) -> bool:
    """Whether the cell was told how many tokens the middle has that it was to fill."""
    objective = catalogue.OBJECTIVES.get(cell["objective"])
    return objective is not None and objective.gap_length


def ranked(cells: list[dict]) -> list[dict]:
    """Comparable cells with the lowest bits per byte first; cells without a value last."""
    key = lambda cell: (bits(cell) is None, bits(cell) or 0.0)  # noqa: E731
    return sorted((cell for cell in cells if comparable(cell)), key=key)


def apart(cells: list[dict]) -> list[dict]:
    """Cells whose figure is a pseudo-likelihood, which ranks with no other."""
    return [cell for cell in cells if not comparable(cell)]


def interval_of(cell: dict, measure: str = "continuation_bits_per_byte") -> list[float] | None:
    """[low, high] of a measure of the held-out set, or None."""
    interval = cell["heldout"].get(MEASURES[measure])
    if not interval or finite(interval[0]) is None or finite(interval[1]) is None:
        return None
    return [float(interval[0]), float(interval[1])]


def distinguishable(cell_a: dict, cell_b: dict) -> bool:
    """Whether the bits per byte of two merged cells differ by more than chance, at 95%.

    Scored on the same items: the interval of their difference leaves out zero. It holds the choice
    of documents (a paired bootstrap of the means over seeds) and, where there are several, the
    spread over seeds. Otherwise: the cells' own intervals leave a gap. A cell without an interval
    is distinguishable from none; nor is one that is not comparable. The unigram model (`unigram`)
    may stand for one of them: it has no seeds, and so no spread over them.
    """
    if not (comparable(cell_a) and comparable(cell_b)) or None in (bits(cell_a), bits(cell_b)):
        return False
    held = [cell["heldout"] for cell in (cell_a, cell_b)]
    between = all(h.get("paired") for h in held) and paired_interval(*(h["paired"] for h in held))
    if between:
        half = seed_half_width([h["by_seed"] for h in held if "by_seed" in h])
        low, high = widened(between, bits(cell_a) - bits(cell_b), half)
        return low > 0 or high < 0
    a, b = interval_of(cell_a), interval_of(cell_b)
    return a is not None and b is not None and (a[1] < b[0] or b[1] < a[0])


def unigram(results: dict) -> dict | None:
    """The unigram model as a cell that others can be told apart from; None where it is not known.
    Results without what each item cost it know its value alone."""
    value = finite(results.get("unigram_bits_per_byte"))
    if value is None:
        return None
    return {
        "heldout": {
            "continuation_bits_per_byte": value,
            "continuation_interval": [value, value],
            "paired": results.get("unigram_paired"),
        }
    }


@dataclass(frozen=True)
class Finding:
    """The answer at one budget.

    order: the comparable cells that have a value, best first.
    tied: those of them that are not distinguishable from the best.
    """

    budget: float
    cells: list[dict]
    order: list[dict]
    tied: list[dict]


def findings(results: dict) -> list[Finding]:
    """One finding for each budget, the largest first."""
    cells = merged_cells(results)
    found = []
    for amount in sorted({cell["budget"] for cell in cells}, reverse=True):
        group = [cell for cell in cells if cell["budget"] == amount]
        order = [cell for cell in ranked(group) if bits(cell) is not None]
        tied = [cell for cell in order[1:] if not distinguishable(order[0], cell)]
        found.append(Finding(amount, group, order, tied))
    return found


def headline(results: dict, plain: bool = False) -> list[str]:
    """The answer: for each budget who is best, by how much and who ties; then what bounds it."""
    found = findings(results)
    sentences = [answer(results, finding, plain) for finding in found]
    sentences += against_unigram(results, found, plain)
    names = list(dict.fromkeys(c["label"] for finding in found for c in apart(finding.cells)))
    if names:
        verb = "is" if len(names) == 1 else "are"
        sentences.append(
            f"{notation.listed(names)} {verb} scored by pseudo-likelihood, which is not "
            "comparable, and ranked apart."
        )
    return sentences


def against_unigram(results: dict, found: list[Finding], plain: bool) -> list[str]:
    """Which comparable cells a unigram model of the training tokens is worse than, by the test that
    tells two cells apart."""
    reference, match = unigram(results), results["budget"]["match"]
    order = [cell for finding in found for cell in finding.order]
    if reference is None or not order:
        return []
    tied, behind = [], []
    for cell in order:
        name = cell["label"]
        if len(found) > 1:
            name += f" at {notation.budget(match, cell['budget'], plain)}"
        if not distinguishable(cell, reference):
            tied.append(name)
        elif bits(cell) > bits(reference):
            behind.append(name)
    verdicts = []
    if len(tied) + len(behind) == len(order):
        verdicts.append("no comparable cell beats it")
    if tied:
        verb = "is" if len(tied) == 1 else "are"
        verdicts.append(f"{notation.listed(tied)} {verb} not distinguishable from it")
    if behind and len(behind) < len(order):
        verdicts.append(f"{notation.listed(behind)} did worse")
    verdict = "; ".join(verdicts or ["every comparable cell beats it"])
    return [f"A unigram model needs {bits(reference):.3f} bits per byte; {verdict}."]


def answer(results: dict, finding: Finding, plain: bool) -> str:
    match = results["budget"]["match"]
    amount = notation.budget(match, finding.budget, plain)
    if not finding.order:
        return f"At {amount} no comparable cell has a held-out value."
    best, *others = finding.order
    when = f"At {amount} each"
    if match == "flops":
        equal = flops_spread(finding.cells) <= FLOPS_TOLERANCE
        when = f"At equal compute ({amount} each)"
        if not equal:
            when = f"At a budget of {amount} each, which was not spent equally"
    sentence = (
        f"{when}, {best['label']} predicts held-out text best, with {bits(best):.3f} bits per byte"
    )
    if not others:
        return sentence + "; there is no other comparable cell."
    gap = bits(others[0]) - bits(best)
    sentence += f", {gap:.3f} ({100 * gap / bits(others[0]):.1f}%) below {others[0]['label']}"
    if finding.tied == others[:1]:
        return f"{sentence}, but the two are not distinguishable."
    if finding.tied:
        names = notation.listed([cell["label"] for cell in finding.tied])
        return f"{sentence}, but is not distinguishable from {names}."
    rest = (
        "every other cell is distinguishable from it"
        if others[1:]
        else "the two are distinguishable"
    )
    return f"{sentence}; {rest}."
