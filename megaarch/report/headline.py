"""The sentences that say what a study found, and what bounds it."""

from collections import Counter
from collections.abc import Sequence

from megaarch.report.findings import (
    Finding,
    Ranking,
    apart,
    comparable,
    disagrees,
    findings,
    heirs,
    leads,
    ranked,
    tuned,
    unigram,
)
from megaarch.report.merged_cells import (
    FLOPS_TOLERANCE,
    MergedCell,
    finetuned,
    flops_spread,
    label,
    sizes,
    value_of,
)
from megaarch.report.notation import are, budget, count, listed, power
from megaarch.report.yardsticks import CONTINUATION, told_apart
from megaarch.study.results import Results, without_seed


def headline(results: Results, leads: bool = True, reading: bool = True) -> list[str]:
    """The answer: who does not read its prefix (`reading`); for each budget who is best, by how much and who
    ties; then what bounds it. leads: with who is best by which other yardstick."""
    found = findings(results)
    sentences = unread(found) if reading else []
    for finding in found:
        sentences.append(answer(finding))
        sentences += longer(finding)
        if leads:
            sentences += by_yardstick(finding.rankings)
            sentences += by_yardstick(finding.of_finetuned, "among finetuned cells, ")
    sentences += lost(results, found)
    sentences += one_seed(found)
    sentences += against_unigram(results, found)
    names = list(dict.fromkeys(cell.label for finding in found for cell in apart(finding.cells)))
    if names:
        sentences.append(
            f"{are(names)} scored by pseudo-likelihood, which is not comparable, and ranked apart."
        )
    names = list(dict.fromkeys(c.label for f in found for c in f.cells if finetuned(c)))
    if names:
        sentences.append(
            f"{are(names)} finetuned on pairs of input and target, and ranked by tasks alone."
        )
    return sentences


def one_seed(found: Sequence[Finding]) -> list[str]:
    """Says which cells have one seed, where a difference is claimed."""
    rankings = [v for finding in found for v in (*finding.rankings, *finding.of_finetuned)]
    claims = [v for v in rankings if len(v.top) < len(v.order)]
    if any(all(cell.seeds < 2 for cell in v.order) for v in claims):
        return ["Seeds were not varied: another run may rank otherwise."]
    few = dict.fromkeys(cell.label for v in claims for cell in v.order if cell.seeds < 2)
    if not few:
        return []
    whose = "its runs" if len(few) == 1 else "their runs"
    return [f"One seed of {listed(list(few))}: how far {whose} spread is taken from the others."]


def named(found: Sequence[Finding]) -> list[tuple[str, MergedCell]]:
    """The comparable cells, each with its name and its budget where there are several."""
    several = len({finding.place.budget for finding in found}) > 1
    return [
        (cell.label + (f" at {budget(finding.match, cell.budget)}" if several else ""), cell)
        for finding in found
        for cell in comparable(finding.cells)
    ]


def unread(found: Sequence[Finding]) -> list[str]:
    """Which comparable cells predict no better with the right prefix than with a wrong one."""
    names = [name for name, cell in named(found) if cell.heldout.reads_prefix is False]
    if not names:
        return []
    its = "its" if len(names) == 1 else "their"
    return [
        f"{listed(names)} may not read {its} input: the right document's prefix is not shown to serve {its} "
        "continuations better than a wrong one's."
    ]


def against_unigram(results: Results, found: list[Finding]) -> list[str]:
    """Which comparable cells a unigram model of the training tokens is better than, by the test that
    tells two cells apart, corrected for their number. Those of which a seed diverged are left out, as a mean
    over their other seeds would favour them."""
    reference = unigram(results)
    order = [
        (name, cell)
        for name, cell in named(found)
        if cell.bits_per_byte is not None and not cell.diverged
    ]
    if reference is None or not order:
        return []
    value = results.unigram_bits_per_byte or 0.0
    told = told_apart([(cell.heldout.score(CONTINUATION), reference) for _, cell in order])
    tied, behind = [], []
    for (name, cell), differs in zip(order, told, strict=True):
        if not differs:
            tied.append(name)
        elif value_of(cell) > value:
            behind.append(name)
    said = []
    if len(tied) + len(behind) == len(order):
        said.append("no comparable cell beats it")
    if tied:
        said.append(f"{are(tied)} not distinguishable from it")
    if behind and len(behind) < len(order):
        said.append(f"{listed(behind)} did worse")
    clauses = "; ".join(said or ["every comparable cell beats it"])
    return [f"A unigram model needs {value:.3f} bits per byte; {clauses}."]


