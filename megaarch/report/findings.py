"""What a study found: who is best on which yardstick, and who cannot be told from the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from megaarch.report.merged_cells import MergedCell, Place, finetuned, merged_cells, place, sizes
from megaarch.report.notation import budget, listed
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
    matches. size: the cells', where the study has others that do not compare. rankings: of cells that are not
    finetuned, by continuations first, if any has a value there; of_finetuned: of the others, by tasks."""

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


def in_one_table(cells: Sequence[MergedCell]) -> list[MergedCell]:
    """Cells that rank, the best first, then those of text that rank with no other."""
    return [*ranked(cells), *heirs(cells), *diverged(cells), *apart(cells)]


def judged(yardstick: Yardstick, cells: Sequence[MergedCell]) -> list[MergedCell]:
    """The cells that a yardstick compares.

    No heirs, none of which a seed diverged, and none that is finetuned. A middle is a likelihood for every
    cell that has one (the chain rule, from left to right), but not an equal task for those that are told its
    length. All else: comparable cells.
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
        group, size = places[at], at.size if len(sizes(results)) > 1 else None
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


def votes(yardstick: Yardstick) -> bool:
    """Whether a yardstick may deny that one cell is best. Of the tasks their mean alone: of many on which cells
    are equal, chance gives some one another winner."""
    return yardstick is TASKS or not yardstick.key.startswith("task")


def disagrees(finding: Finding) -> bool:
    """Whether no cell is at the top of every yardstick that votes and judges all comparable cells."""
    rankings = [v for v in finding.rankings if v.complete and votes(v.yardstick)]
    tops = [{cell.label for cell in v.top} for v in rankings]
    return len(tops) > 1 and not set.intersection(*tops)


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
