"""What frozen hidden states know: which choice of a task is right, read off by a linear probe and by nearest
neighbours.

A text is a question and one of its choices, its representation the mean of a layer's states over its tokens
(of the encoder, where there is one), less the mean over the question's choices: so a probe learns of what
tells a right choice from a wrong one, and not of questions. The layer is the one that does best on a part of
the items to train on. Only probes are trained.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megaarch.evaluation.record_schema import Record
from megaarch.ingest.tasks.task import Task, find
from megaarch.ingest.tasks.template import Question
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows
from megaarch.probes.hidden_states import states_by_stack, used_slots
from megaarch.probes.probed_model import Subject

# items to train on for each held-out row that a probe reads; of held-out items half of that
ITEMS = 5
CHECKED = 4  # every fourth item to train on chooses the layer and the penalty
PENALTIES = (1e-2, 1e-1, 1.0, 10.0)  # of ridge regression, in variances of a feature
NEIGHBOURS = 15
BATCH = 32  # texts of a forward pass


class Representation(Record):
    """Accuracies over held-out items, and that of guessing. layer: of the linear probe, counted from 0."""

    linear: Estimate
    nearest: Estimate
    chance: float
    layer: int


@dataclass(frozen=True)
class Items:
    """Questions with as many choices each. features [layers, N, choices, D]; right int [N]."""

    features: np.ndarray
    right: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Items":
        return Items(self.features[:, chosen], self.right[chosen])


def measure(subject: Subject, options: Options) -> dict[str, Representation]:
    """Probes each task of `options.tasks`. Its items are in the first wording that has choices."""
    found = {}
    subject = replace(subject, model=copy.deepcopy(subject.model).float())
    for task in (t for path in options.tasks for t in find(path)):
        train = _questions(task, task.train, ITEMS * options.rows)
        test = _questions(task, task.test, ITEMS * options.rows // 2)
        if len(train) > CHECKED and test:
            found[task.name] = probe(_items(subject, train), _items(subject, test))
    return found


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean over tasks, each of which counts alike and is independent of the others; none where a task
    has no value."""
    known = [(e.value, e.ends) for e in estimates if e.value is not None]
    if not known or len(known) < len(estimates):
        return Estimate(value=None)
    value = sum(value for value, _ in known) / len(known)
    half = np.array([[abs(end - value) for end in ends] for value, ends in known])
    low, high = np.sqrt((half**2).sum(axis=0)) / len(known)
    items = sum(e.items for e in estimates)
    return Estimate(value=value, interval=[value - low, value + high], items=items)


def probe(train: Items, test: Items) -> Representation:
    """Trains both probes on `train` and scores them on `test`."""
    checked = np.arange(len(train.right)) % CHECKED == 0
    fitted, rest = train[~checked], train[checked]
    layers = range(len(train.features))

    def linear(way: tuple[int, float], on: Items, of: Items) -> np.ndarray:
        layer, penalty = way
        weights = ridge(on.features[layer], on.right, penalty)
        return (of.features[layer] @ weights).argmax(1) == of.right

    def nearest(layer: int, on: Items, of: Items) -> np.ndarray:
        return neighbours(on.features[layer], on.right, of.features[layer]) == of.right

    ways = itertools.product(layers, PENALTIES)
    way = max(ways, key=lambda way: linear(way, fitted, rest).mean())
    near = max(layers, key=lambda layer: nearest(layer, fitted, rest).mean())
    items = np.arange(len(test.right))
    return Representation(
        linear=over_rows(linear(way, train, test), items),
        nearest=over_rows(nearest(near, train, test), items),
        chance=1 / test.features.shape[2],
        layer=way[0],
    )


def ridge(features: np.ndarray, right: np.ndarray, penalty: float) -> np.ndarray:
    """Returns weights [D] by which the right choice of each question scores 1 more than a wrong one, as
    nearly as the penalty lets them. features: [N, choices, D] of mean 0 over choices."""
    _, choices, width = features.shape
    x = features.reshape(-1, width)
    y = (np.arange(choices) == right[:, None]).reshape(-1) - 1 / choices
    gram = x.T @ x / len(x)
    gram += penalty * np.trace(gram) / width * np.eye(width)
    return np.linalg.solve(gram, x.T @ y / len(x))


def neighbours(features: np.ndarray, right: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns the choice of each question [N] of whose nearest neighbours, by cosine, most are right ones.

    features, asked: [N, choices, D].
    """

    def unit(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, x.shape[-1])
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    known = (np.arange(features.shape[1]) == right[:, None]).reshape(-1).astype(float)
    alike = unit(asked) @ unit(features).T
    number = min(NEIGHBOURS, len(known))
    nearest = np.argpartition(-alike, number - 1, axis=1)[:, :number]
    weight = np.take_along_axis(alike, nearest, axis=1)
    score = (known[nearest] * weight).sum(1) / np.maximum(np.abs(weight).sum(1), 1e-12)
    return score.reshape(asked.shape[:2]).argmax(1)


def _questions(task: Task, fields, most: int) -> list[Question]:
    """Returns questions with as many choices as the first one."""
    wording = next((w for w in task.wordings if w.choices is not None), None)
    if wording is None:
        return []
    found: list[Question] = []
    for question in map(wording.question, fields[: 2 * most]):
        if question and (not found or len(question.choices) == len(found[0].choices)):
            found.append(question)
    return found[:most]


def _items(subject: Subject, questions: list[Question]) -> Items:
    room = subject.settings.model.sequence_length * 3 // 4
    texts = []
    for text in (f"{q.input} {choice}" for q in questions for choice in q.choices):
        tokens = subject.tokenizer.encode(text).astype(np.int64)[-room:]
        texts.append(np.append(tokens, tokens[0]))  # a last token that is scored, and not read
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    pooled = np.concatenate([_pooled(subject, [texts[i] for i in some]) for some in batches], 1)
    features = pooled.take(np.argsort(order), axis=1)  # [layers, texts, D], as the texts were
    features = features.reshape(len(features), len(questions), -1, features.shape[-1])
    features = features - features.mean(axis=2, keepdims=True)
    return Items(features, np.array([q.answer for q in questions]))


def _pooled(subject: Subject, texts: list[np.ndarray]) -> np.ndarray:
    """Returns the mean state of each text in each layer, float [layers, B, D]. Its last token is what its row
    scores, so that every mask that looks ahead does so over the others."""
    batch = subject.batch(texts, -1)
    used = torch.from_numpy(used_slots(batch.streams[0])).double()
    _, *layers = next(states_by_stack(subject.model, batch))
    means = [(x.double() * used[:, :, None]).sum(1) / used.sum(1)[:, None] for x in layers]
    return torch.stack(means).numpy()
