"""The panel: every yardstick that the cells of a study were measured by, and a cell's score on each.

No single one ranks all architectures without favour; docs/yardsticks.md says whom each favours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from megaarch.config import catalogue
from megaarch.evaluation.confidence_intervals import (
    Error,
    difference_over_seeds,
    documents_error,
    holm,
    p_value,
    paired_difference,
    paired_error,
    ratio_interval,
    run_error,
    seed_error,
    widened,
)
from megaarch.evaluation.heldout_scores import Continuation, Heldout, Paired, TaskScore
from megaarch.report.notation import listed

MAIN = "continuation"
LEVEL = 0.05
MANY_TASKS = 5  # more are counted in a sentence and not named


@dataclass(frozen=True)
class Score:
    """A value, its 95% interval, and each item's share of it, as means over seeds.

    by_seed: the value of each seed.
    """

    value: float | None
    interval: list[float] | None = None
    paired: Paired | None = None
    by_seed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Yardstick:
    """read: the score of one seed. phrase: what it measures, within a sentence. most: the largest
    value that there is."""

    key: str
    title: str
    phrase: str
    read: Callable[[Heldout], Score]
    higher_is_better: bool = False
    most: float | None = None
    signed: bool = False

    def score(self, seeds: Sequence[Heldout]) -> Score:
        """Merges the seeds of a cell. The interval holds their spread; without every seed's value or
        interval there is none."""
        found = [self.read(held) for held in seeds]
        if len(found) == 1:
            [one] = found
            return Score(one.value, one.interval, one.paired, known([one.value]))
        by_seed = known([one.value for one in found])
        intervals = [one.interval for one in found if one.interval]
        value = sum(by_seed) / len(by_seed) if by_seed and len(by_seed) == len(found) else None
        interval = None
        if value is not None and len(intervals) == len(found):
            ends = [sum(side) / len(found) for side in zip(*intervals, strict=True)]
            low, high = widened(ends, value, seed_error(by_seed))
            least = low if self.signed else max(low, 0.0)
            interval = [least, high if self.most is None else min(high, self.most)]
        return Score(value, interval, mean_paired([one.paired for one in found]), by_seed)


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean_paired(paired: Sequence[Paired | None]) -> Paired | None:
    """Returns what each item cost, as a mean over seeds; None where seeds were scored on other items."""
    found = [p for p in paired if p]
    first = found[0] if found else None
    if first is None or len(found) < len(paired):
        return None
    if any((p.documents, p.sizes) != (first.documents, first.sizes) for p in found):
        return None
    items = zip(*(p.amounts for p in found), strict=True)
    return first.model_copy(update={"amounts": [sum(item) / len(found) for item in items]})


def _accuracy(key: str, title: str, phrase: str, read: Callable[[Heldout], Score]) -> Yardstick:
    return Yardstick(key, title, phrase, read, higher_is_better=True, most=1.0)


CONTINUATION = Yardstick(
    MAIN,
    "Bits per byte",
    "whole continuations",
    lambda held: Score(held.continuation_bits_per_byte, held.continuation_interval, held.paired),
)
CHOICE = _accuracy(
    "choice",
    "Choice",
    "the choice of the true continuation",
    lambda held: Score(held.choice_accuracy, held.choice_interval, held.paired_choice),
)
MIDDLE = Yardstick(
    "middle",
    "Middle",
    "middles",
    lambda held: Score(held.middle_bits_per_byte, held.middle_interval, held.paired_middle),
)
GAIN = Yardstick(
    "prefix_gain",
    "Prefix gain",
    "the gain of the prefix",
    lambda held: Score(held.prefix_gain, held.prefix_gain_interval),
    higher_is_better=True,
    signed=True,
)


def of_length(length: str) -> Yardstick:
    """Continuations of so many tokens."""

    def read(held: Heldout) -> Score:
        found = held.continuation.get(length, Continuation(bits_per_byte=None))
        return Score(found.bits_per_byte, found.interval, found.paired)

    tokens = "1 token" if length == "1" else f"{length} tokens"
    return Yardstick(f"{MAIN}_{length}", tokens, f"continuations of {tokens}", read)


def gain_of_length(length: str) -> Yardstick:
    """What the prefix gains a continuation of so many tokens."""

    def read(held: Heldout) -> Score:
        found = held.continuation.get(length, Continuation(bits_per_byte=None))
        return Score(found.prefix_gain, found.prefix_gain_interval, found.paired_gain)

    title = f"gain at {length}"
    return Yardstick(
        f"prefix_gain_{length}", title, title, read, higher_is_better=True, signed=True
    )


def of_task(name: str) -> Yardstick:
    def read(held: Heldout) -> Score:
        found = held.tasks.get(name, TaskScore(accuracy=None))
        return Score(found.accuracy, found.interval, _paired([found]))

    return _accuracy(f"task {name}", name, f"the task {name}", read)


def _paired(tasks: Sequence[TaskScore]) -> Paired | None:
    """The items of all tasks, of which every task has one share; None where one was not scored by item."""
    if not tasks or not all(task.right for task in tasks):
        return None
    rights = [np.asarray(task.right, dtype=float) for task in tasks]
    sizes = np.concatenate([np.full(len(right), 1.0 / len(right)) for right in rights])
    amounts = np.concatenate(rights) * sizes
    documents = np.arange(len(sizes), dtype=float)
    return Paired(documents=documents.tolist(), sizes=sizes.tolist(), amounts=amounts.tolist())


def _mean(tasks: Sequence[TaskScore]) -> Score:
    """Every task counts alike, however many items it has."""
    paired = _paired(tasks)
    if paired is None:
        return Score(None)
    sizes, amounts = np.array(paired.sizes), np.array(paired.amounts)
    interval = ratio_interval(amounts, sizes, np.arange(len(sizes)))
    return Score(float(amounts.sum() / sizes.sum()), interval, paired)


def of_shots(number: str) -> Yardstick:
    """The mean of the tasks behind so many answered examples."""

    def read(held: Heldout) -> Score:
        return _mean(
            [t.by_shots.get(number, TaskScore(accuracy=None)) for t in held.tasks.values()]
        )

    return _accuracy(f"shots {number}", f"{number} shots", f"{number} shots", read)


def chance_of(held: Heldout) -> float | None:
    """Returns the mean accuracy of guessing over the tasks; a task without choices is never guessed. None
    without tasks."""
    chances = [task.chance or 0.0 for task in held.tasks.values()]
    return sum(chances) / len(chances) if chances else None


def shots(helds: Sequence[Heldout]) -> list[str]:
    """Numbers of answered examples that tasks were asked behind, where they are several; the least first."""
    found = {n for held in helds for task in held.tasks.values() for n in task.by_shots}
    return sorted(found, key=int)


TASKS = _accuracy(
    "tasks", "Tasks", "the mean of the tasks", lambda held: _mean(list(held.tasks.values()))
)


def unseen(helds: Sequence[Heldout]) -> list[str]:
    """Names of the tasks that none was trained on, where any was trained on others."""
    asked = dict.fromkeys(name for held in helds for name in held.tasks)
    trained = {name for held in helds for name, task in held.tasks.items() if task.trained_on}
    return [name for name in asked if name not in trained] if trained else []


def of_unseen(names: Sequence[str]) -> Yardstick:
    """The mean of tasks that were held out whole (as Sanh et al. 2022 do)."""

    def read(held: Heldout) -> Score:
        return _mean([held.tasks.get(name, TaskScore(accuracy=None)) for name in names])

    phrase = f"the mean of {len(names)} tasks that none was trained on"
    return _accuracy("tasks unseen", "Unseen tasks", phrase, read)


def lengths(helds: Sequence[Heldout]) -> list[str]:
    """Lengths of continuations that were scored, the shortest first."""
    return sorted({length for held in helds for length in held.continuation}, key=int)


def panel(helds: Sequence[Heldout]) -> list[Yardstick]:
    """The yardsticks that judge, those that any of these values were measured by."""
    tasks = dict.fromkeys(name for held in helds for name in held.tasks)
    every = [
        CONTINUATION,
        *(of_length(length) for length in lengths(helds)),
        CHOICE,
        MIDDLE,
        TASKS,
        *([of_unseen(names)] if (names := unseen(helds)) else []),
        *map(of_task, tasks),
    ]
    return [y for y in every if any(y.read(held).value is not None for held in helds)]


def knows_length(objective: str) -> bool:
    """Says whether the objective is given how many tokens the middle has that it is to fill."""
    row = catalogue.OBJECTIVES.get(objective)
    return row is not None and row.gap_length


def told_apart(pairs: Sequence[tuple[Score, Score]]) -> list[bool]:
    """Whether the scores of each pair differ by more than chance, such that in at most 5% of studies of
    equals any pair does (Holm over all pairs). How far runs spread is known by all scores together, where
    a score that stands in several pairs (the same object) counts once."""
    scores = {id(score): score for pair in pairs for score in pair}.values()
    run = run_error([score.by_seed for score in scores])
    return holm([_difference(a, b, run) for a, b in pairs], LEVEL)


def _difference(a: Score, b: Score, run: Error | None) -> float:
    """Returns the two-sided p of a's value against b's; 1 where it cannot be told.

    Scored on the same items: by the paired difference over documents and, where there are several
    seeds, the spread over them. Otherwise by the two intervals, which must leave a gap. A value
    without an interval differs from none.
    """
    if a.value is None or b.value is None:
        return 1.0
    over_seeds = difference_over_seeds([a.by_seed, b.by_seed], run)
    errors = [over_seeds] if over_seeds else []
    if a.paired and b.paired and (over_documents := paired_error(a.paired, b.paired)):
        return p_value(paired_difference(a.paired, b.paired), [over_documents, *errors])
    if a.interval is None or b.interval is None:
        return 1.0
    if not (a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]):
        return 1.0
    errors.append(documents_error(a.interval, a.value, seed_error(a.by_seed)))
    errors.append(documents_error(b.interval, b.value, seed_error(b.by_seed)))
    return p_value(a.value - b.value, errors)


def distinguished(scores: Sequence[Score]) -> list[bool]:
    """Whether each of the scores can be told from the first, by a test of all pairs."""
    apart = told_apart(list(combinations(scores, 2)))
    return [False, *apart[: len(scores) - 1]]


def phrases(yardsticks: Sequence[Yardstick]) -> str:
    """The yardsticks within a sentence, lengths and tasks each named once."""
    by_length = [y.title.split()[0] for y in yardsticks if y.key.startswith(f"{MAIN}_")]
    named = [y.phrase for y in yardsticks if not y.key.startswith((f"{MAIN}_", "task "))]
    tasks = [y.title for y in yardsticks if y.key.startswith("task ")]
    if by_length:
        unit = "token" if by_length == ["1"] else "tokens"
        named.insert(0, f"continuations of {listed(by_length)} {unit}")
    if len(tasks) > MANY_TASKS:
        named.append(f"{len(tasks)} tasks")
    elif tasks:
        named.append(f"the task{'s' if len(tasks) > 1 else ''} {listed(tasks)}")
    return listed(named)
