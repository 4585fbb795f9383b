"""Rows: sample i of a run, as a pure function of (seed, i).

A task is one dataset under one objective. `TextRows` cuts the text into segments that fill a row
each; `PairRows` packs short supervised examples. `Rows` blends tasks and gives every one of them
the same fixed row shape. The sample index never wraps: each epoch has its own order and noise.

Segments run over document boundaries, where the eos token stands, as in T5 and GPT pretraining.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from megaarch import catalogue
from megaarch.data import objectives
from megaarch.data.blend import Blend
from megaarch.data.converters import CONVERTERS
from megaarch.data.example import (
    Converted,
    Converter,
    Lengths,
    Objective,
    RowShape,
    Vocabulary,
    generator,
    largest_raw,
)
from megaarch.data.objectives.language_modelling import PrefixLM
from megaarch.data.packing import plan_rows
from megaarch.settings import Data, Model


@dataclass(frozen=True)
class Layout:
    """How one objective fills a row of one architecture.

    raw: tokens of a segment. segments: how many segments of `raw` tokens a row takes, and with
    which objective each. shape: the bound on such a row.
    """

    raw: int
    segments: tuple[Objective, ...]
    shape: RowShape

    @property
    def tokens(self) -> int:
        """Tokens of the text that a row takes."""
        return self.raw * len(self.segments)


def layout(model: Model, objective: Objective) -> Layout:
    """The largest segments whose rows fit `model`'s streams. ValueError where none does."""
    streams = catalogue.ARCHITECTURES[model.architecture].streams
    limits = (model.sequence_length, model.target_length)[: len(streams)]
    converter = CONVERTERS[model.architecture]

    def bound(raw: int) -> RowShape:
        return _bound(objective, converter, raw, len(streams))

    def fits(raw: int) -> bool:
        lengths = bound(raw).streams
        return all(limit is None or n <= limit for n, limit in zip(lengths, limits, strict=True))

    raw = largest_raw(fits)
    if raw < 2:
        raise ValueError(
            f"model.sequence_length: rows of {model.sequence_length} tokens are too short for "
            f"{objective.name} on {model.architecture}"
        )
    segments = (objective,)
    if _pairs(objective, len(streams)):
        segments = (objective, replace(objective, mirrored=True))
    return Layout(raw, segments, bound(raw))


def _pairs(objective: Objective, streams: int) -> bool:
    # Wang et al. 2022, 3.2: an encoder-decoder packs two prefix-LM examples with splits s and
    # n - s, so that both of its stacks are full.
    return streams == 2 and isinstance(objective, PrefixLM)


def _bound(objective: Objective, converter: Converter, raw: int, streams: int) -> RowShape:
    if _pairs(objective, streams):
        one = converter.shape(Lengths(raw, raw))
        return replace(one, parts=2 * one.parts, cross_parts=2 * one.cross_parts)
    return converter.shape(objective.lengths(raw))


class Task(Protocol):
    """A dataset under an objective: rows of converted examples."""

    shape: RowShape
    per_epoch: int  # rows

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        """The i-th row of this task; noise is drawn from the generator of `rng_key`."""
        ...


class TextRows:
    """Rows of one segment each (two where the layout pairs them), documents shuffled per epoch.

    dataset: an IndexedDataset of documents that end in eos.
    """

    def __init__(self, dataset, plan: Layout, converter: Converter, vocabulary: Vocabulary,
                 seed: int):  # fmt: skip
        self.dataset, self.plan = dataset, plan
        self.converter, self.vocabulary, self.seed = converter, vocabulary, seed
        self.shape = plan.shape
        self.lengths = np.asarray(dataset.lengths, dtype=np.int64)
        self.per_epoch = int(self.lengths.sum()) // plan.tokens
        if self.per_epoch == 0:
            raise ValueError(
                f"the text has {int(self.lengths.sum())} tokens and one row needs {plan.tokens}: "
                "give more text or lower model.sequence_length"
            )
        self._epoch = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = generator(self.seed ^ 0xD0C5, epoch)
        documents = rng.permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[documents])
        return documents, ends, rng.permutation(self.per_epoch)

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        epoch, place = divmod(i, self.per_epoch)
        documents, ends, order = self._epoch(epoch)
        tokens = self._read(documents, ends, int(order[place]) * self.plan.tokens)
        return [
            self.converter(objective(segment, self.vocabulary, generator(*rng_key)),
                           self.vocabulary)  # fmt: skip
            for objective, segment in zip(
                self.plan.segments, np.split(tokens, len(self.plan.segments)), strict=True
            )
        ]

    def _read(self, documents: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """`plan.tokens` tokens from `start` in the concatenation of `documents`."""
        need, pieces = self.plan.tokens, []
        d = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[d]) - int(self.lengths[documents[d]]))
        while need:
            length = min(need, int(self.lengths[documents[d]]) - offset)
            pieces.append(self.dataset.get(int(documents[d]), offset, length))
            need, offset, d = need - length, 0, d + 1
        return np.concatenate(pieces).astype(np.int64)


