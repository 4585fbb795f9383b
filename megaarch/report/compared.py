"""Which cells of a study its arguments are judged on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaarch.probes.catalogue import Probed
from megaarch.report.axes import Looks
from megaarch.report.cells import MergedCell, finetuned, merged_cells
from megaarch.report.style import looks
from megaarch.study.results import Results


@dataclass(frozen=True)
class Compared:
    """Cells of the largest budget and size. raw: those with positions, before finetuning. without: those
    without positions. decoder: the causal one of full_lm among raw."""

    cells: list[MergedCell]
    look: Looks
    raw: list[MergedCell]
    without: list[MergedCell]
    decoder: MergedCell

    @classmethod
    def of(cls, results: Results) -> "Compared | None":
        every = merged_cells(results)
        cells = [cell for cell in every if cell.adaptation is None]
        largest = max((cell.budget for cell in cells), default=0)
        most = max((cell.parameters or 0 for cell in cells if not _two_stacks(cell)), default=0)
        cells = [
            c
            for c in cells
            if c.budget == largest
            and (len({d.size for d in cells}) == 1 or (c.parameters or 0) >= most)
        ]
        text = [cell for cell in cells if not finetuned(cell)]
        raw = [cell for cell in text if not _blind(cell)]
        decoders = [
            c for c in raw if (c.architecture, c.objective) == ("causal_decoder", "full_lm")
        ]
        if not decoders:
            return None
        without = [cell for cell in text if _blind(cell)]
        return cls(cells, looks(every), raw, without, decoders[0])

    def probed(self, found: Probed, cells: Sequence[MergedCell]) -> dict[str, Any]:
        """Maps the label of each cell that was probed to its record."""
        pairs = ((c.label, found.of_cell(c.name, c.key)) for c in cells)
        return {label: record for label, record in pairs if record is not None}

    def causal(self, label: str) -> bool:
        """Whether the cell of this label is a causal decoder."""
        return any(c.label == label and c.architecture == "causal_decoder" for c in self.cells)

    def pair(self, cell: MergedCell) -> MergedCell | None:
        """The cell with positions that one without them is held against."""
        same = (cell.architecture, cell.objective)
        return next((c for c in self.raw if (c.architecture, c.objective) == same), None)


def _two_stacks(cell: MergedCell) -> bool:
    return cell.architecture == "encoder_decoder"


def _blind(cell: MergedCell) -> bool:
    return cell.settings.get("model", {}).get("position_encoding") == "none"
