"""What a study found: who is best on which yardstick, who ties, and the sentences that say so."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megaarch.report.merged_cells import (
    FLOPS_TOLERANCE,
    MergedCell,
    Place,
    finetuned,
    flops_spread,
    merged_cells,
    place,
    value_of,
)
from megaarch.report.notation import are, budget, count, listed, power
from megaarch.report.yardsticks import (
    CONTINUATION,
    MIDDLE,
    TASKS,
    Score,
    Yardstick,
    distinguished,
    knows_length,
    panel,
    phrases,
    told_apart,
)
from megaarch.study.results import Results


@dataclass(frozen=True)
class Ranking:
    """The ranking by one yardstick.

    order: the cells that it judges, best first. tied: those that are not distinguishable from the
    best. complete: whether it judges the comparable cells, every one and no other.
    """

    yardstick: Yardstick
    order: list[MergedCell]
    tied: list[MergedCell]
    complete: bool

    @property
    def top(self) -> list[MergedCell]:
        return [*self.order[:1], *self.tied]


@dataclass(frozen=True)
class Lead:
    """Yardsticks by which the same cell comes first, and those not distinguishable from it, as phrases; both empty
    where no cell can be told from the best."""

    yardsticks: str
    best: str = ""
    ties: str = ""


@dataclass(frozen=True)
class Finding:
    """The answer at one place: at a budget, or after what study.adapt added to it. match: what the study
    matches. size: the cells', where the study has others that do not compare. rankings: of cells that are not finetuned, by continuations first, if any has a value there;
    of_finetuned: of the others, by tasks."""

    match: str
    place: Place
    size: str | None
    cells: list[MergedCell]
    rankings: list[Ranking]
    of_finetuned: list[Ranking]

    @property
    def amount(self) -> str:
        """The place as a phrase."""
        return budget(self.match, self.place.budget, self.adaptation, self.size)

    @property
    def adaptation(self) -> float | None:
        return self.place.adaptation

    @property
    def main(self) -> Ranking:
        """The ranking by continuations: of the comparable cells that have a value; of none without any."""
        found = (v for v in self.rankings if v.yardstick is CONTINUATION)
        return next(found, Ranking(CONTINUATION, [], [], False))

    @property
    def tied(self) -> set[str]:
        """The labels of the cells that are not distinguishable from the best by continuations."""
        return {cell.label for cell in self.main.tied}


def comparable(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells whose bits per byte are a likelihood of what they were trained for, the lowest first; those
    without a value last."""
    found = [cell for cell in cells if cell.heldout.comparable and not finetuned(cell)]
    return sorted(found, key=lambda c: (c.bits_per_byte is None, c.bits_per_byte or 0.0))


