"""The tables of the page: the cells of a budget ranked, and each adapted cell behind what it was before."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megaarch.report import findings as report_findings
from megaarch.report import notation
from megaarch.report.axes import Looks
from megaarch.report.findings import Finding
from megaarch.report.merged_cells import MergedCell, before_adaptation
from megaarch.report.yardsticks import TASKS, of_unseen, unseen

DIVERGED = (
    "Without a value at some seeds, for training diverged: a mean over the others would favour it."
)
PSEUDO = (
    "Pseudo-likelihood: each token given both of its sides. Not comparable with the rows above."
)
LONGER = "Trained longer, from other weights: ranked with no other."
TUNED = "Finetuned on pairs of input and target: ranked by tasks, and never by raw text."


class Column(NamedTuple):
    """A column of the table. says: what the pointer shows. value: to sort by."""

    title: str
    says: str
    value: Callable[[MergedCell], float | None]
    shown: Callable[[float | None], str]


FLOPS = Column(
    "FLOPs",
    "useful training FLOPs, with those spent on the weights it starts from",
    lambda cell: cell.total_flops,
    notation.power,
)
COLUMNS = (
    Column(
        "Bits per byte",
        "held-out continuation given its prefix; lower is better",
        lambda cell: cell.bits_per_byte,
        notation.fixed,
    ),
    Column(
        "95% interval",
        "over documents, and over seeds where there are several",
        lambda cell: (cell.heldout.interval() or [None])[0],
        notation.fixed,  # `row` shows both ends
    ),
    Column(
        "Prefix gain",
        "bits per byte that the right prefix saves against that of another document",
        lambda cell: cell.heldout.prefix_gain,
        notation.fixed,
    ),
    Column(
        "Choice",
        "accuracy of the four-way choice of the true continuation",
        lambda cell: cell.heldout.choice_accuracy,
        notation.percent,
    ),
    Column(
        "Middle",
        "bits per byte of a middle given both its sides, whose length some are told",
        lambda cell: cell.heldout.middle_bits_per_byte,
        notation.fixed,
    ),
    Column(
        "Tasks",
        "mean accuracy over the tasks, each by rank classification",
        lambda cell: cell.heldout.score(TASKS).value,
        notation.percent,
    ),
    Column("Parameters", "all, with embeddings", lambda cell: cell.parameters, notation.count),
    FLOPS,
    Column(
        "Seen",
        "tokens that passed through the model",
        lambda cell: cell.seen_tokens,
        notation.count,
    ),
    Column("Targets", "tokens that carried loss", lambda cell: cell.target_tokens, notation.count),
    Column("Steps", "optimizer steps", lambda cell: cell.steps, lambda n: notation.fixed(n, 0)),
    Column(
        "Tokens/s",
        "seen tokens per second of training",
        lambda cell: cell.tokens_per_second,
        notation.whole,
    ),
    Column("Time", "training time", lambda cell: cell.train_seconds, notation.duration),
)
KEPT = COLUMNS[:2]  # others are left out where no cell has a value
# of the table of adaptations: what is shown before and after, and what was spent on both
CHANGED = (COLUMNS[0], *COLUMNS[2:6])
SPENT = (
    FLOPS,
    Column(
        "Seen",
        "tokens that passed through the model, with those of the weights it starts from",
        lambda cell: cell.total_tokens,
        notation.count,
    ),
)


def columns_of(cells: Sequence[MergedCell]) -> list[Column]:
    """Returns the columns in which a cell has a value, and behind the tasks those that none was trained on."""
    names = unseen([held for cell in cells for held in cell.heldout.each])
    yardstick = of_unseen(names)
    whole = Column(
        yardstick.title,
        f"mean accuracy over tasks that none was trained on: {', '.join(names)}",
        lambda cell: cell.heldout.score(yardstick).value,
        notation.percent,
    )
    every = [
        c for column in COLUMNS for c in (column, *([whole] if column.title == "Tasks" else ()))
    ]
    return [c for c in every if c in KEPT or any(c.value(cell) is not None for cell in cells)]


def table(finding: Finding, columns: Sequence[Column], look: Looks) -> dict[str, Any]:
    """Cells of one budget, best first. groups: those that are not ranked, below a sentence that says why."""
    ranked = report_findings.ranked(finding.cells)
    ends = [end for cell in ranked for end in interval_or_value(cell)]
    span = (min(ends), max(ends)) if ends and max(ends) > min(ends) else None
    groups = (
        (DIVERGED, report_findings.diverged(finding.cells)),
        (LONGER, report_findings.heirs(finding.cells)),
        (PSEUDO, report_findings.apart(finding.cells)),
        (TUNED, report_findings.tuned(finding.cells)),
    )
    return {
        "title": f"{finding.amount} each",
        "columns": columns,
        "ranked": [row(c, columns, look, c.label in finding.tied, span) for c in ranked],
        "groups": [
            (words, [row(cell, columns, look) for cell in group])
            for words, group in groups
            if group
        ],
    }


def adaptation_table(finding: Finding, cells: Sequence[MergedCell], look: Looks) -> dict[str, Any]:
    """As `table`: adapted cells, best first, those that rank with no other behind them, each value behind
    that of the cell whose weights it started from."""
    order = report_findings.in_one_table(finding.cells)
    changed = [c for c in CHANGED if any(c.value(cell) is not None for cell in order)]
    rows = []
    for cell in order:
        before = before_adaptation(cells, cell)
        numbers = [
            (before_after(c.shown, c.value(before) if before else None, value), value)
            for c in changed
            for value in [c.value(cell)]
        ]
        numbers += [(c.shown(c.value(cell)), c.value(cell)) for c in SPENT]
        objectives = before_after(str, before and before.objective, cell.objective)
        kind = notation.spelled(f"{cell.architecture}, {objectives}")
        found = row(cell, KEPT, look, cell.label in finding.tied)
        rows.append(found | {"parent": "", "kind": kind, "numbers": numbers})
    columns = [*changed, *SPENT]
    return {"title": f"{finding.amount} each", "columns": columns, "ranked": rows, "groups": []}


def before_after(shown: Callable[[Any], str], before: Any, after: Any) -> str:
    """Both values with an arrow between them."""
    return f"{notation.MISSING if before is None else shown(before)} \u2192 {shown(after)}"


def interval_or_value(cell: MergedCell) -> list[float]:
    """The cell's value and the ends of its interval, as far as they are known, in order."""
    known = [*(cell.heldout.interval() or []), cell.bits_per_byte]
    return sorted(end for end in known if end is not None)