def when(finding: Finding) -> str:
    """The budget as the beginning of a sentence, with what it leaves out."""
    amount = finding.amount
    if finding.adaptation is not None:
        of_size = f" at size {finding.size}" if finding.size else ""
        return f"After {budget(finding.match, finding.adaptation)} more of adaptation each{of_size}"
    if finding.match == "flops":
        rivals = [*ranked(finding.cells), *tuned(finding.cells)]
        if not all(cell.start_known for cell in rivals):
            return (
                f"At {amount} each, beside what is not known of the weights that cells start from"
            )
        if flops_spread(rivals) > FLOPS_TOLERANCE:
            return f"At a budget of {amount} each, which was not spent equally"
        return f"At equal compute ({amount} each)"
    return f"At {amount} each"


def longer(finding: Finding) -> list[str]:
    """Says which cells have trained longer than the others, from another's weights."""
    if not (found := heirs(finding.cells)):
        return []
    sums = [f"{cell.label} ({in_all(finding.match, cell)})" for cell in found]
    verb = "is" if len(found) == 1 else "are"
    whose = "another cell's" if all(cell.parent for cell in found) else "other"
    start = "started" if finding.adaptation is None else "had been trained longer, and started"
    return [f"{listed(sums)} {start} from {whose} weights, and {verb} ranked with no other."]


def lost(results: Results, found: Sequence[Finding]) -> list[str]:
    """Says which cells diverged, and which were not run for that, at how many of their seeds."""
    budgets = {cell.budget for cell in (*results.cells, *results.diverged)}
    several = len(sizes(results)) > 1
    seeds = {without_seed(cell): cell.seeds for finding in found for cell in finding.cells}
    sentences = []
    for behind in (False, True):
        gone = Counter(
            (without_seed(cell), cell.budget, label(cell, several))
            for cell in results.diverged
            if bool(cell.divergence.parent) is behind
        )
        parts = []
        for (which, amount, shown), number in gone.items():
            most = number + seeds.get(which, 0)
            at = f" at {budget(results.budget.match, amount)}" if len(budgets) > 1 else ""
            parts.append(shown + at + (f" (at {number} of {most} seeds)" if most > 1 else ""))
        verb, was, it = (
            ("ranks", "was", "it starts") if len(parts) == 1 else ("rank", "were", "they start")
        )
        if parts and behind:
            why = f"for what {it} from diverged"
            sentences.append(f"{listed(parts)} {was} not run, {why}, and {verb} with no other.")
        elif parts:
            sentences.append(f"{listed(parts)} diverged in training, and {verb} with no other.")
    return sentences


def in_all(match: str, cell: MergedCell) -> str:
    """How much the cell has trained with the weights that it starts from."""
    if not cell.start_known:
        return "how long in all is not known"
    if match == "flops":
        return f"{power(cell.total_flops)} FLOPs in all"
    return f"{count(cell.total_tokens)} tokens in all"


def answer(finding: Finding) -> str:
    """Who is best at one budget, in a sentence; that nobody is, where yardsticks disagree."""
    if not finding.main.order:
        return f"At {finding.amount} no comparable cell has a held-out value."
    best, *others = finding.main.order
    value = value_of(best)
    start = when(finding)
    if disagrees(finding):
        start += ", no cell is best on every yardstick. Over whole continuations"
    sentence = f"{start}, {best.label} predicts held-out text best, with {value:.3f} bits per byte"
    if not others:
        return sentence + "; there is no other comparable cell."
    second = value_of(others[0])
    share = 100 * (second - value) / second if second else 0.0
    sentence += f", {second - value:.3f} ({share:.1f}%) below {others[0].label}"
    tied = finding.main.tied
    if tied == others[:1]:
        return f"{sentence}, but the two are not distinguishable."
    if tied:
        names = listed([cell.label for cell in tied])
        return f"{sentence}, but is not distinguishable from {names}."
    several = len(others) > 1
    rest = (
        "every other cell is distinguishable from it" if several else "the two are distinguishable"
    )
    return f"{sentence}; {rest}."


def by_yardstick(rankings: Sequence[Ranking], whom: str = "") -> list[str]:
    """The leads as a sentence; none without a lead."""
    clauses = []
    for lead in leads(rankings):
        ties = f", not distinguishable from {lead.ties}" if lead.ties else ""
        says = f"{lead.best} leads{ties}" if lead.best else "no cell can be told from the best"
        clauses.append(f"on {lead.yardsticks} {says}")
    if not clauses:
        return []
    text = whom + "; ".join(clauses)
    return [f"{text[0].upper()}{text[1:]}."]
