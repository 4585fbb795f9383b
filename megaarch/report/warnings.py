"""Warns of what makes a comparison unfair or thin. Each sentence appears only with its cause."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megaarch.evaluation import heldout_scores
from megaarch.report import notation
from megaarch.report.flops_shares import head_share, unread_share
from megaarch.report.merged_cells import FLOPS_TOLERANCE, finetuned, merged_cells, place, seedless
from megaarch.study.results import CellResult, Results, without_seed
from megaarch.study.sweep_grid import AXES

PADDING_LIMIT = 0.05
PARAMETERS_TOLERANCE = 0.1  # of parameters
MATCHED_TOLERANCE = 0.02  # of parameters, where a study matches these
BATCH_TOLERANCE = 0.25  # of seen tokens a step
TARGETS_TOLERANCE = 0.5  # of target tokens
HEAD_TOLERANCE = 0.1  # of the head's share of a cell's FLOPs
TRIAL_LIMIT = 2.0  # how many times more, or less, compute a trial may have had than its cell
ENDS_LIMIT = 0.25  # of the rows of span corruption that end a document
SEEDS_WANTED = 3
ITEMS_WANTED = 100
DOCUMENTS_WANTED = 20

TWO_STACKS = (
    " An encoder-decoder passes each token through one of two stacks: at equal FLOPs it has up to twice the parameters "
    "(Wang et al. 2022)."
)

Cells = Sequence[CellResult]


def warnings_for(results: Results) -> list[str]:
    """Everything to know before believing the table, the causes of unfairness first.

    The study's own warnings come along; what holds for several cells is said once.
    """
    cells = results.cells
    found = [
        *unequal_flops(results),
        *unequal_parameters(results),
        *unequal_batches(results),
        *unequal_targets(results),
        *unequal_shares(results),
        *mixed_conditions(cells),
        *inherited_compute(cells),
        *shared_causes(cells),
        *few_seeds(cells),
        *few_items(cells),
        *shortened_prompts(cells),
    ]
    return list(dict.fromkeys([*found, *results.warnings]))


def warnings_of(cell: CellResult) -> list[str]:
    """Everything to know about one cell."""
    found = [(cause, cause.degree(cell)) for cause in CAUSES]
    said = [cause.own.format(cell=cell, degree=d) for cause, d in found if d is not None]
    return list(dict.fromkeys(said))


def _trial_ratio(cell: CellResult) -> str | None:
    """FLOPs of the trials that chose the learning rate over the cell's own."""
    ratio = cell.trial_flops / cell.flops if cell.trial_flops and cell.flops else 1.0
    return None if 1 / TRIAL_LIMIT <= ratio <= TRIAL_LIMIT else f"{ratio:.2g}"


def _share_above(share: float | None, limit: float) -> str | None:
    return notation.percent(share) if (share or 0.0) > limit else None


def _document_ends(cell: CellResult) -> str | None:
    """About which share of a cell's rows end a document where it is trained by T5's objective, for which the last
    span of a row is then the end of a document."""
    row, text = cell.section("model").get("sequence_length"), cell.data
    masked = cell.section("data").get("document_masks")
    if cell.objective != "span_corruption" or not (row and masked and text and text.train_tokens):
        return None
    share = min(row * (text.train_documents or 0) / text.train_tokens, 1.0)
    return f"about {notation.percent(share)}" if share > ENDS_LIMIT else None


@dataclass(frozen=True)
class Cause:
    """A weakness that one cell alone shows. degree: of a cell, in words, "" where there is nothing to add; None where
    the cell has none of it. own: the sentence about one `cell` and its `degree`. shared: about the `names` of all
    cells that have it, each with its degree."""

    degree: Callable[[CellResult], str | None]
    own: str
    shared: str


