"""Scoring: log-likelihoods of continuations and middles, in each model's own conditional form.

Every yardstick goes through one path: conditional form -> converter -> packing -> model, the same
as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.data import conditional
from megaarch.data.converters import converter_of
from megaarch.data.example import Converted, Example, RowShape, Vocabulary
from megaarch.data.packing import pack, plan_rows
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.model.transformer import Transformer


@dataclass(frozen=True)
class Scores:
    """Summed log-likelihoods in nats, float64 [N] each.

    text: probabilities renormalized over text tokens. raw: over the whole vocabulary.
    """

    text: np.ndarray
    raw: np.ndarray


class Scorer:
    """Scores token spans with a model under the settings it was trained with.

    model: a Transformer, or the Engine of a layout, every process of which scores the same.
    rows: batch rows of a forward pass.
    """

    def __init__(
        self,
        model: Transformer | Engine,
        settings: Settings,
        vocabulary: Vocabulary,
        rows: int,
    ):
        self.model, self.vocabulary, self.rows = model, vocabulary, rows
        self.settings = settings
        self.objective = settings.data.objective
        self.architecture = settings.model.architecture
        self.converter = converter_of(self.architecture)
        self.axes = catalogue.position_axes(self.objective)
        self.device = next(model.parameters()).device
        self.multiple = model.grid.row_multiple if isinstance(model, Engine) else 1
        text = np.zeros(settings.model.vocabulary_size, dtype=bool)
        text[: vocabulary.size] = vocabulary.text
        self.text_tokens = torch.from_numpy(text).to(self.device)

    def loglikelihoods(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """log p(continuation | prefix) of each (prefix, continuation)."""
        return self.examples(
            [
                conditional.continuation(
                    self.objective, self.architecture, prefix, continuation, self.vocabulary
                )
                for prefix, continuation in pairs
            ]
        )

    def middles(self, triples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Scores:
        """log p(middle | before, after) of each (before, middle, after)."""
        return self.examples(
            [
                conditional.middle(
                    self.objective, self.architecture, before, middle, after, self.vocabulary
                )
                for before, middle, after in triples
            ]
        )

    def examples(self, groups: Sequence[Sequence[Example]]) -> Scores:
        """Log-likelihoods of the weighted targets of each group of examples, summed over the group."""
        converted = [
            (g, self.converter(example, self.vocabulary))
            for g, group in enumerate(groups)
            for example in group
        ]
        # equal lengths share a row, and rows of equal parts share a kernel call
        converted.sort(key=lambda pair: (len(pair[1].streams[0].tokens), pair[0]))
        limit = row_limit(self.settings, [c for _, c in converted]).stretched(self.multiple)
        planned = plan_rows([c.shape for _, c in converted], limit)
        text, raw = np.zeros(len(groups)), np.zeros(len(groups))
        for first in range(0, len(planned), self.rows):
            rows = planned[first : first + self.rows]
            nll = self._forward([[converted[i][1] for i in row] for row in rows], limit)
            for b, row in enumerate(rows):
                slot = 0
                for i in row:
                    group, example = converted[i]
                    end = slot + len(example.target_index)
                    text[group] -= nll[0, b, slot:end].sum()
                    raw[group] -= nll[1, b, slot:end].sum()
                    slot = end
        return Scores(text, raw)

    def _forward(self, rows: list[list[Converted]], shape: RowShape) -> np.ndarray:
        batch = pack(
            rows, shape, pad=self.vocabulary.pad, axes=self.axes, sample_index=range(len(rows))
        ).to(self.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = self.model(batch, self.text_tokens)
        self.model.train(training)
        weights = batch.target_weights
        both = torch.stack([losses.text_nll * weights, losses.nll * weights])
        return both.double().cpu().numpy()


def row_limit(settings: Settings, converted: list[Converted]) -> RowShape:
    """The shape of scoring rows: as many of the longest item as fit a row of training.

    ValueError where an item does not fit one.
    """
    model, shapes = settings.model, [c.shape for c in converted]
    longest = [max(lengths) for lengths in zip(*(s.streams for s in shapes), strict=True)]
    room, learned = model.sequence_length, model.position_encoding == "learned"
    if longest[0] > room or (learned and max(longest) > model.position_rows):
        raise UserError(
            f"an item takes a row of {max(longest)} tokens and {settings.data.objective} was "
            f"trained on rows of {room}: lower study.evaluation.prefix_tokens and "
            "continuation_tokens, or raise model.sequence_length"
        )
    fit = max(1, room // max(longest[0], 1))
    return RowShape(
        tuple(fit * n for n in longest),
        fit * max(s.targets for s in shapes),
        fit * max(s.parts for s in shapes),
        fit * max(s.cross_parts for s in shapes),
    )
