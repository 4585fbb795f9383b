"""The cells of a study as the report reads them: seeds merged, ranked, told apart or not.

A merged cell has the shape of a cell of `results.json`, with means over seeds in place of values,
`seeds` (how many), and `label` (its name, with its size where the study has several).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaarch.study.intervals import paired_interval
from megaarch.study.report import notation
from megaarch.study.report.notation import finite

FLOPS_TOLERANCE = 0.02
MEASURES = {
    "continuation_bits_per_byte": "continuation_interval",
    "choice_accuracy": "choice_interval",
    "middle_bits_per_byte": "middle_interval",
}
# Student's t, two-sided 95%, for 1 to 10 degrees of freedom.
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


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


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t (Abramowitz and Stegun 26.7.5 above 10 degrees)."""
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z, v = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def t_interval(values: Sequence[float]) -> list[float]:
    """The 95% interval of the mean of two or more values."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    half = student_t(n - 1) * math.sqrt(variance / n)
    return [mean - half, mean + half]


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
    """The seeds of one cell as one: means, and intervals over seeds where there are several."""
    first = cells[0]
    merged = dict(first) | {"seeds": len(cells), "heldout": dict(first["heldout"])}
    if len(cells) == 1:
        return merged
    for key, value in first.items():
        if finite(value) is not None and key not in ("seed", "budget"):
            merged[key] = mean_of([cell.get(key) for cell in cells])
    heldout = merged["heldout"]
    for measure, interval in MEASURES.items():
        values = [finite(cell["heldout"].get(measure)) for cell in cells]
        values = [value for value in values if value is not None]
        if len(values) < len(cells):  # a seed without a value: no mean may hide it
            heldout[measure] = heldout[interval] = None
            continue
        heldout[measure] = sum(values) / len(values)
        heldout[interval] = t_interval(values)
    heldout["continuation_bits_per_byte_raw"] = mean_of(
        [cell["heldout"].get("continuation_bits_per_byte_raw") for cell in cells]
    )
    heldout["interval_kind"] = "seeds"
    merged["curve"] = mean_points([cell["curve"] for cell in cells])
    merged["losses"] = mean_points([cell["losses"] for cell in cells])
    merged["tuned"] = all(cell.get("tuned") for cell in cells)
    merged["learning_rate_at_edge"] = any(cell.get("learning_rate_at_edge") for cell in cells)
    merged["warnings"] = list(dict.fromkeys(w for cell in cells for w in cell.get("warnings", [])))
    return merged


def mean_of(values: Sequence) -> float | None:
    numbers = [finite(value) for value in values]
    return None if None in numbers else sum(numbers) / len(numbers)


def mean_points(curves: list[list[dict]]) -> list[dict]:
    """The mean of curves point by point; the first curve alone where their steps differ."""
    steps = [[point["step"] for point in curve] for curve in curves]
    if any(other != steps[0] for other in steps):
        return curves[0]
    return [
        {key: mean_of([point.get(key) for point in points]) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def flops_spread(cells: list[dict]) -> float:
    """How much more FLOPs the cell that spent most spent than the one that spent least, a share."""
    spent = [flops for flops in (finite(cell.get("flops")) for cell in cells) if flops]
    return max(spent) / min(spent) - 1 if spent else 0.0


def bits(cell: dict) -> float | None:
    """Held-out bits per byte of the continuation."""
    return finite(cell["heldout"].get("continuation_bits_per_byte"))


def comparable(cell: dict) -> bool:
    return bool(cell["heldout"].get("comparable", True))


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


def distinguishable(
    cell_a: dict, cell_b: dict, measure: str = "continuation_bits_per_byte"
) -> bool:
    """Whether two cells differ by more than chance, at 95%.

    One seed each: by a paired bootstrap, the interval of their difference over the same held-out
    documents leaves out zero. Several seeds: their intervals over seeds leave a gap. A cell
    without an interval is distinguishable from none; nor is one that is not comparable.
    """
    if not (comparable(cell_a) and comparable(cell_b)):
        return False
    paired = [cell["heldout"].get("paired") for cell in (cell_a, cell_b)]
    single = all(cell.get("seeds", 1) == 1 for cell in (cell_a, cell_b))
    if single and all(paired) and measure == "continuation_bits_per_byte":
        between = paired_interval(*paired)
        if between is not None:
            return between[0] > 0 or between[1] < 0
    a, b = interval_of(cell_a, measure), interval_of(cell_b, measure)
    return a is not None and b is not None and (a[1] < b[0] or b[1] < a[0])


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
    unigram = finite(results.get("unigram_bits_per_byte"))
    order = [cell for finding in found for cell in finding.order]
    if unigram is not None and order:
        match = results["budget"]["match"]
        behind = [
            cell["label"]
            + (f" at {notation.budget(match, cell['budget'], plain)}" if len(found) > 1 else "")
            for cell in order
            if bits(cell) >= unigram
        ]
        verdict = "every comparable cell beats it"
        if len(behind) == len(order):
            verdict = "no comparable cell beats it"
        elif behind:
            verdict = f"{notation.listed(behind)} did not beat it"
        sentences.append(f"A unigram model needs {unigram:.3f} bits per byte; {verdict}.")
    names = list(dict.fromkeys(c["label"] for finding in found for c in apart(finding.cells)))
    if names:
        verb = "is" if len(names) == 1 else "are"
        sentences.append(
            f"{notation.listed(names)} {verb} scored by pseudo-likelihood, which is not "
            "comparable, and ranked apart."
        )
    return sentences


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
    return f"{sentence}; every other cell is distinguishable from it."
