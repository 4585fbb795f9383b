"""Which cells of a study its arguments are judged on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaarch.evaluation.confidence_intervals import NORMAL_95, paired_error, seed_error, widened
from megaarch.probes.catalogue import Probed
from megaarch.report.axes import Looks
from megaarch.report.merged_cells import MergedCell, finetuned, merged_cells, without_positions
from megaarch.report.style import looks
from megaarch.report.yardsticks import CONTINUATION, Score
from megaarch.study.results import Results


@dataclass(frozen=True)
class Compared:
    """Cells of the largest budget, and of the size of the largest decoder there. raw: those with positions,
    before finetuning. without: those without positions. decoder: the causal one of full_lm among raw. Cells
    that trained longer, from another's weights, are in neither."""

    cells: list[MergedCell]
    look: Looks
    raw: list[MergedCell]
    without: list[MergedCell]
    decoder: MergedCell

    @classmethod
    def of(cls, results: Results) -> "Compared | None":
        every = merged_cells(results)
        cells = [cell for cell in every if cell.adaptation is None]
        largest = max((cell.budget for cell in cells if not finetuned(cell)), default=0)
        text = [c for c in cells if c.budget == largest and not finetuned(c) and c.ranks]
        decoders = [
            c
            for c in text
            if not without_positions(c)
            and (c.architecture, c.objective) == ("causal_decoder", "full_lm")
        ]
        if not decoders:
            return None
        decoder = max(decoders, key=lambda c: c.parameters or 0)
        text = [c for c in text if c.size == decoder.size]
        tuned = [c for c in cells if finetuned(c) and c.size == decoder.size]
        raw, without = (
            [c for c in text if without_positions(c) == blind] for blind in (False, True)
        )
        return cls([*text, *tuned], looks(every), raw, without, decoder)

    def probed(
        self, found: Probed, cells: Sequence[MergedCell]
    ) -> tuple[dict[str, Any], list[str]]:
        """Maps the label of each cell that was probed to its record, and names those that were not."""
        every = {c.label: found.of_cell(c.name, c.key, c.digests) for c in cells}
        records = {label: record for label, record in every.items() if record is not None}
        return records, [label for label in every if label not in records]

    def causal(self, label: str) -> bool:
        """Whether the cell of this label is a causal decoder."""
        return any(c.label == label and c.architecture == "causal_decoder" for c in self.cells)

    def pair(self, cell: MergedCell) -> MergedCell | None:
        """The cell with positions that one without them is held against."""
        same = (cell.architecture, cell.objective)
        return next((c for c in self.raw if (c.architecture, c.objective) == same), None)

    def loss_without_positions(self, cell: MergedCell) -> Score:
        """Bits per byte that a cell loses against its pair with positions, in all and of each item."""
        pair = self.pair(cell)
        if pair is None:
            return Score(None)
        a, b = cell.heldout.score(CONTINUATION), pair.heldout.score(CONTINUATION)
        if a.value is None or b.value is None or a.paired is None or b.paired is None:
            return Score(None)
        value, alike = a.value - b.value, cell.seeds == pair.seeds
        seeds = [x - y for x, y in zip(a.by_seed, b.by_seed, strict=True)] if alike else []
        error = paired_error(a.paired, b.paired)
        half = NORMAL_95 * error.deviation if error else math.inf
        interval = widened([value - half, value + half], value, seed_error(seeds))
        items = np.subtract(a.paired.amounts, b.paired.amounts).tolist() if error else None
        paired = a.paired.model_copy(update={"amounts": items}) if items else None
        return Score(value, interval, paired, seeds)
