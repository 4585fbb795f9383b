"""Log-likelihoods of targets and whether greedy decoding gives them, in batches of unpadded rows.

A row runs as a prompt runs in generation, over a cache that is dropped, for that call of the model
returns logits in every layout.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.data.example import Converted, RowShape
from megaarch.data.packing import pack, plan_rows
from megaarch.inference.generate import Generator
from megaarch.model.kv_cache import Cache

LOGITS = 1 << 26  # that exist at a time


@dataclass(frozen=True)
class Score:
    """loglikelihood: in nats. is_greedy: whether each target is the most likely next token."""

    loglikelihood: float
    is_greedy: bool


Alike = list[tuple[int, Converted]]  # examples of one row, each with the number of its group


class TargetScorer:
    """Scores the weighted targets of converted examples; probabilities are over the tokenizer's own ids.

    ends: ids that would end an answer, and so count among the most likely next tokens. rows: of a batch.
    """

    def __init__(self, generator: Generator, ends: Sequence[int], rows: int):
        self.generator, self.rows = generator, rows
        ids = np.arange(generator.settings.model.vocabulary_size) < generator.tokenizer.base_size
        greedy = ids.copy()
        greedy[list(ends)] = True
        self.ids, self.greedy = (generator.layout.tensor(~allowed) for allowed in (ids, greedy))
        self.most_targets = max(1, LOGITS // len(ids))

    def __call__(self, groups: Sequence[Sequence[Converted]]) -> list[Score]:
        """Returns the score of each group, summed over the examples in it. Examples that differ in
        what nothing sees, as one-token choices after a context do, run once."""
        alike: dict[bytes, Alike] = defaultdict(list)
        for number, group in enumerate(groups):
            for converted in group:
                alike[_row(converted)].append((number, converted))
        sums, greedy = np.zeros(len(groups)), np.ones(len(groups), dtype=bool)
        for together in self._batches(list(alike.values())):
            for number, value, is_greedy in self._scores(together):
                sums[number] += value
                greedy[number] &= is_greedy
        return [Score(float(a), bool(b)) for a, b in zip(sums, greedy, strict=True)]

    def _batches(self, found: list[Alike]) -> Iterator[list[Alike]]:
        """Yields rows of like lengths, the longest first. A batch is planned as a row is: each example takes one of its
        rows, and its targets."""
        found.sort(key=lambda same: -len(same[0][1].streams[-1].tokens))
        most = self.most_targets
        taken = (RowShape((1,), min(len(_weighted(same[0][1])), most), 0) for same in found)
        for places in plan_rows(taken, RowShape((self.rows,), most, 0)):
            yield [found[place] for place in places]

    def _scores(self, together: list[Alike]) -> Iterator[tuple[int, float, bool]]:
        """Yields (group, log-likelihood, is greedy) of each example of a batch."""
        logits_RV = self._logits([same[0][1] for same in together])
        partition_R = logits_RV.masked_fill(self.ids, -torch.inf).logsumexp(-1)
        best_R = logits_RV.masked_fill(self.greedy, -torch.inf).argmax(-1)
        groups, rows, targets, first = [], [], [], 0
        for same in together:
            of_row = first + np.arange(len(_weighted(same[0][1])))
            for number, converted in same:
                groups.append(number)
                rows.append(of_row)
                targets.append(converted.target_tokens[_weighted(converted)])
            first += len(of_row)
        row_K = torch.from_numpy(np.concatenate(rows)).to(logits_RV.device)
        target_K = torch.from_numpy(np.concatenate(targets)).to(logits_RV.device)
        found_K = (logits_RV[row_K, target_K] - partition_R[row_K]).double().cpu().numpy()
        equal_K = (best_R[row_K] == target_K).cpu().numpy()
        ends = np.cumsum([len(of_row) for of_row in rows])[:-1]
        for number, found, equal in zip(groups, *(np.split(x, ends) for x in (found_K, equal_K))):
            yield number, float(found.sum()), bool(equal.all())

    def _logits(self, examples: Sequence[Converted]) -> torch.Tensor:
        """Returns the logits [R, V] of the weighted targets of each example, one after the other."""
        layout = self.generator.layout
        shape = RowShape.largest([example.shape for example in examples])
        batch = pack(
            [[example] for example in examples],
            shape,
            pad=layout.pad,
            axes=layout.axes,
            sample_index=range(len(examples)),
            multiple=layout.multiple,
        )
        positions = batch.streams[-1].positions.numpy()
        rows, width = positions.shape[:2]
        cache = Cache(rows, layout.axes, layout.device, width)
        cache.begin(np.full(rows, width), positions)
        with torch.no_grad():
            logits = self.generator.model(batch.to(layout.device), None, None, (), cache)
        return logits[: batch.head_count]


def _weighted(converted: Converted) -> np.ndarray:
    return np.flatnonzero(converted.target_weights > 0)


def _row(converted: Converted) -> bytes:
    """Returns what tells the logits of an example's targets."""
    arrays = [converted.target_index[_weighted(converted)]]
    for stream in converted.streams:
        arrays += [stream.tokens, stream.positions, np.array(stream.parts)]
    return b"|".join(str(x.shape).encode() + np.ascontiguousarray(x).tobytes() for x in arrays)