class PairRows:
    """Supervised (input, target) pairs, several packed in a row.

    dataset: an IndexedDataset whose sequences alternate input, target. Inputs and targets that
    are too long for a row are cut at their end, as seqio does; `truncated` counts those pairs.
    """

    def __init__(self, dataset, model: Model, objective: Objective, converter: Converter,
                 vocabulary: Vocabulary, *, pack: bool, seed: int):  # fmt: skip
        self.dataset, self.objective = dataset, objective
        self.converter, self.vocabulary, self.seed = converter, vocabulary, seed
        lengths = np.asarray(dataset.lengths, dtype=np.int64).reshape(-1, 2)
        streams = catalogue.ARCHITECTURES[model.architecture].streams
        if len(streams) == 2:
            limits = (model.sequence_length, model.target_length or model.sequence_length)
            self.limits = np.minimum(lengths, limits)
        else:
            targets = np.minimum(lengths[:, 1], max(model.sequence_length // 2, 1))
            limits = (model.sequence_length,)
            self.limits = np.stack(
                [np.minimum(lengths[:, 0], model.sequence_length - targets), targets], axis=1
            )
        self.truncated = int((self.limits != lengths).any(axis=1).sum())
        shapes = [converter.shape(Lengths(int(n), int(m))) for n, m in self.limits]
        width = model.sequence_length if pack else 1
        limit = RowShape(limits, limits[-1], width * max(s.parts for s in shapes),
                         width * max(s.cross_parts for s in shapes))  # fmt: skip
        order = generator(seed ^ 0xD0C5, 0).permutation(len(shapes))
        planned = plan_rows([shapes[i] for i in order], limit) if pack else [[i] for i in range(len(order))]
        self.rows = [[int(order[i]) for i in row] for row in planned]
        self.per_epoch = len(self.rows)
        most = max(len(row) for row in self.rows)
        self.shape = replace(limit, parts=most * max(s.parts for s in shapes),
                             cross_parts=most * max(s.cross_parts for s in shapes))  # fmt: skip
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: generator(seed ^ 0xE90C, epoch).permutation(self.per_epoch)
        )

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        epoch, place = divmod(i, self.per_epoch)
        rng = generator(*rng_key)
        return [self._example(pair, rng) for pair in self.rows[self._epoch(epoch)[place]]]

    def _example(self, pair: int, rng: np.random.Generator) -> Converted:
        n, m = (int(x) for x in self.limits[pair])
        example = self.objective.pair(
            self.dataset.get(2 * pair, 0, n).astype(np.int64),
            self.dataset.get(2 * pair + 1, 0, m).astype(np.int64),
        )
        return self.converter(example, self.vocabulary)


class Rows:
    """All rows of a run: a blend of tasks, one fixed shape.

    `rows[i]` is the list of converted examples of sample i, for any i >= 0.
    """

    def __init__(self, model: Model, data: Data, prepared, seed: int):
        converter = CONVERTERS[model.architecture]
        vocabulary = prepared.tokenizer.vocabulary
        self.vocabulary, self.seed = vocabulary, seed
        self.axes = catalogue.position_axes(data.objective)
        components = objectives.build(
            data.objective,
            noise_density=data.noise_density,
            mean_span_length=data.mean_span_length,
            whole_word=data.whole_word_masking,
        )
        weights, self.tasks = [], []
        for share, objective in components:
            if prepared.pairs is not None:
                weights.append(share)
                self.tasks.append(PairRows(prepared.pairs, model, objective, converter,
                                           vocabulary, pack=data.pack, seed=seed))  # fmt: skip
                continue
            plan = layout(model, objective)
            for dataset, weight in prepared.train:
                weights.append(share * weight)
                self.tasks.append(TextRows(dataset, plan, converter, vocabulary, seed))
        self.blend = Blend(weights, seed)
        self.shape = fixed_shape(model, [task.shape for task in self.tasks])

    @property
    def per_epoch(self) -> float:
        """Rows after which the first task has seen all of its data."""
        shares = np.diff(self.blend.cumulative)
        return min(t.per_epoch / share for t, share in zip(self.tasks, shares, strict=True))

    def __getitem__(self, i: int) -> list[Converted]:
        task, place = self.blend[i]
        return self.tasks[task].row(place, (self.seed, i))


def fixed_shape(model: Model, shapes: list[RowShape]) -> RowShape:
    """One shape for rows of any of `shapes`: the configured lengths where they are given."""
    streams = tuple(max(lengths) for lengths in zip(*(s.streams for s in shapes), strict=True))
    configured = (model.sequence_length, model.target_length)[: len(streams)]
    streams = tuple(c or n for c, n in zip(configured, streams, strict=True))
    return RowShape(
        streams,
        max(s.targets for s in shapes),
        max(s.parts for s in shapes),
        max(s.cross_parts for s in shapes),
    )
