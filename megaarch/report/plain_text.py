"""The report for a terminal: plain ASCII within 80 columns, for a login node."""

import textwrap
from collections.abc import Sequence

from megaarch.report import findings as report_findings
from megaarch.report import notation
from megaarch.report.findings import Finding
from megaarch.report.headline import headline
from megaarch.report.merged_cells import MergedCell, before_adaptation, interval_kinds, merged_cells
from megaarch.report.warnings import warnings_for
from megaarch.report.yardsticks import (
    GAIN,
    TASKS,
    Score,
    chance_of,
    knows_length,
    lengths,
    of_length,
    of_task,
    of_unseen,
    unseen,
)
from megaarch.study.results import Results

WIDTH = 80
NAME_WIDTH = 18
Columns = Sequence[tuple[str, int]]  # title, width
COLUMNS = (
    ("bits/byte", 9),
    ("95% interval", 13),
    ("choice", 6),
    ("middle", 6),
    ("FLOPs", 7),
    ("params", 7),
    ("tok/s", 7),
)

CHANGE = 14  # letters of two values
CHANGES = (
    ("bits/byte", CHANGE + 1),
    ("gain", CHANGE),
    ("choice", CHANGE),
    ("FLOPs", 7),
    ("tokens", 6),
)


def text(found: Results | dict) -> str:
    """The study in at most 80 columns: the answer, a table for each budget, and the warnings.

    found: what results.json holds. Cells are sorted by held-out bits per byte, lowest first; those
    that are not comparable stand apart, marked with an asterisk. `~` marks a cell not
    distinguishable from the best.
    """
    results = Results.of(found)
    findings, cells = report_findings.findings(results), merged_cells(results)
    blocks = [
        [f"Study {results.study}"[:WIDTH]],
        wrap(" ".join(headline(results))),
        *(table(f) if f.adaptation is None else adaptation_table(f, cells) for f in findings),
        footnotes(results, findings, cells),
    ]
    if warnings := warnings_for(results):
        lines = [line for warning in warnings for line in wrap(warning, "- ", "  ")]
        blocks.append(["Read with care:", *lines])
    return ascii_only("\n\n".join("\n".join(lines) for lines in blocks)) + "\n"


def wrap(sentence: str, first: str = "", rest: str = "") -> list[str]:
    sentence = ascii_only(sentence)  # no line may end within a power of ten
    return textwrap.wrap(sentence, WIDTH, initial_indent=first, subsequent_indent=rest)


def heading(columns: Columns) -> list[str]:
    header = "cell".ljust(NAME_WIDTH) + "".join(f" {title:>{width}}" for title, width in columns)
    return ["", header, "-" * len(header)]


