"""Rows: sample i of a run, as a pure function of (seed, i).

A task is one dataset under one objective. `TextRows` cuts text into segments (`row_lengths.py`) that run
over document boundaries, where the eos token stands, as in T5 and GPT pretraining; `DocumentRows`
(`document_rows.py`) keeps documents apart; `PairRows` packs short supervised examples. `Rows` blends tasks
and gives every one of them the same fixed row shape. The sample index never wraps: each epoch has its
own order and noise.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Data, Model
from megaarch.data.blend import Blend
from megaarch.data.document_rows import BLOCK, ORDER, DocumentRows, permutation
from megaarch.data.example import Converted, Converter, Lengths, RowShape, Vocabulary, generator
from megaarch.data.feature_converters import converter_of
from megaarch.data.objectives.language_modelling import supervised
from megaarch.data.packing import plan_rows
from megaarch.data.row_lengths import Segmentation, check_positions, fixed_shape, segmentations
from megaarch.errors import UserError

ROWS_ORDER = 0x9085  # as ORDER, of rows of pairs
STRIDE = 16  # documents, of whose first it is known where it stands in an epoch


class DocumentOrder:
    """The order of a dataset's documents in each epoch. All components of a mixture read by one: of a large
    dataset it takes gigabytes.

    dataset: IndexedDocuments that end in eos. epoch(n): the documents [D], in turn, the tokens before every
    STRIDE-th of them [D / STRIDE], and the generator behind the draw.
    """

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self.lengths = dataset.lengths
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        rng = generator(self.seed ^ ORDER, epoch)
        documents = permutation(rng, len(self.lengths))
        blocks = (documents[d : d + BLOCK] for d in range(0, len(documents), BLOCK))
        tokens = np.concatenate([_sums(self.lengths[block], STRIDE) for block in blocks])
        return documents, np.cumsum(tokens) - tokens, rng


def _sums(values: np.ndarray, stride: int) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), stride), dtype=np.int64)


class TextRows:
    """Rows of one or two segments each, documents shuffled per epoch.

    region: the share of each epoch's tokens that these rows read, from and to; the components of a
    mixture divide an epoch among them, so that none reads what another has read.
    """

    def __init__(
        self,
        documents: DocumentOrder,
        plan: Segmentation,
        converter: Converter,
        vocabulary: Vocabulary,
        region: tuple[float, float] = (0.0, 1.0),
    ):
        self.documents, self.plan = documents, plan
        self.converter, self.vocabulary = converter, vocabulary
        self.shape, self.lengths = plan.shape, documents.lengths
        tokens = int(self.lengths.sum(dtype=np.int64))
        self.first, end = (int(share * tokens) for share in region)
        self.per_epoch = (end - self.first) // plan.tokens
        self.examples = self.truncated = 0
        if self.per_epoch == 0:
            raise UserError(
                f"the text has {end - self.first} tokens for {plan.objectives[0].name} and one row "
                f"needs {plan.tokens}: give more text or lower model.sequence_length"
            )
        self._epoch = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        *_, rng = self.documents.epoch(epoch)
        return permutation(copy.deepcopy(rng), self.per_epoch)

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        epoch, place = divmod(i, self.per_epoch)
        documents, before, _ = self.documents.epoch(epoch)
        order = self._epoch(epoch)
        tokens = self._read(documents, before, self.first + int(order[place]) * self.plan.tokens)
        segments = np.split(tokens, len(self.plan.objectives))
        rng, examples = generator(*rng_key), []
        for objective, segment in zip(self.plan.objectives, segments, strict=True):
            if self.plan.mirrored:
                rng = generator(*rng_key)  # the same split for both
            examples.append(objective(segment, self.vocabulary, rng))
        return [self.converter(example, self.vocabulary) for example in examples]

    def _read(self, documents: np.ndarray, before: np.ndarray, start: int) -> np.ndarray:
        """Returns `plan.tokens` tokens from `start` in the concatenation of `documents`."""
        need, pieces = self.plan.tokens, []
        stride = int(np.searchsorted(before, start, side="right")) - 1
        d, offset = stride * STRIDE, start - int(before[stride])
        while offset >= (length := int(self.lengths[documents[d]])):
            offset, d = offset - length, d + 1
        while need:
            length = min(need, int(self.lengths[documents[d]]) - offset)
            pieces.append(self.documents.dataset.get(int(documents[d]), offset, length))
            need, offset, d = need - length, 0, d + 1
        return np.concatenate(pieces).astype(np.int64)


class PairRows:
    """Supervised (input, target) pairs, several packed in a row.

    dataset: an IndexedDataset whose sequences alternate input, target, each ending in eos. What
    is too long is cut at its end and ended by eos again, as seqio does.
    """

    def __init__(
        self,
        dataset,
        model: Model,
        data: Data,
        converter: Converter,
        vocabulary: Vocabulary,
        seed: int,
    ):
        self.dataset, self.converter, self.vocabulary = dataset, converter, vocabulary
        lengths = dataset.lengths.reshape(-1, 2)
        self.lengths, room = pair_lengths(lengths, model, data)
        self.examples = len(lengths)
        self.truncated = int((self.lengths != lengths).any(axis=1).sum())
        self.pairs = permutation(generator(seed ^ ORDER, 0), self.examples)
        kinds = self.lengths[self.pairs] @ np.array([1 << 32, 1])  # few of many pairs
        shape_of = {
            kind: converter.shape(Lengths(*divmod(kind, 1 << 32)))
            for kind in np.unique(kinds).tolist()
        }
        one = RowShape.largest(list(shape_of.values()))
        most = room[0] if data.pack else 1  # no bound on parts but a token each
        limit = RowShape(room, room[-1], most * one.parts, most * one.cross_parts)
        starts = np.arange(self.examples)
        if data.pack:
            rows = plan_rows((shape_of[kind] for kind in kinds.data), limit)
            starts = np.fromiter((row.start for row in rows), np.int64)
        targets = np.fromiter((shape_of[kind].targets for kind in kinds.data), np.int64)
        targets = int(np.add.reduceat(targets, starts).max())
        self.edges = np.append(starts, self.examples)  # of rows, in `pairs`
        self.per_epoch = len(starts)
        most = int(np.diff(self.edges).max())
        self.shape = RowShape(room, targets, most * one.parts, most * one.cross_parts)
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return permutation(generator(self.seed ^ ROWS_ORDER, epoch), self.per_epoch)

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        """See Task; pairs have no noise, so the key is not used."""
        epoch, place = divmod(i, self.per_epoch)
        row = int(self._epoch(epoch)[place])
        pairs = self.pairs[self.edges[row] : self.edges[row + 1]]
        return [self._example(pair) for pair in pairs.tolist()]

    def _example(self, pair: int) -> Converted:
        n, m = (int(x) for x in self.lengths[pair])
        example = supervised(
            np.append(self.dataset.get(2 * pair, 0, n - 1), self.vocabulary.eos),
            self.dataset.get(2 * pair + 1, 0, m - 1),  # `supervised` adds its eos
            self.vocabulary,
        )
        return self.converter(example, self.vocabulary)


def pair_lengths(
    lengths: np.ndarray, model: Model, data: Data
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns lengths [N, 2] of pairs cut to their limits and to what a row holds, and that row's
    stream lengths. UserError for a row that cannot hold two tokens.

    A decoder's row holds both; its target keeps at least half of the row if it needs it.
    """
    row = model.sequence_length
    limits = [limit or row for limit in (data.max_input_length, data.max_target_length)]
    if len(catalogue.ARCHITECTURES[model.architecture].streams) == 2:
        room = (row, model.target_length or row)
        limits[1] = data.max_target_length or room[1]
        return np.minimum(lengths, np.minimum(limits, room).astype(lengths.dtype)), room
    if row < 2:
        raise UserError(
            f"model.sequence_length: rows of {row} tokens are too short for supervised on "
            f"{model.architecture}"
        )
    inputs, targets = np.minimum(lengths, np.array(limits, lengths.dtype)).T
    targets = np.minimum(targets, np.maximum(row - inputs, row // 2))
    return np.stack([np.minimum(inputs, row - targets), targets], axis=1), (row,)


def check_kind(data: Data, supervised: bool) -> None:
    """UserError where the objective does not train on what the sources hold. supervised: pairs."""
    if supervised != (data.objective == "supervised"):
        what = "{input, target} pairs" if supervised else "text"
        raise UserError(
            f"data.objective: {data.objective} cannot train on {what}, which data.source "
            f"{data.source} holds: "
            + ("use supervised" if supervised else "give pairs, or another objective")
        )


# A dataset under an objective. `row(i, rng_key)` is its i-th row, of converted examples; noise is drawn from
# the generator of `rng_key`. per_epoch: rows. examples: {input, target} pairs of an epoch, or documents that
# are kept apart; truncated: pairs of them that were cut, documents that are too short. Of text without masks
# both are 0.
Task = TextRows | DocumentRows | PairRows


class Rows:
    """All rows of a run: a blend of tasks, one fixed shape.

    `rows[i]` is the list of converted examples of sample i, for any i >= 0. `examples` and `truncated`
    count as in `Task`.
    UserError where no row can be made: text and objective do not go together, too little text,
    too few sentinels or learned positions.
    """

    def __init__(self, model: Model, data: Data, prepared, seed: int):
        check_kind(data, prepared.supervised)
        converter = converter_of(model.architecture)
        vocabulary = prepared.tokenizer.vocabulary
        self.vocabulary, self.seed = vocabulary, seed
        self.axes = catalogue.position_axes(data.objective)
        weighted = list(_tasks(model, data, prepared, converter, vocabulary, seed))
        self.tasks = [task for _, task in weighted]
        self.examples = sum(task.examples for task in self.tasks)
        self.truncated = sum(task.truncated for task in self.tasks)
        self._supervised = prepared.supervised
        self.blend = Blend([weight for weight, _ in weighted], seed)
        self.shape = fixed_shape(model, [task.shape for task in self.tasks])
        check_positions(model, data.objective, self.shape)
        for task in self.tasks:  # what no row can be made of (too few sentinels) shows here
            task.row(0, (seed, 0))

    @property
    def per_epoch(self) -> float:
        """Rows after which the first source has been read once. (The components of a mixture
        come to the ends of their regions together.)"""
        shares = zip(self.tasks, self.blend.share.tolist(), strict=True)
        return min(task.per_epoch / share for task, share in shares)

    @property
    def truncated_share(self) -> float | None:
        """The share of pairs that were cut, or of documents that were left out; None of text without
        document masks."""
        return self.truncated / self.examples if self.examples else None

    @property
    def truncation(self) -> str | None:
        """A sentence on what was cut or left out; None where nothing was."""
        if not self.truncated:
            return None
        count = f"{self.truncated} of {self.examples}"
        if not self._supervised:
            return f"{count} documents ({self.truncated_share:.1%}) have one token and are left out"
        return (
            f"{count} {{input, target}} pairs ({self.truncated_share:.1%}) are too long and were cut: "
            "raise data.max_input_length, data.max_target_length or the row if that is too many"
        )

    def __getitem__(self, i: int) -> list[Converted]:
        task, place = self.blend[i]
        return self.tasks[task].row(place, (self.seed, i))


def _tasks(
    model: Model, data: Data, prepared, converter: Converter, vocabulary: Vocabulary, seed: int
) -> Iterator[tuple[float, Task]]:
    """Yields every dataset under every component of the objective, with the product of their
    weights; with document masks, whose rows hold all components, every dataset."""
    if prepared.supervised:
        for dataset, weight in prepared.train:
            yield weight, PairRows(dataset, model, data, converter, vocabulary, seed)
        return
    plans = segmentations(model, data)
    if data.document_masks:
        for dataset, weight in prepared.train:
            yield weight, DocumentRows(dataset, plans, model, converter, vocabulary, seed)
        return
    ends = np.cumsum([share * plan.tokens for share, plan in plans])
    ends = [0.0, *(ends / ends[-1]).tolist()]
    orders = [(DocumentOrder(dataset, seed), weight) for dataset, weight in prepared.train]
    for (share, plan), *region in zip(plans, ends[:-1], ends[1:], strict=True):
        for order, weight in orders:
            yield share * weight, TextRows(order, plan, converter, vocabulary, tuple(region))
