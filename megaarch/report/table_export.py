"""The table for other programs: CSV to compute with, LaTeX (booktabs) for a paper."""

from csv import DictWriter
from io import StringIO

from megaarch.evaluation.heldout_scores import INTERVALS
from megaarch.report import findings as report_findings
from megaarch.report import notation
from megaarch.report.merged_cells import MergedCell, merged_cells
from megaarch.report.warnings import unequal_flops
from megaarch.study.results import Results

IDENTITY = (
    "name",
    "size",
    "architecture",
    "objective",
    "preset",
    "parent",
    "budget",
    "adaptation",
    "seeds",
)
EXPENSE = (
    *("parameters", "non_embedding_parameters", "flops", "inherited_flops", "palm_flops"),
    *("seen_tokens", "target_tokens", "steps", "train_seconds", "tokens_per_second"),
    *("final_loss", "padding_share", "epochs", "precision", "learning_rate", "tuned"),
)
HELDOUT = ("continuation_bits_per_byte_raw", "interval_kind")
ITEMS = ("continuation_items", "choice_items", "middle_items")
MEANING = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def csv(found: Results | dict) -> str:
    """One line for each (name, size, budget), values as means over seeds; empty where missing.

    found: what results.json holds. Intervals are the columns `*_low` and `*_high`, and `*_items` is
    how many items a value rests on; `comparable` is False for pseudo-likelihoods.
    """
    measures = [f"{measure}{end}" for measure in INTERVALS for end in ("", "_low", "_high")]
    columns = [*IDENTITY, "comparable", *measures, *ITEMS, *HELDOUT, *EXPENSE]
    page = StringIO()
    writer = DictWriter(page, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for cell in merged_cells(Results.of(found)):
        heldout = cell.heldout
        line = dict(cell) | {"parent": cell.start} | dict(heldout)
        line |= {f"{kind}_items": number for kind, number in heldout.items.items()}
        for measure in INTERVALS:
            low, high = heldout.interval(measure) or (None, None)
            line |= {f"{measure}_low": low, f"{measure}_high": high}
        writer.writerow(line)
    return page.getvalue()


def latex(found: Results | dict) -> str:
    """A `table` environment for a paper that loads booktabs. found: what results.json holds.

    Bold: the best cell and those not distinguishable from it. Daggers: not comparable.
    """
    results = Results.of(found)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        r"  \begin{tabular}{llrrrrr}",
        r"    \toprule",
        r"    Cell & Architecture & Parameters & FLOPs & Bits per byte & Choice & Middle \\",
    ]
    for finding in report_findings.findings(results):
        amount = escaped(notation.plain(finding.amount))
        lines += [r"    \midrule", rf"    \multicolumn{{7}}{{l}}{{{amount} each}} \\"]
        strong = [cell.label for cell in finding.main.top]
        for cell in report_findings.ranked(finding.cells):
            lines.append(latex_row(cell, cell.label in strong))
        for others in (report_findings.diverged, report_findings.heirs, report_findings.apart):
            lines += [latex_row(cell, False) for cell in others(finding.cells)]
    caption = (
        "Held-out bits per byte of a continuation (with its 95\\% interval), accuracy of a "
        f"four-way choice (chance {results.chance}) and bits per byte of a middle. "
        "Bold: the best and what is not distinguishable from it."
    )
    if any(not cell.heldout.comparable for cell in results.cells):
        caption += r" $^{\dagger}$Pseudo-likelihood, not comparable."
    if any(cell.diverged for cell in merged_cells(results)):
        caption += r" $^{\S}$Without a value at some seeds, for training diverged."
    if any(cell.heir for cell in merged_cells(results)):
        caption += r" $^{\ddagger}$Trained longer, from other weights: ranked with no other."
    if any(cell.inherited_flops for cell in results.cells):
        caption += " FLOPs with those spent on the weights that a cell starts from."
    caption += "".join(f" {escaped(notation.plain(s))}" for s in unequal_flops(results))
    name = "".join(letter if letter.isalnum() else "-" for letter in results.study)
    lines += [
        r"    \bottomrule",
        r"  \end{tabular}",
        rf"  \caption{{{caption}}}",
        rf"  \label{{tab:{name}}}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def latex_row(cell: MergedCell, strong: bool) -> str:
    heldout, interval = cell.heldout, cell.heldout.interval()
    value = notation.fixed(cell.bits_per_byte, 3, "--")
    value = rf"\textbf{{{value}}}" if strong else value
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    flops = notation.plain(notation.power(cell.total_flops, "--"))
    mantissa, _, exponent = flops.partition("e")
    columns = (
        escaped(cell.label)
        + ("" if heldout.comparable else r"$^{\dagger}$")
        + (r"$^{\ddagger}$" if cell.heir else "")
        + (r"$^{\S}$" if cell.diverged else ""),
        escaped(notation.spelled(cell.architecture)),
        notation.count(cell.parameters, "--"),
        rf"${mantissa} \times 10^{{{exponent}}}$" if exponent else mantissa,
        value + spread,
        notation.fixed(heldout.choice_accuracy, 3, "--"),
        notation.fixed(heldout.middle_bits_per_byte, 3, "--"),
    )
    return "    " + " & ".join(columns) + r" \\"


def escaped(name: str) -> str:
    """`name` as LaTeX text."""
    return "".join(MEANING.get(c, "\\" + c if c in "&%$#_{}" else c) for c in name)
