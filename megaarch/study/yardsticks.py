"""Yardsticks of a trained model on held-out documents, with intervals.

continuation  bits per byte of a continuation given its prefix
middle        bits per byte of a middle given both of its sides, where the objective can state it
choice        share of prefixes whose true continuation is chosen among four (chance 0.25)
"""

import math
from typing import Any

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Evaluation, Settings
from megaarch.study.intervals import ratio_interval
from megaarch.study.items import Item
from megaarch.study.score import Scorer

CHOICES = 4


def evaluate(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> dict[str, Any]:
    """All yardsticks: the `heldout` entry of a cell in results.json."""
    objective = catalogue.OBJECTIVES[scorer.objective]
    chosen = items[: evaluation.documents]
    scores = scorer.loglikelihoods([(item.left, item.span) for item in chosen])
    nats, size = -scores.text, np.array([item.span_bytes for item in chosen])
    documents = np.array([item.document for item in chosen])
    result = {
        "continuation_bits_per_byte": bits(nats, size),
        "continuation_bits_per_byte_raw": bits(-scores.raw, size),
        "continuation_interval": ratio_interval(nats / math.log(2), size, documents),
        "paired": paired(chosen, nats),
        "middle_bits_per_byte": None,
        "middle_interval": None,
        "interval_kind": "bootstrap over documents",
        "comparable": objective.comparable,
        "items": {"continuation": len(chosen), "choice": 0, "middle": 0},
    }
    result |= _choice(scorer, items[: evaluation.choices], result["items"])
    if evaluation.middles and objective.middle is not None:
        result |= _middle(scorer, items, evaluation.middles, result["items"])
    return result


def curve_point(scorer: Scorer, items: list[Item], evaluation: Evaluation) -> float:
    """Bits per byte of the continuations of the first `curve_documents` items."""
    return continuation_bits(scorer, items[: evaluation.curve_documents])


def continuation_bits(scorer: Scorer, items: list[Item]) -> float:
    """Bits per byte of the items' continuations."""
    scores = scorer.loglikelihoods([(item.left, item.span) for item in items])
    return bits(-scores.text, np.array([item.span_bytes for item in items]))


def _choice(scorer: Scorer, items: list[Item], counts: dict[str, int]) -> dict[str, Any]:
    """Items in groups of four: each prefix is scored with each continuation of its group.

    A continuation's score under a prefix, less its mean score under the group's other prefixes:
    so a continuation that is likely everywhere gains nothing by it.
    """
    groups = len(items) // CHOICES
    items = _across_documents(items[: groups * CHOICES])
    pairs = [
        (items[g * CHOICES + i].left, items[g * CHOICES + j].span)
        for g in range(groups)
        for i in range(CHOICES)
        for j in range(CHOICES)
    ]
    counts["choice"] = len(items)
    if not items:
        return {"choice_accuracy": None, "choice_interval": None}
    table = scorer.loglikelihoods(pairs).text.reshape(groups, CHOICES, CHOICES)
    others = (table.sum(axis=1, keepdims=True) - table) / (CHOICES - 1)
    right = ((table - others).argmax(axis=2) == np.arange(CHOICES)).reshape(-1).astype(float)
    documents = np.array([item.document for item in items])
    return {
        "choice_accuracy": float(right.mean()),
        "choice_interval": ratio_interval(right, np.ones_like(right), documents),
        "choice_right": [int(x) for x in right],
    }


def _across_documents(items: list[Item]) -> list[Item]:
    """Order in which a group of four holds four different documents as far as possible."""
    groups = len(items) // CHOICES
    ordered = sorted(items, key=lambda item: item.document)
    return [ordered[i * groups + g] for g in range(groups) for i in range(CHOICES)]


def _middle(scorer: Scorer, items: list[Item], most: int, counts: dict[str, int]) -> dict[str, Any]:
    chosen = [item for item in items if len(item.right)][:most]
    if not chosen:
        return {}
    scores = scorer.middles([middle_task(item) for item in chosen])
    size = np.array([item.span_bytes for item in chosen])
    documents = np.array([item.document for item in chosen])
    counts["middle"] = len(chosen)
    return {
        "middle_bits_per_byte": bits(-scores.text, size),
        "middle_interval": ratio_interval(-scores.text / math.log(2), size, documents),
    }


def middle_task(item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(before, middle, after): the near half of an item's left side, its span and its right side."""
    return item.left[len(item.left) // 2 :], item.span, item.right


def bits(nats: np.ndarray, size: np.ndarray) -> float:
    """Bits per byte of spans that cost `nats` and hold `size` bytes."""
    return float(nats.sum() / math.log(2) / size.sum())


def paired(items: list[Item], nats: np.ndarray) -> dict[str, list]:
    """What each item's span cost (in bits), with its document and its bytes: what intervals of a
    difference (`intervals.paired_interval`) are made of."""
    return {
        "documents": [int(item.document) for item in items],
        "sizes": [int(item.span_bytes) for item in items],
        "amounts": [round(float(x), 4) for x in nats / math.log(2)],
    }


def unigram_nats(counts: np.ndarray, items: list[Item], text: np.ndarray) -> np.ndarray:
    """What each item's continuation costs a unigram model of the training tokens, float64 [N].

    counts: [vocabulary] of the training tokens; add-one smoothing over text tokens.
    """
    smoothed = np.where(text, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats = -np.log(smoothed / smoothed.sum())
    return np.array([nats[item.span].sum() for item in items])


def heldout_of(settings: Settings, model, prepared, items: list[Item], evaluation: Evaluation):
    """The yardsticks of one trained model."""
    scorer = Scorer(model, settings, prepared.tokenizer.vocabulary, evaluation.batch_rows)
    return evaluate(scorer, items, evaluation)