def line(cell: MergedCell, columns: Columns, values: Sequence[str]) -> str:
    name = notation.shortened(cell.label, NAME_WIDTH, NAME_WIDTH // 2 - 1, "..")
    shown = (f" {text[:width]:>{width}}" for text, (_, width) in zip(values, columns, strict=True))
    return name.ljust(NAME_WIDTH) + "".join(shown)


def table(finding: Finding) -> list[str]:
    lines = [*wrap(f"At {finding.amount} each:"), *heading(COLUMNS)]
    lines += [row(cell, finding) for cell in report_findings.ranked(finding.cells)]
    for words, group in (
        (
            "without a value at some seeds, for training diverged: not ranked",
            report_findings.diverged,
        ),
        ("trained longer, from other weights", report_findings.heirs),
        ("not comparable: pseudo-likelihood", report_findings.apart),
        ("finetuned: ranked by tasks alone", report_findings.tuned),
    ):
        if cells := group(finding.cells):
            lines += ["", words, *(row(cell, finding) for cell in cells)]
    return [*lines, *by_length(report_findings.comparable(finding.cells)), *by_task(finding.cells)]


def adaptation_table(finding: Finding, cells: list[MergedCell]) -> list[str]:
    """Adapted cells, best first, those that rank with no other behind them, each value behind that of the
    cell whose weights it started from."""
    lines = wrap(f"At {finding.amount} each (before -> after; FLOPs and tokens of both):")
    lines += heading(CHANGES)
    for cell in report_findings.in_one_table(finding.cells):
        before = before_adaptation(cells, cell)
        changes = [
            before_after(before and read(before), read(cell))
            for read in (
                lambda cell: cell.bits_per_byte,
                lambda cell: cell.heldout.prefix_gain,
                lambda cell: cell.heldout.choice_accuracy,
            )
        ]
        values = (
            changes[0] + mark(cell, finding),
            *changes[1:],
            notation.plain(notation.power(cell.total_flops, "-")),
            notation.count(cell.total_tokens, "-"),
        )
        lines.append(line(cell, CHANGES, values))
    return lines


def mark(cell: MergedCell, finding: Finding) -> str:
    """What stands behind the cell's bits per byte: that they are no likelihood, or not told from the best."""
    return "*" if not cell.heldout.comparable else "~" if cell.label in finding.tied else " "


def before_after(before: float | None, after: float | None) -> str:
    """Both values, with fewer digits where their column has no room: one that is cut is another number."""
    texts = (
        f"{notation.fixed(before, digits, '-')} -> {notation.fixed(after, digits, '-')}"
        for digits in (3, 2, 1, 0)
    )
    return next((text for text in texts if len(text) <= CHANGE), "-")


def by_length(cells: list[MergedCell]) -> list[str]:
    """A table of continuations by their length, and what the prefix gains; empty where there is one
    length or none."""
    each = lengths([held for cell in cells for held in cell.heldout.each])
    if len(each) < 2:
        return []
    columns = [(title, 6) for title in (*(f"{length} tok" for length in each), "gain", "from")]
    lines = ["", "bits/byte by length of the continuation; what the right prefix saves"]
    lines += ["('from': the lower end of its interval):", *heading(columns)]
    for cell in cells:
        scores = [cell.heldout.score(of_length(length)).value for length in each]
        gain = cell.heldout.score(GAIN)
        scores += [gain.value, gain.interval[0] if gain.interval else None]
        mark = "!" if cell.heldout.reads_prefix is False else ""
        lines.append(line(cell, columns, [notation.fixed(s, 3, "-") for s in scores]) + mark)
    return lines


def by_task(cells: list[MergedCell]) -> list[str]:
    """The mean accuracy of each cell over the tasks, those of pseudo-likelihoods last; empty where there are none."""
    scored = [(cell, cell.heldout.score(TASKS)) for cell in cells]
    scored = [(cell, score) for cell, score in scored if score.value is not None]
    if not scored:
        return []
    tasks = scored[0][0].heldout.tasks
    chance = notation.fixed(chance_of(scored[0][0].heldout), missing="not known")
    lines = [
        "",
        f"mean accuracy of {len(tasks)} tasks (chance {chance}); 'above': how many of them",
    ]
    whole = of_unseen(unseen([held for cell in cells for held in cell.heldout.each]))
    known = any(cell.heldout.score(whole).value is not None for cell, _ in scored)
    columns = [("mean", 6), ("95% interval", 13), ("above", 6)]
    columns += [("unseen", 7), ("95% interval", 13)] if known else []
    lines += ["lie above chance with their whole interval:", *heading(columns)]
    scored.sort(key=lambda pair: (not pair[0].heldout.comparable, -(pair[1].value or 0.0)))
    for cell, score in scored:
        each = [(cell.heldout.score(of_task(name)).interval, t.chance) for name, t in tasks.items()]
        above = sum(bool(ends and ends[0] > (chance or 0.0)) for ends, chance in each)
        values = [*accuracy(score), str(above)]
        values += accuracy(cell.heldout.score(whole)) if known else []
        lines.append(line(cell, columns, values) + ("" if cell.heldout.comparable else "*"))
    if known:
        lines += ["", f"unseen: {whole.phrase}"]
    return lines


def accuracy(score: Score) -> tuple[str, str]:
    """A value and its interval."""
    low, high = score.interval or (None, None)
    return notation.fixed(score.value), f"{notation.fixed(low)}-{notation.fixed(high)}"


def row(cell: MergedCell, finding: Finding) -> str:
    heldout, interval, speed = cell.heldout, cell.heldout.interval(), cell.tokens_per_second
    values = (
        notation.fixed(cell.bits_per_byte, 3, "-") + mark(cell, finding),
        f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "-",
        notation.fixed(heldout.choice_accuracy, 3, "-"),
        notation.fixed(heldout.middle_bits_per_byte, 3, "-"),
        notation.plain(notation.power(cell.total_flops, "-")),
        notation.count(cell.parameters, "-"),
        notation.whole(speed, "-") if (speed or 0) < 1e6 else notation.count(speed),
    )
    return line(cell, COLUMNS, values)


def footnotes(results: Results, findings: list[Finding], cells: list[MergedCell]) -> list[str]:
    lines = []
    if any(finding.tied for finding in findings):
        lines.append("~ not distinguishable from the best at 95%")
    if not all(cell.heldout.comparable for cell in cells):
        lines.append("* pseudo-likelihood: each token given both of its sides; not comparable")
    if any(cell.heldout.reads_prefix is False for cell in cells):
        lines.append("! its own prefix is not shown to serve it better than a wrong document's")
    if kinds := interval_kinds(cells):
        lines.append("intervals: " + "; ".join(kinds))
    if counts := items(cells):
        lines.append(f"held-out items: {counts}")
    filling = [cell for cell in cells if cell.heldout.middle_bits_per_byte is not None]
    told = list(dict.fromkeys(cell.name for cell in filling if knows_length(cell.objective)))
    if told and not all(knows_length(cell.objective) for cell in filling):
        lines.append(f"middle: {notation.are(told)} told the gap's length, others not")
    if any(cell.inherited_flops for cell in cells):
        lines.append("FLOPs: with those spent on the weights that a cell starts from")
    reference = f"chance of the choice: {results.chance}"
    if results.unigram_bits_per_byte is not None:
        reference += f"; unigram model: {results.unigram_bits_per_byte:.3f} bits/byte"
    return [part for line in (*lines, reference) for part in wrap(line)]


def items(cells: list[MergedCell]) -> str:
    """How many held-out items each yardstick had: 64 continuation, 128 choice, 32 middle."""
    found: dict[str, set[int]] = {}
    for cell in cells:
        for kind, number in cell.heldout.items.items():
            if number:
                found.setdefault(kind, set()).add(number)
    return ", ".join(
        f"{'-'.join(map(str, sorted({min(numbers), max(numbers)})))} {kind}"
        for kind, numbers in found.items()
    )


def ascii_only(page: str) -> str:
    """A login node's terminal may know no Unicode: 3.02 × 10¹⁴ becomes 3.02e14."""
    page = notation.plain(page).replace(notation.MISSING, "-")
    return page.encode("ascii", "replace").decode("ascii")
