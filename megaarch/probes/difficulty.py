"""How hard a model's own training task is, and what its frozen states know: docs/why.md, "Difficulty".

The task is measured on held-out rows, made into examples as in training.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from megaarch.config.catalogue import OBJECTIVES
from megaarch.data.batch import Batch
from megaarch.data.example import Converted, generator
from megaarch.data.feature_converters import converter_of
from megaarch.data.row_lengths import components
from megaarch.evaluation.record_schema import Record
from megaarch.probes import linear_probe
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows
from megaarch.probes.linear_probe import Representation
from megaarch.probes.probed_model import Rows, Subject

# rows are measured cut to these parts of their length too, for few visible tokens
PARTS = (2, 4, 8)
BATCH = 8  # rows of a forward pass, whose logits are kept


class Difficulty(Record):
    """nats_per_target: what a target costs; entropy_per_target: of the distribution that the model predicts it
    with, nats. targets_per_token: of weight above zero, over all tokens that pass through the model.
    by_visible: nats a target by how many tokens it is predicted from, of rows of several lengths, in ranges.
    These are empty for pairs, whose targets are the data's. representation: by task; linear, nearest: means
    over its tasks."""

    nats_per_target: Estimate | None = None
    entropy_per_target: Estimate | None = None
    targets_per_token: Estimate | None = None
    by_visible: dict[str, Estimate] = {}  # noqa: RUF012  # pydantic copies it
    representation: dict[str, Representation] = {}  # noqa: RUF012
    linear: Estimate | None = None
    nearest: Estimate | None = None


class Targets(NamedTuple):
    """Targets of rows, [T] each: the row, nats, predicted entropy in nats, and visible tokens."""

    row: np.ndarray
    nats: np.ndarray
    entropy: np.ndarray
    visible: np.ndarray

    @classmethod
    def joined(cls, found: Iterable["Targets"]) -> "Targets":
        return cls(*map(np.concatenate, zip(*found, strict=True)))


def measure(subject: Subject, options: Options) -> Difficulty:
    """Measures the task of a run and the states that it has led to."""
    found = Difficulty()
    if not OBJECTIVES[subject.settings.data.objective].of_pairs:
        rows = subject.rows(options.length_of(subject), options.rows)
        found = of_task(subject, rows, options.seed)
    tasks = linear_probe.measure(subject, options)
    found.representation = tasks
    if tasks:
        found.linear = linear_probe.mean([each.linear for each in tasks.values()])
        found.nearest = linear_probe.mean([each.nearest for each in tasks.values()])
    return found


def of_task(subject: Subject, rows: Rows, seed: int) -> Difficulty:
    """Measures the training task on rows, each an example of its own."""
    length, converted = rows.tokens.shape[1], examples(subject, rows.tokens, seed)
    whole = _targets(subject, converted)
    shorter = (
        _targets(subject, examples(subject, rows.tokens[:, : length // part], seed))
        for part in PARTS
    )
    every = Targets.joined([whole, *shorter])
    seen = [sum(len(stream.tokens) for stream in each.streams) for each in converted]
    number = [np.count_nonzero(each.target_weights) for each in converted]
    names = np.array([bucket(n) for n in every.visible])
    documents = rows.documents[every.row]
    return Difficulty(
        nats_per_target=over_rows(whole.nats, rows.documents[whole.row]),
        entropy_per_target=over_rows(whole.entropy, rows.documents[whole.row]),
        targets_per_token=over_rows(np.divide(number, seen), rows.documents),
        by_visible={
            name: over_rows(every.nats[names == name], documents[names == name])
            for name in (bucket(n) for n in sorted({bucket_end(n) for n in every.visible}))
        },
    )


def bucket_end(visible: int) -> int:
    """Returns the least power of two that is not below a number of tokens, 1 at least."""
    return 1 << max(int(visible) - 1, 0).bit_length()


def bucket(visible: int) -> str:
    """Names the range between powers of two that a number of tokens lies in, e.g. "9-16"."""
    end = bucket_end(visible)
    return f"{end // 2 + 1}-{end}" if end > 2 else str(end)


def examples(subject: Subject, texts: np.ndarray, seed: int) -> list[Converted]:
    """Returns an example of the training objective for each text [N, n]. The draws are those of (seed, its place)."""
    weights, objectives = zip(*components(subject.settings.data), strict=True)
    convert = converter_of(subject.settings.model.architecture)
    found = []
    for i, tokens in enumerate(texts):
        rng = generator(seed, i)
        objective = objectives[rng.choice(len(objectives), p=np.divide(weights, sum(weights)))]
        found.append(convert(objective(tokens, subject.vocabulary, rng), subject.vocabulary))
    return found


def _targets(subject: Subject, converted: list[Converted]) -> Targets:
    model, found = subject.model, []
    for first in range(0, len(converted), BATCH):
        batch = subject.packed(converted[first : first + BATCH])
        with torch.no_grad():
            hidden = model.target_rows(model.run(batch)[-1], batch)[: batch.head_count]
            logs = model.row_logits(hidden).double().log_softmax(-1)
        slots = batch.head_rows[: batch.head_count].numpy()
        tokens = batch.target_tokens.flatten()[slots]
        nats = -logs.gather(1, tokens[:, None])[:, 0]
        entropy = -(logs.exp() * logs).sum(1)
        row, place = slots // batch.target_index.shape[1], batch.target_index.flatten()[slots]
        visible = _visible(batch)[row, place.numpy()]
        found.append(Targets(first + row, nats.numpy(), entropy.numpy(), visible))
    return Targets.joined(found)


def _visible(batch: Batch) -> np.ndarray:
    """Returns how many tokens each slot of the last stream sees, int [B, S]; of the encoder too."""
    stream = batch.streams[-1]
    seen = stream.parts.dense().sum(2)
    return seen if stream.cross is None else seen + stream.cross.dense().sum(2)
