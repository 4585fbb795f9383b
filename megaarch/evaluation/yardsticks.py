"""Yardsticks of a trained model on held-out documents, with intervals.

continuation  bits per byte of a continuation given its prefix
by length     the same of the first 1, 2, 4, ... tokens, and what a wrong document's prefix adds to it
middle        bits per byte of a middle given both of its sides, where the objective can state it
choice        share of prefixes whose true continuation is chosen among four (chance 0.25)

heldout_scores.py has their record, report/yardsticks.py shows and compares them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Evaluation
from megaarch.evaluation.confidence_intervals import ratio_interval
from megaarch.evaluation.heldout_scores import Continuation, Heldout, Paired
from megaarch.evaluation.items import Item
from megaarch.evaluation.scorer import Scorer

CHOICES = 4


def evaluate(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> Heldout:
    """All yardsticks: the `heldout` entry of a cell in results.json."""
    objective = catalogue.OBJECTIVES[scorer.objective]
    chosen = items[: evaluation.documents]
    scores = scorer.loglikelihoods([(item.left, item.span) for item in chosen])
    value, interval, costs = _cost(chosen, -scores.text)
    groups = _groups(items[: evaluation.choices])
    middles = []
    if evaluation.middles and objective.middle is not None:
        middles = [item for item in items if len(item.right)][: evaluation.middles]
    return Heldout(
        continuation_bits_per_byte=value,
        continuation_bits_per_byte_raw=bits(-scores.raw, sizes(chosen)),
        continuation_interval=interval,
        paired=costs,
        interval_kind="bootstrap over documents",
        comparable=objective.comparable,
        items={"continuation": len(chosen), "choice": len(groups), "middle": len(middles)},
        **_choice(scorer, groups),
        **_middle(scorer, middles),
        **_by_length(scorer, items[: evaluation.by_length], evaluation.lengths),
    )


def curve_point(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> float:
    """Bits per byte of the continuations of the first `curve_documents` items."""
    return continuation_bits(scorer, items[: evaluation.curve_documents])


def continuation_bits(scorer: Scorer, items: list[Item]) -> float:
    """Bits per byte of the items' continuations."""
    scores = scorer.loglikelihoods([(item.left, item.span) for item in items])
    return bits(-scores.text, sizes(items))


def _by_length(scorer: Scorer, items: list[Item], lengths: Sequence[int]) -> dict[str, Any]:
    """Fields of Heldout: the first tokens behind each item's left side, `lengths` of them, after this
    side and after that of another document (`wrong_prefixes`). A length that no item holds, or that
    no row of the run's holds, is left out."""
    fitting = []
    for length in sorted(set(lengths)):
        held = [item for item in items if length in item.length_bytes]
        if held and scorer.holds(held[0].left, held[0].following[:length]):
            fitting.append(length)
    if not fitting:
        return {}
    wrong = wrong_prefixes(items)
    ends = [max(n for n in (0, *fitting) if n in (0, *item.length_bytes)) for item in items]
    spans = [item.following[:end] for item, end in zip(items, ends, strict=True)]
    own = [(i, items[i].left) for i, end in enumerate(ends) if end]
    others = [(i, prefix) for i, prefix in enumerate(wrong) if prefix is not None and ends[i]]
    found = scorer.by_length([(prefix, spans[i]) for i, prefix in own + others], fitting)
    table = np.full((2, len(items), len(fitting)), np.nan)
    table[0, [i for i, _ in own]] = -found[: len(own)]
    table[1, [i for i, _ in others]] = -found[len(own) :]
    continuation = {
        str(length): _continuation(items, length, *table[:, :, k])
        for k, length in enumerate(fitting)
    }
    longest = continuation[str(fitting[-1])]
    gain = longest.prefix_gain_interval
    return {
        "continuation": continuation,
        "prefix_gain": longest.prefix_gain,
        "prefix_gain_interval": gain,
        "reads_prefix": None if gain is None else gain[0] > 0,
    }


def _continuation(
    items: list[Item], length: int, own: np.ndarray, other: np.ndarray
) -> Continuation:
    """own, other: what the items' first `length` tokens cost in nats after their own and after the
    wrong prefix, float64 [N]; NaN where that was not scored."""
    held = [i for i, item in enumerate(items) if length in item.length_bytes]
    value, interval, costs = _cost([items[i] for i in held], own[held], length)
    found = Continuation(bits_per_byte=value, interval=interval, items=len(held), paired=costs)
    if moved := [i for i in held if not np.isnan(other[i])]:
        gain, interval, gains = _cost([items[i] for i in moved], (other - own)[moved], length)
        found.prefix_gain, found.prefix_gain_interval, found.paired_gain = gain, interval, gains
    return found


