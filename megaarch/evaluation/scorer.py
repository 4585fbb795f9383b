"""Scoring: log-likelihoods of continuations and middles, in each model's own conditional form.

Every yardstick goes through one path: conditional form -> converter -> packing -> model, the same
as in training.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megaarch.config import catalogue
from megaarch.config.schema import Evaluation, Settings
from megaarch.data import conditional_forms
from megaarch.data.example import Converted, RowShape, Vocabulary
from megaarch.data.feature_converters import converted_continuation, converter_of
from megaarch.data.objectives.span_corruption import Spans
from megaarch.data.packing import pack, plan_rows
from megaarch.data.row_lengths import longest_example, longest_streams, spans_of
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.ingest.prepared_data import Prepared
from megaarch.ingest.tasks.template import Question
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.model.transformer import Transformer


@dataclass(frozen=True)
class Scores:
    """Summed log-likelihoods in nats, float64 [N] each.

    text: probabilities renormalized over text tokens. raw: over the whole vocabulary.
    """

    text: np.ndarray
    raw: np.ndarray


Pair = tuple[np.ndarray, np.ndarray]  # tokens of a prefix and of its continuation
ROOM_BEHIND = (1, 32)  # tokens of an answer: what two studies' rooms are told apart by


class Room:
    """How long a prompt may be: one answer for all cells of a study, that of the cell with the least.

    A cell has room for what its training rows hold: no more text than an example of its objective is made
    of, and, in the form that it is scored in, no longer a row and no more positions than examples take.

    cells: the settings and the vocabulary of each.
    """

    def __init__(self, cells: Sequence[tuple[Settings, Vocabulary]]):
        self.cells = tuple(cells)
        self._found: dict[int, int] = {}

    def __call__(self, behind: int) -> int:
        """Returns the most tokens of a prompt before `behind` others, at least 1."""
        if behind not in self._found:
            self._found[behind] = max(1, min(_own_room(*cell, behind) for cell in self.cells))
        return self._found[behind]

    @property
    def text(self) -> int:
        """The most tokens of a prompt and what is behind it together, and of a row."""
        return min(self(1) + 1, *(settings.model.sequence_length for settings, _ in self.cells))


def _own_room(settings: Settings, vocabulary: Vocabulary, behind: int) -> int:
    model, data = settings.model, settings.data
    if catalogue.OBJECTIVES[data.objective].of_pairs:
        most = (data.max_input_length or model.sequence_length) - 1  # an input ends in eos
        positions = None
    else:
        text, positions = longest_example(model, data)
        most = text - behind

    def lacks(length: int) -> bool:
        made_up = _made_up(vocabulary, (length, behind))
        return not fits(settings, vocabulary, *made_up, positions)

    return bisect_left(range(1, most + 1), True, key=lacks)


def _made_up(vocabulary: Vocabulary, lengths: tuple[int, int]) -> Pair:
    prompt, others = (np.full(n, vocabulary.text.argmax(), dtype=np.int64) for n in lengths)
    return prompt, others


def form_marks(
    settings: Settings, prepared: Prepared, evaluation: Evaluation, room: Room | None
) -> dict[str, Any]:
    """Returns what tells a cell's scores from those that an earlier version gave it; nothing of a cell whose
    scores are the same.

    decoder: the tokens that the decoder beside an encoder holds, of a cell that was fed more. spans: their
    length and period, where they are not those of T5's noise. tasks.choices: of a finetuned cell that is
    scored on tasks.
    """
    model, data = settings.model, settings.data
    spans, usual = spans_of(data), Spans()
    marks: dict[str, Any] = (
        {} if spans in (None, usual) else {"spans": [spans.length, spans.period]}
    )
    if evaluation.tasks and catalogue.OBJECTIVES[data.objective].of_pairs:
        marks["tasks.choices"] = "end in eos"
    _, *decoder = longest_streams(model, data)
    if not decoder:
        return marks
    lengths = evaluation.lengths if evaluation.by_length else ()
    asked = [(evaluation.prefix_tokens, max(2 * evaluation.continuation_tokens, *lengths, 0))]
    if evaluation.tasks and room:
        behind = ROOM_BEHIND[-1]
        asked.append((room(behind), behind))
    vocabulary = prepared.tokenizer.vocabulary
    made = (
        each
        for pair in asked
        for each in _converted(settings, vocabulary, _made_up(vocabulary, pair), usual)
    )
    if any(each.positions[-1] > decoder[0] for each in made):
        marks["decoder"] = decoder[0]
    return marks


class Scorer:
    """Scores token spans with a model under the settings it was trained with.

    model: a Transformer, or the Engine of a layout, every process of which scores the same.
    rows: batch rows of a forward pass. room: of prompts; None: the model's own.
    """

    def __init__(
        self,
        model: Transformer | Engine,
        settings: Settings,
        vocabulary: Vocabulary,
        rows: int,
        room: Room | None = None,
    ):
        self.model, self.vocabulary, self.rows = model, vocabulary, rows
        self.room = room or Room([(settings, vocabulary)])
        self.settings, self.objective = settings, settings.data.objective
        self.architecture = settings.model.architecture
        self.spans = spans_of(settings.data, settings.model)
        self.device = next(model.parameters()).device
        self.multiple = model.grid.row_multiple if isinstance(model, Engine) else 1
        text = np.zeros(settings.model.vocabulary_size, dtype=bool)
        text[: vocabulary.size] = vocabulary.text
        self.text_tokens = torch.from_numpy(text).to(self.device)

    def loglikelihoods(self, pairs: Sequence[Pair]) -> Scores:
        """log p(continuation | prefix) of each (prefix, continuation)."""
        return self._summed(self._continuations(pairs))

    def _continuations(self, pairs: Sequence[Pair]) -> list[list[Converted]]:
        return [_converted(self.settings, self.vocabulary, pair, self.spans) for pair in pairs]

    def middles(self, triples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Scores:
        """log p(middle | before, after) of each (before, middle, after)."""
        form, convert = (self.objective, self.architecture), converter_of(self.architecture)
        words, spans = self.vocabulary, self.spans
        groups = (conditional_forms.middle(*form, *triple, words, spans) for triple in triples)
        return self._summed([[convert(each, words) for each in group] for group in groups])

    def by_length(self, pairs: Sequence[Pair], lengths: Sequence[int]) -> np.ndarray:
        """log p(first n tokens of the continuation | prefix) over text tokens for each n of `lengths`,
        float64 [N, lengths]; NaN where a continuation has fewer.

        One pass gives all where targets are predicted left to right; a pseudo-likelihood sees the rest
        of the continuation, so that each length is scored by itself.
        """
        found = np.full((len(pairs), len(lengths)), np.nan)
        if catalogue.OBJECTIVES[self.objective].comparable:
            ends = np.array(lengths)
            targets = self._targets(self._continuations(pairs))
            for row, (text, _) in zip(found, targets, strict=True):
                held = ends <= len(text)
                row[held] = np.cumsum(text)[ends[held] - 1]
            return found
        for k, n in enumerate(lengths):
            long = [i for i, (_, continuation) in enumerate(pairs) if len(continuation) >= n]
            cut = [(pairs[i][0], pairs[i][1][:n]) for i in long]
            found[long, k] = self.loglikelihoods(cut).text
        return found

    def holds(self, prefix: np.ndarray, continuation: np.ndarray) -> bool:
        """Whether the pair fits a row of training."""
        return fits(self.settings, self.vocabulary, prefix, continuation)

    def _summed(self, groups: Sequence[Sequence[Converted]]) -> Scores:
        """Log-likelihoods of the weighted targets of each group of examples, summed over the group."""
        found = self._targets(groups)
        text, raw = np.array([each.sum(axis=1) for each in found]).reshape(-1, 2).T
        return Scores(text, raw)

    def _targets(self, groups: Sequence[Sequence[Converted]]) -> list[np.ndarray]:
        """Log-likelihoods of the weighted targets of each group, in order, over text tokens and over
        all: float64 [2, targets] each."""
        converted = [each for group in groups for each in group]
        # equal lengths share a row, and rows of equal parts share a kernel call
        order = sorted(range(len(converted)), key=lambda i: len(converted[i].streams[0].tokens))
        limit = row_limit(self.settings, converted).stretched(self.multiple)
        planned = [
            [converted[order[place]] for place in row]
            for row in plan_rows([converted[i].shape for i in order], limit)
        ]
        passes = range(0, len(planned), self.rows)
        nll = [self._forward(planned[first : first + self.rows], limit) for first in passes]
        counts = [np.count_nonzero(converted[i].target_weights > 0) for i in order]
        by_example = np.split(-np.concatenate(nll, axis=1), np.cumsum(counts)[:-1], axis=1)
        found = dict(zip(order, by_example, strict=True))
        numbers = iter(range(len(converted)))
        return [np.concatenate([found[next(numbers)] for _ in g], axis=1) for g in groups]

    def _forward(self, rows: list[list[Converted]], shape: RowShape) -> np.ndarray:
        """Negative log-likelihoods of the weighted targets, one row after the other, [2, targets]."""
        axes, pad = catalogue.position_axes(self.objective), self.vocabulary.pad
        batch = pack(rows, shape, pad=pad, axes=axes, sample_index=range(len(rows)))
        batch = batch.to(self.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = self.model(batch, self.text_tokens)
        self.model.train(training)
        weights = batch.target_weights
        both = torch.stack([losses.text_nll * weights, losses.nll * weights])
        return both[:, weights > 0].double().cpu().numpy()


def fitted(tokenizer: Tokenizer, question: Question, room: int) -> tuple[np.ndarray, bool]:
    """Returns a question's tokens, int64, behind as many of its examples, the last ones, as `room` tokens
    hold, and whether that is less than all. Without any, a question that is too long gives way at its left
    end."""
    asked = whole = tokenizer.encode(question.input)
    for text in question.shorter():
        if len(asked) <= room:
            break
        asked = tokenizer.encode(text)
    asked = asked[-room:].astype(np.int64)
    return asked, len(asked) < len(whole)


def fits(
    settings: Settings,
    vocabulary: Vocabulary,
    prefix: np.ndarray,
    continuation: np.ndarray,
    positions: Sequence[int] | None = None,
) -> bool:
    """Whether a continuation behind its prefix fits a row of training, in the objective's form, and takes
    no more than `positions` of each stream, where these are given."""
    model, data = settings.model, settings.data
    try:
        made = _converted(settings, vocabulary, (prefix, continuation), spans_of(data, model))
        row_limit(settings, made)
    except UserError:
        return False
    return positions is None or all(
        taken <= most
        for each in made
        for taken, most in zip(each.positions, positions, strict=True)
    )


def _converted(
    settings: Settings, vocabulary: Vocabulary, pair: Pair, spans: Spans | None
) -> list[Converted]:
    """Returns the examples of a continuation behind its prefix, in the form of the settings' objective."""
    objective, architecture = settings.data.objective, settings.model.architecture
    return converted_continuation(objective, architecture, *pair, vocabulary, spans)


def row_limit(settings: Settings, converted: list[Converted]) -> RowShape:
    """The shape of scoring rows: as many of the longest item as fit a row of training, in every stream.

    UserError where an item does not fit one.
    """
    model, shape = settings.model, RowShape.largest([c.shape for c in converted])
    learned = model.position_encoding == "learned"
    limits = longest_streams(model, settings.data)
    names = ("sequence_length", "target_length")
    for name, taken, most in zip(names, shape.streams, limits, strict=False):
        if taken > most or (learned and taken > model.position_rows):
            of = "" if name == names[0] else " in the decoder"
            raise UserError(
                f"an item takes a row of {taken} tokens{of} and {settings.data.objective} was "
                f"trained on rows of {most}: lower study.evaluation.prefix_tokens and "
                f"continuation_tokens, leave out tasks with longer answers, or raise model.{name}"
            )
    fit = min(most // max(n, 1) for n, most in zip(shape.streams, limits, strict=True))
    return RowShape.of(max(fit, 1) * size for size in shape.sizes)