def ranked(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Comparable cells that have trained for the budget, at every seed; heirs left out."""
    return [cell for cell in comparable(cells) if cell.ranks]


def diverged(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells of which a seed diverged, which rank with no other."""
    return [cell for cell in cells if cell.diverged]


def heirs(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells that have trained longer, from another cell's weights, and rank with no other."""
    found = [cell for cell in cells if cell.heir and not cell.diverged]
    return sorted(found, key=lambda c: (c.bits_per_byte is None, c.bits_per_byte or 0.0))


def apart(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells whose value is a pseudo-likelihood, which ranks with no other. None that ranks with nothing."""
    found = [cell for cell in cells if not cell.heldout.comparable and not finetuned(cell)]
    return [cell for cell in found if cell.ranks]


def tuned(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells that were finetuned, which rank among themselves by tasks."""
    return [cell for cell in cells if finetuned(cell) and cell.ranks]


def judged(yardstick: Yardstick, cells: Sequence[MergedCell]) -> list[MergedCell]:
    """The cells that a yardstick compares.

    No heirs, none of which a seed diverged, and none that is finetuned. A middle is a likelihood for every cell that has one (the chain
    rule, from left to right), but not an equal task for those that are told its length. All else:
    comparable cells.
    """
    if yardstick is MIDDLE:
        text = [cell for cell in cells if not finetuned(cell) and cell.ranks]
        return [cell for cell in text if not knows_length(cell.objective)]
    return ranked(cells)


def ranking(
    yardstick: Yardstick, judged: Sequence[MergedCell], every: Sequence[MergedCell]
) -> Ranking | None:
    """None where no cell has a value. every: the cells that a complete ranking judges."""
    scores = [(cell, cell.heldout.score(yardstick)) for cell in judged]
    sign = -1 if yardstick.higher_is_better else 1
    scores = [(cell, score) for cell, score in scores if score.value is not None]
    scores.sort(key=lambda pair: sign * (pair[1].value or 0.0))
    if not scores:
        return None
    differs = distinguished([score for _, score in scores])
    order = [cell for cell, _ in scores]
    tied = [cell for cell, apart in zip(order[1:], differs[1:], strict=True) if not apart]
    complete = {cell.label for cell in order} == {cell.label for cell in every}
    return Ranking(yardstick, order, tied, complete)


def findings(results: Results) -> list[Finding]:
    """One finding for each budget, and each size where sizes do not compare, the largest first, and behind
    it one of its adapted cells."""
    cells, match = merged_cells(results), results.budget.match
    places: dict[Place, list[MergedCell]] = {}
    for cell in cells:
        places.setdefault(place(cell, match), []).append(cell)
    largest: dict[str | None, float] = {}
    for at, group in places.items():
        most = max(cell.parameters or 0 for cell in group)
        largest[at.size] = max(most, largest.get(at.size, 0))
    found = []
    for at in sorted(places, key=lambda p: (-p.budget, -largest[p.size], p.adaptation or 0)):
        group, size = places[at], at.size if len(largest) > 1 else None
        yardsticks = panel([held for cell in group for held in cell.heldout.each])
        by_tasks = [y for y in yardsticks if y.key.startswith("task")]
        raw = [ranking(y, judged(y, group), ranked(group)) for y in yardsticks]
        apart = [ranking(y, tuned(group), tuned(group)) for y in by_tasks]
        found.append(
            Finding(match, at, size, group, [v for v in raw if v], [v for v in apart if v])
        )
    return found


def unigram(results: Results) -> Score | None:
    """The unigram model's score of continuations: it has no seeds, and so no spread over them. None
    where it is not known. Results without what each item cost it know its value alone."""
    value = results.unigram_bits_per_byte
    return None if value is None else Score(value, [value, value], results.unigram_paired)


def headline(results: Results, leads: bool = True, reading: bool = True) -> list[str]:
    """The answer: who does not read its prefix (`reading`); for each budget who is best, by how much and who
    ties; then what bounds it. leads: with who is best by which other yardstick."""
    found = findings(results)
    sentences = unread(found) if reading else []
    for finding in found:
        sentences.append(answer(finding))
        sentences += longer(finding) + lost(results, finding)
        if leads:
            sentences += by_yardstick(finding.rankings)
            sentences += by_yardstick(finding.of_finetuned, "among finetuned cells, ")
    if found and one_seed(found):
        sentences.append("Seeds were not varied: another run may rank otherwise.")
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


def one_seed(found: Sequence[Finding]) -> bool:
    """Whether a difference is claimed of cells without a second seed."""
    return any(
        len(v.top) < len(v.order) and any(cell.seeds < 2 for cell in v.order)
        for finding in found
        for v in (*finding.rankings, *finding.of_finetuned)
    )


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
    tells two cells apart, corrected for their number."""
    reference = unigram(results)
    order = [(name, cell) for name, cell in named(found) if cell.bits_per_byte is not None]
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


def lost(results: Results, finding: Finding) -> list[str]:
    """Says which cells diverged, at how many of their seeds."""
    gone = [
        cell
        for cell in results.diverged
        if not cell.divergence.parent and place(cell, finding.match) == finding.place
    ]
    several = len({cell.size for cell in (*results.cells, *results.diverged)}) > 1
    numbers = Counter(f"{c.name} {c.size}" if several and c.size else c.name for c in gone)
    seeds = {cell.label: cell.seeds for cell in finding.cells}
    if not numbers:
        return []
    parts = [
        f"{name} (at {n} of {n + seeds.get(name, 0)} seeds)" if n + seeds.get(name, 0) > 1 else name
        for name, n in numbers.items()
    ]
    verb = "ranks" if len(parts) == 1 else "rank"
    return [f"{listed(parts)} diverged in training, and {verb} with no other."]


def in_all(match: str, cell: MergedCell) -> str:
    """How much the cell has trained with the weights that it starts from."""
    if not cell.start_known:
        return "how long in all is not known"
    if match == "flops":
        return f"{power(cell.total_flops)} FLOPs in all"
    return f"{count(cell.total_tokens)} tokens in all"


def votes(yardstick: Yardstick) -> bool:
    """Whether a yardstick may deny that one cell is best. Of the tasks their mean alone: of many on which cells
    are equal, chance gives some one another winner."""
    return yardstick is TASKS or not yardstick.key.startswith("task")


def disagrees(finding: Finding) -> bool:
    """Whether no cell is at the top of every yardstick that votes and judges all comparable cells."""
    rankings = [v for v in finding.rankings if v.complete and votes(v.yardstick)]
    tops = [{cell.label for cell in v.top} for v in rankings]
    return len(tops) > 1 and not set.intersection(*tops)


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


def leads(rankings: Sequence[Ranking]) -> list[Lead]:
    """Who is at the top of each yardstick but the main one; yardsticks with the same top share a row, and those
    by which no cell differs from the best come last."""
    groups: dict[tuple[str, ...], list[Yardstick]] = {}
    level: list[Yardstick] = []
    for v in rankings:
        if v.yardstick is CONTINUATION or len(v.order) < 2:
            continue
        if len(v.top) == len(v.order):
            level.append(v.yardstick)
        else:
            groups.setdefault(tuple(cell.label for cell in v.top), []).append(v.yardstick)
    found = [Lead(phrases(by), names[0], listed(names[1:])) for names, by in groups.items()]
    return found + ([Lead(phrases(level))] if level else [])


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