CAUSES = (
    Cause(
        lambda cell: cell.extrapolation and str(cell.extrapolation),
        "its learning rate ({cell.learning_rate}) is extrapolated: {degree}",
        "Learning rate extrapolated, by a law of a sweep of smaller cells: {names}. What the law misses, the "
        "ranking may show.",
    ),
    Cause(
        lambda cell: None if cell.tuned or cell.extrapolation else "",
        "its learning rate ({cell.learning_rate}) was not tuned",
        "Learning rate not tuned for {names}: a better rate could change the ranking.",
    ),
    Cause(
        lambda cell: "" if cell.learning_rate_at_edge else None,
        "its best learning rate ({cell.learning_rate}) lies at the edge of its grid",
        "Best learning rate at the edge of its grid for {names}: the optimum may lie beyond.",
    ),
    Cause(
        lambda cell: " and ".join(AXES[axis] for axis in cell.more_at_edge) or None,
        "its best {degree} lies at the edge of its grid",
        "Best choice at the edge of its grid: {names}. The optimum may lie beyond.",
    ),
    Cause(
        _trial_ratio,
        "its learning rate was tuned at {degree} of its compute",
        "Learning rate tuned at a share of the compute: {names}. The best rate shifts with it.",
    ),
    Cause(
        lambda c: (
            f"{notation.whole(c.skipped_steps)} of {notation.whole(c.steps)}"
            if c.skipped_steps
            else None
        ),
        "{degree} steps were skipped, for their loss or gradient was not finite",
        "Steps skipped, for their loss or gradient was not finite: {names}. They count as compute and taught nothing.",
    ),
    Cause(
        lambda cell: _share_above(cell.padding_share, PADDING_LIMIT),
        "{degree} of its rows is padding",
        "More than 5% padding: {names}. It costs time but counts as no compute.",
    ),
    Cause(
        lambda cell: _share_above(cell.truncated_share, 0.0),
        "{degree} of its {{input, target}} pairs were cut to fit, or of its documents left out",
        "Pairs of input and target cut to fit their limits, or documents of one token left out: {names}.",
    ),
    Cause(
        _document_ends,
        "{degree} of its rows end a document",
        "Rows of span corruption that end a document, in their last span: {names}. A scored continuation ends none, "
        "which costs the cell (docs/yardsticks.md).",
    ),
    Cause(
        lambda cell: f"{cell.epochs:.1f}" if (cell.epochs or 0) > 1 else None,
        "it read its training text {degree} times",
        "More than one epoch over the training text: {names}.",
    ),
)


def shared_causes(cells: Cells) -> Iterator[str]:
    everyone = {label(cell) for cell in cells}
    for cause in CAUSES:
        degrees: dict[str, dict[str, None]] = {}  # of budgets and seeds, each once
        for cell in cells:
            if (degree := cause.degree(cell)) is not None:
                degrees.setdefault(label(cell), {})[degree] = None
        if not degrees:
            continue
        affected = {name: notation.extent(list(each)) for name, each in degrees.items()}
        names = [f"{name} ({degree})" if degree else name for name, degree in affected.items()]
        if 1 < len(affected) == len(everyone) and not any(affected.values()):
            names = ["every cell"]
        yield cause.shared.format(names=notation.listed(names))


def by_budget(results: Results) -> Iterator[tuple[str, list[CellResult]]]:
    """Each budget as a phrase, with the cells that rank together there."""
    match = results.budget.match
    alone = {without_seed(cell) for cell in merged_cells(results) if not cell.ranks}
    groups: dict[tuple, list[CellResult]] = {}
    for cell in results.cells:
        if without_seed(cell) not in alone:
            groups.setdefault((place(cell, match), finetuned(cell)), []).append(cell)
    several = len({at.size for at, _ in groups}) > 1
    for at, tuned in sorted(
        groups, key=lambda key: (key[0].budget, key[0].adaptation or 0, key[1])
    ):
        size = at.size if several else None
        yield notation.budget(match, at.budget, at.adaptation, size), groups[at, tuned]


def extremes(
    results: Results, amount_of: Callable[[CellResult], float | None], of_size: bool = False
) -> Iterator[tuple[str, tuple[float, CellResult], tuple[float, CellResult]]]:
    """Of the cells that rank together at each budget those with the least and the most of an amount, where any has
    some. of_size: of each size by itself, where an amount follows from the size."""
    for budget, group in by_budget(results):
        sizes: dict[str | None, list[tuple[float, CellResult]]] = {}
        for cell in group:
            if (amount := amount_of(cell)) is not None:
                sizes.setdefault(cell.size if of_size else None, []).append((amount, cell))
        for amounts in sizes.values():
            order = sorted(amounts, key=lambda pair: (pair[0], label(pair[1])))
            yield budget, order[0], order[-1]


