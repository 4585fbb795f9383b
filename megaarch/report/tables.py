"""The table for other programs: CSV to compute with, LaTeX (booktabs) for a paper."""

from csv import DictWriter
from io import StringIO

from megaarch.report import cells as report_cells
from megaarch.report import notation
from megaarch.report.cells import MEASURES, bits, comparable, inherited, interval_of, spent
from megaarch.report.warnings import unequal_flops

IDENTITY = ("name", "size", "architecture", "objective", "preset", "parent", "budget", "seeds")
EXPENSE = (
    "parameters",
    "non_embedding_parameters",
    "flops",
    "inherited_flops",
    "palm_flops",
    "seen_tokens",
    "target_tokens",
    "steps",
    "train_seconds",
    "tokens_per_second",
    "final_loss",
    "padding_share",
    "epochs",
    "precision",
    "learning_rate",
    "tuned",
)
ITEMS = ("continuation_items", "choice_items", "middle_items")
MEANING = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def csv(results: dict) -> str:
    """One line for each (name, size, budget), values as means over seeds; empty where missing.

    Intervals are the columns `*_low` and `*_high`, and `*_items` is how many items a value rests on;
    `comparable` is False for pseudo-likelihoods.
    """
    heldout = [
        "comparable",
        *(f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")),
        *ITEMS,
        "continuation_bits_per_byte_raw",
        "interval_kind",
    ]
    page = StringIO()
    writer = DictWriter(page, [*IDENTITY, *heldout, *EXPENSE], lineterminator="\n")
    writer.writeheader()
    for cell in report_cells.merged_cells(results):
        line = {key: cell.get(key) for key in (*IDENTITY, *EXPENSE)}
        line |= {key: cell["heldout"].get(key) for key in (*MEASURES, *heldout[-2:])}
        line |= {f"{kind}_items": n for kind, n in (cell["heldout"].get("items") or {}).items()}
        line["comparable"] = comparable(cell)
        for measure in MEASURES:
            low, high = interval_of(cell, measure) or (None, None)
            line |= {f"{measure}_low": low, f"{measure}_high": high}
        writer.writerow(line)
    return page.getvalue()


def latex(results: dict) -> str:
    """A `table` environment for a paper that loads booktabs.

    Bold: the best cell and those not distinguishable from it. Daggers: not comparable.
    """
    match = results["budget"]["match"]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        r"  \begin{tabular}{llrrrrr}",
        r"    \toprule",
        r"    Cell & Architecture & Parameters & FLOPs & Bits per byte & Choice & Middle \\",
    ]
    for finding in report_cells.findings(results):
        amount = notation.budget(match, finding.budget, plain=True)
        lines += [r"    \midrule", rf"    \multicolumn{{7}}{{l}}{{{escaped(amount)} each}} \\"]
        strong = [cell["label"] for cell in (*finding.order[:1], *finding.tied)]
        for cell in report_cells.ranked(finding.cells):
            lines.append(latex_row(cell, cell["label"] in strong, ""))
        for cell in report_cells.apart(finding.cells):
            lines.append(latex_row(cell, False, r"$^{\dagger}$"))
    caption = (
        "Held-out bits per byte of a continuation (with its 95\\% interval), accuracy of a "
        f"four-way choice (chance {results.get('chance', 0.25)}) and bits per byte of a middle. "
        "Bold: the best and what is not distinguishable from it."
    )
    if any(not comparable(cell) for cell in results["cells"]):
        caption += r" $^{\dagger}$Pseudo-likelihood, not comparable."
    if any(map(inherited, results["cells"])):
        caption += " FLOPs with those spent on the weights that a cell starts from."
    caption += "".join(f" {escaped(sentence)}" for sentence in unequal_flops(results))
    name = "".join(letter if letter.isalnum() else "-" for letter in results["study"])
    return "\n".join(
        [
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{name}}}",
            r"\end{table}",
            "",
        ]
    )


def latex_row(cell: dict, strong: bool, mark: str) -> str:
    interval = interval_of(cell)
    value = notation.fixed(bits(cell), 3, "--")
    value = rf"\textbf{{{value}}}" if strong else value
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    columns = (
        escaped(cell["label"]) + mark,
        escaped(cell["architecture"].replace("_", " ")),
        notation.count(cell.get("parameters"), "--"),
        latex_power(notation.power(spent(cell), "--", plain=True)),
        value + spread,
        notation.fixed(cell["heldout"].get("choice_accuracy"), 3, "--"),
        notation.fixed(cell["heldout"].get("middle_bits_per_byte"), 3, "--"),
    )
    return "    " + " & ".join(columns) + r" \\"


def latex_power(number: str) -> str:
    mantissa, _, exponent = number.partition("e")
    return rf"${mantissa} \times 10^{{{exponent}}}$" if exponent else number


def escaped(name: str) -> str:
    """`name` as LaTeX text."""
    return "".join(MEANING.get(c, "\\" + c if c in "&%$#_{}" else c) for c in str(name))