def wrong_prefixes(items: list[Item]) -> list[np.ndarray | None]:
    """Returns for each item the left side of one of another document; None where too few are of
    another. It depends on the items alone.

    Items in the order of their documents, each takes that of the item as many places on as the
    document with the most items has: the next such place is in another document.
    """
    documents = [item.document for item in items]
    order = sorted(range(len(items)), key=lambda i: documents[i])
    shift = max(map(documents.count, documents), default=0)
    found: list[np.ndarray | None] = [None] * len(items)
    for place, i in enumerate(order):
        other = items[order[(place + shift) % len(items)]]
        if other.document != documents[i]:
            found[i] = other.left
    return found


def _groups(items: list[Item]) -> list[Item]:
    """Items in the order of groups of four, each of four different documents as far as possible;
    what fills no group is left out."""
    groups = len(items) // CHOICES
    ordered = sorted(items[: groups * CHOICES], key=lambda item: item.document)
    return [ordered[i * groups + g] for g in range(groups) for i in range(CHOICES)]


def _choice(scorer: Scorer, items: list[Item]) -> dict[str, Any]:
    """Fields of Heldout. items: in groups of four (`_groups`); each prefix is scored with each
    continuation of its group.

    A continuation's score under a prefix, less its mean score under the group's other prefixes:
    so a continuation that is likely everywhere gains nothing by it.
    """
    if not items:
        return {"choice_accuracy": None, "choice_interval": None}
    groups = [items[first : first + CHOICES] for first in range(0, len(items), CHOICES)]
    pairs = [(a.left, b.span) for group in groups for a in group for b in group]
    table = scorer.loglikelihoods(pairs).text.reshape(len(groups), CHOICES, CHOICES)
    others = (table.sum(axis=1, keepdims=True) - table) / (CHOICES - 1)
    right = ((table - others).argmax(axis=2) == np.arange(CHOICES)).reshape(-1).astype(float)
    documents = np.array([item.document for item in items])
    return {
        "choice_accuracy": float(right.mean()),
        "choice_interval": ratio_interval(right, np.ones_like(right), documents),
        "choice_right": [int(x) for x in right],
        "paired_choice": Paired(
            documents=[float(document) for document in documents],
            sizes=[1.0] * len(right),
            amounts=right.tolist(),
        ),
    }


def _middle(scorer: Scorer, items: list[Item]) -> dict[str, Any]:
    """Fields of Heldout."""
    if not items:
        return {"middle_bits_per_byte": None, "middle_interval": None}
    scores = scorer.middles([middle_task(item) for item in items])
    value, interval, costs = _cost(items, -scores.text)
    return {"middle_bits_per_byte": value, "middle_interval": interval, "paired_middle": costs}


def middle_task(item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(before, middle, after): the near half of an item's left side, its span and its right side."""
    return item.left[len(item.left) // 2 :], item.span, item.right


def bits(nats: np.ndarray, size: np.ndarray) -> float:
    """Bits per byte of spans that cost `nats` and hold `size` bytes."""
    return float(nats.sum() / math.log(2) / size.sum())


def sizes(items: list[Item], length: int | None = None) -> np.ndarray:
    """Bytes of each item's span, or of its first `length` tokens."""
    return np.array([i.length_bytes[length] if length else i.span_bytes for i in items])


def paired(items: list[Item], nats: np.ndarray, length: int | None = None) -> Paired:
    """The cost of each item's span, or of its first `length` tokens: `confidence.paired_error` makes
    the error of a difference of it."""
    return Paired(
        documents=[int(item.document) for item in items],
        sizes=[int(size) for size in sizes(items, length)],
        amounts=[round(float(x), 4) for x in nats / math.log(2)],
    )


def _cost(
    items: list[Item], nats: np.ndarray, length: int | None = None
) -> tuple[float, list[float] | None, Paired]:
    """Bits per byte of the items' spans, or of their first `length` tokens, which cost `nats`; the 95%
    interval; and the cost of each."""
    size, documents = sizes(items, length), np.array([item.document for item in items])
    interval = ratio_interval(nats / math.log(2), size, documents)
    return bits(nats, size), interval, paired(items, nats, length)


def unigram_nats(counts: np.ndarray, items: list[Item], text: np.ndarray) -> np.ndarray:
    """Returns what each item's continuation costs a unigram model of the training tokens, float64 [N].

    counts: [vocabulary] of the training tokens; add-one smoothing over text tokens.
    """
    smoothed = np.where(text, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats = -np.log(smoothed / smoothed.sum())
    return np.array([nats[item.span].sum() for item in items])
