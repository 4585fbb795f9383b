"""What dialogues cost the cells of a study, and quality against it: the second axis of RedLLM 2025."""

from collections.abc import Mapping, Sequence
from typing import Any

from megaarch.probes.catalogue import Probed
from megaarch.probes.dialogue import TURNS, Dialogue
from megaarch.report import charts, notation
from megaarch.report.axes import Looks
from megaarch.report.findings import comparable
from megaarch.report.merged_cells import MergedCell
from megaarch.report.style import Panel

TRAINED = ("recompute", "reuse")  # policies whose mask the model was trained under
SHOWN = (*TRAINED, "turn_blocks")


def dialogues(probed: Mapping[str, Probed], cells: Sequence[MergedCell]) -> dict[str, Dialogue]:
    """Maps the label of each cell that can generate to what a dialogue costs it."""
    if "dialogue" not in probed:
        return {}
    probe = probed["dialogue"]
    found = {c.label: probe.of_cell(c.name, c.key, c.digests) for c in cells}
    return {label: record for label, record in found.items() if record and record.flops}


def cheapest(dialogue: Dialogue) -> list[int]:
    """Returns the FLOPs of each turn under the cheapest policy that the mask of training allows."""
    return min((dialogue.flops[policy] for policy in TRAINED), key=sum)


def panels(probed: Mapping[str, Probed], cells: Sequence[MergedCell], look: Looks) -> list[Panel]:
    """Held-out bits per byte against the FLOPs of a dialogue; sizes of a cell share a line."""
    costs = {label: float(sum(cheapest(d))) for label, d in dialogues(probed, cells).items()}
    made = charts.quality(
        "inference-quality",
        "Quality against the cost of a dialogue",
        comparable(cells),
        look,
        lambda cell: costs.get(cell.label),
        f"FLOPs of {TURNS} turns",
        notation.power,
    )
    for panel in made:
        panel.caption = "Under the cheapest policy that the mask of training allows."
    return made


def table(
    probed: Mapping[str, Probed], cells: Sequence[MergedCell], look: Looks
) -> dict[str, Any] | None:
    """Rows of what a dialogue costs each cell, and what its cache keeps; None where nothing was counted."""
    found = dialogues(probed, cells)
    if not found:
        return None
    rows = [
        {
            "name": label,
            "colour": look[label].variable,
            "numbers": [
                *(notation.power(sum(one.flops.get(policy, [])) or None) for policy in SHOWN),
                notation.whole(one.prompt_bytes_per_token),
                notation.whole(one.answer_bytes_per_token),
            ],
        }
        for label, one in found.items()
    ]
    first = next(iter(found.values()))
    return {"rows": rows, "turns": TURNS, "tokens": first.tokens}