def row(
    cell: MergedCell,
    columns: Sequence[Column],
    look: Looks,
    tied: bool = False,
    span: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A row as the page shows it. parent: empty where it starts from none. pseudo: whether its bits per byte are no
    likelihood, wherever it stands. unread: whether the cell's own prefix is not
    shown to serve it better than a wrong one. numbers: each a text and the value to sort by. strip: where the interval
    and its value stand in the ranked cells' span, in percent."""
    values = [column.value(cell) for column in columns]
    texts = [column.shown(value) for column, value in zip(columns, values, strict=True)]
    interval = cell.heldout.interval()
    texts[1] = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else notation.MISSING
    return {
        "label": cell.label,
        "kind": notation.spelled(f"{cell.architecture}, {cell.objective}"),
        "seeds": cell.seeds,
        "parent": cell.parent.partition("/")[0] if cell.parent else cell.start or "",
        "tied": tied,
        "pseudo": not cell.heldout.comparable,
        "unread": cell.heldout.reads_prefix is False,
        "colour": look[cell.label].variable,
        "numbers": [(t, "" if v is None else v) for t, v in zip(texts, values, strict=True)],
        "strip": strip(cell, span),
    }


def strip(cell: MergedCell, span: tuple[float, float] | None) -> dict[str, float] | None:
    value = cell.bits_per_byte
    if span is None or value is None:
        return None
    low, high = cell.heldout.interval() or (value, value)
    ends = {"low": low, "middle": value, "high": high}
    width = span[1] - span[0]
    return {name: round(4 + 92 * (x - span[0]) / width, 2) for name, x in ends.items()}