def unequal_flops(results: Results) -> Iterator[str]:
    """Cells that rank together whose training FLOPs, with inherited ones, differ by more than 2%."""
    match = results.budget.match
    why = "" if match == "flops" else f", as matching {notation.MATCHED.get(match)} allows"
    for budget, (least, frugal), (most, greedy) in extremes(
        results, lambda c: c.total_flops or None
    ):
        if most / least - 1 > FLOPS_TOLERANCE:
            yield (
                f"Unequal compute at {budget}: {label(greedy)} spent {100 * (most / least - 1):.1f}% more FLOPs than "
                f"{label(frugal)}{why}."
            )


def unequal_parameters(results: Results) -> Iterator[str]:
    """Of each size, the two cells that rank together whose parameters differ most: by more than 2% where a study
    matches parameters, else by more than 10%."""
    match = results.budget.match
    matched, what = match == "parameters", notation.MATCHED.get(match, match)
    limit = MATCHED_TOLERANCE if matched else PARAMETERS_TOLERANCE
    why = "though the study matches them" if matched else f"for the study matches {what}"
    widest: dict[str | None, tuple[float, CellResult, CellResult]] = {}
    for _, group in by_budget(results):
        counts = [(cell.size, cell.parameters, cell) for cell in group if cell.parameters]
        for size in dict.fromkeys(size for size, _, _ in counts):
            order = sorted((c for c in counts if c[0] == size), key=lambda c: c[1])
            (_, least, small), (_, most, large) = order[0], order[-1]
            if most / least - 1 > widest.get(size, (limit,))[0]:
                widest[size] = (most / least - 1, small, large)
    for spread, small, large in widest.values():
        yield (
            f"Unequal parameters, {why}: {label(large)} has {notation.count(large.parameters)}, "
            f"{notation.percent(spread)} more than {label(small)} with {notation.count(small.parameters)}."
            + ("" if matched or large.architecture != "encoder_decoder" else TWO_STACKS)
        )


def tokens_a_step(cell: CellResult) -> float | None:
    return cell.seen_tokens / cell.steps if cell.seen_tokens and cell.steps else None


def unequal_batches(results: Results) -> Iterator[str]:
    """Cells of one budget whose seen tokens a step differ by more than 25%: equal compute buys the
    one with the larger batches fewer steps."""
    for budget, (least, small), (most, large) in extremes(results, tokens_a_step):
        if most / least - 1 > BATCH_TOLERANCE:
            yield (
                f"Unequal batches at {budget}: {label(large)} sees {most:,.0f} tokens a step in {large.steps:,.0f} "
                f"steps and {label(small)} {least:,.0f} in {small.steps:,.0f}: training.global_batch_size counts rows, "
                "and training.global_batch_tokens would keep them equal."
            )


def unequal_targets(results: Results) -> Iterator[str]:
    """Cells of one budget and size of which one learns from 1.5 times the target tokens of another."""
    for budget, (least, sparse), (most, dense) in extremes(
        results, lambda cell: cell.target_tokens or None, of_size=True
    ):
        if most > (1 + TARGETS_TOLERANCE) * least:
            yield (
                f"Unequal targets at {budget}: {label(dense)} predicts {most:,.0f} tokens and {label(sparse)} "
                f"{least:,.0f}. A model that predicts more of what it sees learns more from it, early in "
                "training above all."
            )


def unequal_shares(results: Results) -> Iterator[str]:
    """Cells of one budget and size whose heads take shares of their FLOPs that differ by more than 10%, or
    the outputs of their last layers that nothing reads by more than 2%."""
    for share_of, tolerance, what, why in (
        (
            head_share,
            HEAD_TOLERANCE,
            "Unequal heads at {}: the output layer takes",
            "These shares fall as models grow, so the ranking of larger ones may be another.",
        ),
        (
            unread_share,
            FLOPS_TOLERANCE,
            "Unequal last layers at {}: outputs that no target reads take",
            "These shares fall with the number of layers, so deeper models may rank otherwise (docs/counting.md).",
        ),
    ):
        for budget, (least, light), (most, heavy) in extremes(results, share_of, True):
            if most - least > tolerance:
                yield (
                    f"{what.format(budget)} {notation.percent(most)} of the FLOPs of {label(heavy)} and "
                    f"{notation.percent(least)} of those of {label(light)}. {why}"
                )


