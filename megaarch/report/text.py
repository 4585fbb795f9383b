"""The report for a terminal: plain ASCII within 80 columns, for a login node."""

import textwrap

from megaarch.report import cells as report_cells
from megaarch.report import notation
from megaarch.report.cells import Finding, bits, inherited, interval_of, spent, told_length
from megaarch.report.notation import finite
from megaarch.report.warnings import warnings_for

WIDTH = 80
NAME_WIDTH = 18
COLUMNS = (  # title, width
    ("bits/byte", 9),
    ("95% interval", 13),
    ("choice", 6),
    ("middle", 6),
    ("FLOPs", 7),
    ("params", 7),
    ("tok/s", 7),
)


def text(results: dict) -> str:
    """The study in at most 80 columns: the answer, a table for each budget, and the warnings.

    Cells are sorted by held-out bits per byte, lowest first; those that are not comparable stand
    apart, marked with an asterisk. `~` marks a cell not distinguishable from the best.
    """
    blocks = [f"Study {results['study']}"[:WIDTH]]
    blocks.append("\n".join(wrap(" ".join(report_cells.headline(results, plain=True)))))
    for finding in report_cells.findings(results):
        blocks.append(table(results, finding))
    blocks.append("\n".join(footnotes(results)))
    warnings = warnings_for(results)
    if warnings:
        lines = [line for warning in warnings for line in wrap(warning, "- ", "  ")]
        blocks.append("\n".join(["Read with care:", *lines]))
    return ascii_only("\n\n".join(blocks)) + "\n"


def wrap(sentence: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(sentence, WIDTH, initial_indent=first, subsequent_indent=rest)


def table(results: dict, finding: Finding) -> str:
    match = results["budget"]["match"]
    lines = wrap(f"At {notation.budget(match, finding.budget, plain=True)} each:")
    header = "cell".ljust(NAME_WIDTH)
    lines += ["", header + "".join(title.rjust(width + 1) for title, width in COLUMNS).rstrip()]
    lines.append("-" * len(lines[-1]))
    tied = [cell["label"] for cell in finding.tied]
    for cell in report_cells.ranked(finding.cells):
        lines.append(row(cell, "~" if cell["label"] in tied else ""))
    apart = report_cells.apart(finding.cells)
    if apart:
        lines += ["", "not comparable: pseudo-likelihood"]
        lines += [row(cell, "*") for cell in apart]
    return "\n".join(lines)


def row(cell: dict, mark: str) -> str:
    interval = interval_of(cell)
    heldout = cell["heldout"]
    values = (
        notation.fixed(bits(cell), 3, "-") + (mark or " "),
        f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "-",
        notation.fixed(heldout.get("choice_accuracy"), 3, "-"),
        notation.fixed(heldout.get("middle_bits_per_byte"), 3, "-"),
        notation.power(spent(cell), "-", plain=True),
        notation.count(cell.get("parameters"), "-"),
        speed(cell.get("tokens_per_second")),
    )
    widths = [width for _, width in COLUMNS]
    cut = [value[:width].rjust(width + 1) for value, width in zip(values, widths, strict=True)]
    return shortened(cell["label"]).ljust(NAME_WIDTH) + "".join(cut)


def speed(value: object) -> str:
    number = finite(value)
    if number is None:
        return "-"
    return f"{number:,.0f}" if number < 1e6 else notation.count(number)


def shortened(name: str) -> str:
    """The name within its column: both ends of a long one, for they tell cells apart."""
    if len(name) <= NAME_WIDTH:
        return name
    tail = NAME_WIDTH // 2 - 1
    return name[: NAME_WIDTH - tail - 2] + ".." + name[-tail:]


def footnotes(results: dict) -> list[str]:
    merged = report_cells.merged_cells(results)
    lines = []
    if any(finding.tied for finding in report_cells.findings(results)):
        lines.append("~ not distinguishable from the best at 95%")
    kinds = {cell["heldout"].get("interval_kind") for cell in merged} - {None}
    if kinds:
        lines.append("intervals: " + "; ".join(sorted(kinds)))
    if counts := items(merged):
        lines.append(f"held-out items: {counts}")
    filling = [c for c in merged if finite(c["heldout"].get("middle_bits_per_byte")) is not None]
    told = list(dict.fromkeys(c["name"] for c in filling if told_length(c)))
    if told and not all(map(told_length, filling)):
        verb = "is" if len(told) == 1 else "are"
        lines.append(f"middle: {notation.listed(told)} {verb} told the gap's length, others not")
    if any(map(inherited, merged)):
        lines.append("FLOPs: with those spent on the weights that a cell starts from")
    reference = [f"chance of the choice: {results.get('chance', 0.25)}"]
    unigram = finite(results.get("unigram_bits_per_byte"))
    if unigram is not None:
        reference.append(f"unigram model: {unigram:.3f} bits/byte")
    lines.append("; ".join(reference))
    return [part for line in lines for part in wrap(line)]


def items(cells: list[dict]) -> str:
    """How many held-out items each yardstick had: 64 continuation, 128 choice, 32 middle."""
    found: dict[str, set[int]] = {}
    for cell in cells:
        for kind, number in (cell["heldout"].get("items") or {}).items():
            if number:
                found.setdefault(kind, set()).add(int(number))
    return ", ".join(
        f"{'-'.join(map(str, sorted({min(numbers), max(numbers)})))} {kind}"
        for kind, numbers in found.items()
    )


def ascii_only(page: str) -> str:
    """A login node's terminal may know no Unicode: 3.02 × 10¹⁴ becomes 3.02e14."""
    page = page.replace(f" {notation.TIMES} 10", "e").replace(notation.MISSING, "-")
    return page.translate(notation.PLAIN_DIGITS).encode("ascii", "replace").decode("ascii")
