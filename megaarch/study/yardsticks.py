"""Yardsticks of a trained model on held-out documents, with intervals.

continuation  bits per byte of a continuation given its prefix
middle        bits per byte of a middle given both of its sides, where the objective can state it
choice        share of prefixes whose true continuation is chosen among four (chance 0.25)
"""

import math
from typing import Any

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Evaluation
from megaarch.study.intervals import ratio_interval
from megaarch.study.items import Item
from megaarch.study.results import Heldout, Paired
from megaarch.study.score import Scorer

CHOICES = 4


def evaluate(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> Heldout:
    """All yardsticks: the `heldout` entry of a cell in results.json."""
    objective = catalogue.OBJECTIVES[scorer.objective]
    chosen = items[: evaluation.documents]
    scores = scorer.loglikelihoods([(item.left, item.span) for item in chosen])
    value, interval = _bits_per_byte(chosen, -scores.text)
    groups = _groups(items[: evaluation.choices])
    middles = []
    if evaluation.middles and objective.middle is not None:
        middles = [item for item in items if len(item.right)][: evaluation.middles]
    return Heldout(
        continuation_bits_per_byte=value,
        continuation_bits_per_byte_raw=_bits_per_byte(chosen, -scores.raw)[0],
        continuation_interval=interval,
        paired=paired(chosen, -scores.text),
        interval_kind="bootstrap over documents",
        comparable=objective.comparable,
        items={"continuation": len(chosen), "choice": len(groups), "middle": len(middles)},
        **_choice(scorer, groups),
        **_middle(scorer, middles),
    )


def _bits_per_byte(items: list[Item], nats: np.ndarray) -> tuple[float, list[float] | None]:
    """Bits per byte of the items' spans, which cost `nats`, and the 95% interval."""
    size = np.array([item.span_bytes for item in items])
    documents = np.array([item.document for item in items])
    return bits(nats, size), ratio_interval(nats / math.log(2), size, documents)


def curve_point(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> float:
    """Bits per byte of the continuations of the first `curve_documents` items."""
    return continuation_bits(scorer, items[: evaluation.curve_documents])


def continuation_bits(scorer: Scorer, items: list[Item]) -> float:
    """Bits per byte of the items' continuations."""
    scores = scorer.loglikelihoods([(item.left, item.span) for item in items])
    return bits(-scores.text, np.array([item.span_bytes for item in items]))


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
    }


def _middle(scorer: Scorer, items: list[Item]) -> dict[str, Any]:
    """Fields of Heldout."""
    if not items:
        return {"middle_bits_per_byte": None, "middle_interval": None}
    scores = scorer.middles([middle_task(item) for item in items])
    value, interval = _bits_per_byte(items, -scores.text)
    return {"middle_bits_per_byte": value, "middle_interval": interval}


def middle_task(item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(before, middle, after): the near half of an item's left side, its span and its right side."""
    return item.left[len(item.left) // 2 :], item.span, item.right


def bits(nats: np.ndarray, size: np.ndarray) -> float:
    """Bits per byte of spans that cost `nats` and hold `size` bytes."""
    return float(nats.sum() / math.log(2) / size.sum())


def paired(items: list[Item], nats: np.ndarray) -> Paired:
    """The cost of each item's span: `intervals.paired_interval` makes intervals of a difference of it."""
    return Paired(
        documents=[int(item.document) for item in items],
        sizes=[int(item.span_bytes) for item in items],
        amounts=[round(float(x), 4) for x in nats / math.log(2)],
    )


def unigram_nats(counts: np.ndarray, items: list[Item], text: np.ndarray) -> np.ndarray:
    """Returns what each item's continuation costs a unigram model of the training tokens, float64 [N].

    counts: [vocabulary] of the training tokens; add-one smoothing over text tokens.
    """
    smoothed = np.where(text, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats = -np.log(smoothed / smoothed.sum())
    return np.array([nats[item.span].sum() for item in items])