def inherited_compute(cells: Cells) -> Iterator[str]:
    """Cells that start from other weights; a sentence for all seeds."""
    heirs = [cell for cell in cells if cell.start and cell.adaptation is None]
    first: dict[tuple[str, str], CellResult] = {}
    for cell in heirs:
        first.setdefault((label(cell), seedless(cell.start)), cell)
    for cell in first.values():
        counted = "whose compute is not known and not counted"
        if cell.inherited_flops:
            spent = notation.power(cell.inherited_flops)
            counted = f"so {spent} FLOPs spent before count as its own"
        yield f"{label(cell)} starts from the weights of {seedless(cell.start)}, {counted}."


def few_seeds(cells: Cells) -> Iterator[str]:
    seeds: dict[tuple, set] = {}
    for cell in cells:
        seeds.setdefault(without_seed(cell), set()).add(cell.seed)
    counts = [len(found) for found in seeds.values()]
    fewest = min(counts)
    if fewest < SEEDS_WANTED:
        amount = "One seed" if fewest == 1 else f"{fewest} seeds"
        which = " in some cells" if fewest != max(counts) else " a cell"
        rest = (
            "the intervals do not hold the spread between training runs"
            if fewest == 1
            else "the intervals over seeds are wide"
        )
        yield f"{amount}{which}: {rest}."


def few_items(cells: Cells) -> Iterator[str]:
    for kind in ("continuation", "choice", "middle"):
        counts = [count for cell in cells if (count := cell.heldout.items.get(kind))]
        if counts and min(counts) < ITEMS_WANTED:
            yield f"Only {min(counts)} held-out {kind} items: differences must be large to show."
    documents = [len(set(of.documents)) for cell in cells if (of := cell.heldout.paired)]
    if documents and min(documents) == 1:
        yield "Items of only one held-out document: what holds for others cannot be told from it."
    elif documents and min(documents) < DOCUMENTS_WANTED:
        yield (
            f"Items of only {min(documents)} held-out documents: intervals over so few are too narrow, and by one it is "
            "judged whether a cell reads its prefix (docs/yardsticks.md)."
        )


def shortened_prompts(cells: Cells) -> Iterator[str]:
    if said := heldout_scores.shortened_prompts(cell.heldout.tasks for cell in cells):
        yield said


def mixed_conditions(cells: Cells) -> Iterator[str]:
    """Cells that were not run alike: data, tokenizer, commit, precision, hardware, share of it,
    versions."""
    for what, condition in CONDITIONS.items():
        groups: dict[str, list[str]] = {}
        for cell in cells:
            value = condition(cell)
            if value is not None:
                groups.setdefault(repr(value), []).append(label(cell))
        if len(groups) > 1:
            sides = [notation.listed(list(dict.fromkeys(names))) for names in groups.values()]
            yield f"Cells differ in {what}: " + "; ".join(sides) + "."


def data_of(cell: CellResult) -> object:
    """The dataset's fingerprint where it is known, else the settings that choose the text."""
    data = cell.section("data")
    chosen = [data.get(key) for key in ("source", "kind", "text_field", "held_out")]
    return cell.environment.fingerprint or (chosen if any(v is not None for v in chosen) else None)


def tokenizer_of(cell: CellResult) -> object:
    data = cell.section("data")
    return cell.environment.tokenizer or ([data["tokenizer"]] if "tokenizer" in data else None)


def hardware_of(cell: CellResult) -> object:
    hardware = cell.environment.hardware
    return hardware and (hardware.cpu, hardware.cores, hardware.gpu)


def processes_of(cell: CellResult) -> object:
    layout = cell.section("parallel")
    sizes = [size for name, size in layout.items() if "parallel" in name and type(size) is int]
    return math.prod(sizes)


def share_of(cell: CellResult) -> object:
    share = (cell.environment.threads, cell.environment.lanes)
    return share if any(share) else None


CONDITIONS: dict[str, Callable[[CellResult], object]] = {
    "data": data_of,
    "tokenizer": tokenizer_of,
    "commit": lambda cell: cell.environment.commit,
    "precision": lambda cell: cell.precision,
    "hardware": hardware_of,
    "number of processes, so their speeds do not compare": processes_of,
    "threads, or in how many cells ran side by side, so their speeds do not compare": share_of,
    "versions": lambda cell: sorted((cell.environment.versions or {}).items()) or None,
}


def label(cell: CellResult) -> str:
    return f"{cell.name} {cell.size}" if cell.size else cell.name
