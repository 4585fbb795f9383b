"""The figures of a study, each a panel of its own: PDF and SVG files, or drawings in the page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

from megaarch.config import catalogue
from megaarch.probes.catalogue import Probed
from megaarch.report import charts, dialogue_costs, notation, scaling_laws
from megaarch.report import findings as report_findings
from megaarch.report.arguments.evidence import evidence
from megaarch.report.axes import Looks, reference
from megaarch.report.charts import Entry, Point, lines
from megaarch.report.masks import mask_panel
from megaarch.report.merged_cells import MergedCell, finetuned, merged_cells
from megaarch.report.style import RC, Panel, looks, slug, write
from megaarch.report.yardsticks import (
    CHOICE,
    CONTINUATION,
    MIDDLE,
    Score,
    Yardstick,
    gain_of_length,
    knows_length,
    lengths,
    of_length,
    of_shots,
    of_task,
    shots,
    unseen,
)
from megaarch.study.results import Results

BOTH_SIDES = "Each token given both of its sides: not comparable with the rest."
HOLLOW = "Hollow: started from another cell's weights."
PSEUDO, TOLD = "*", "\u2020"  # marks of a row
NOTES = {
    PSEUDO: BOTH_SIDES,
    TOLD: "Told the gap's length: one mask or position for each of its tokens.",
}


def write_figures(
    found: Results | dict, directory: str | Path, probed: Mapping[str, Probed] | None = None
) -> list[Path]:
    """Writes every figure of `found` (what results.json holds) and of the study's probes as PDF and SVG in
    `directory`, made where it is missing. Returns the paths."""
    directory, results = Path(directory), Results.of(found)
    directory.mkdir(parents=True, exist_ok=True)
    probed = probed or {}
    panels = [panel for section in sections(results, probed).values() for panel in section]
    panels += [panel for each in evidence(results, probed) for panel in each.panels]
    return [path for panel in panels for path in write(panel, directory)]


def sections(
    results: Results, probed: Mapping[str, Probed] | None = None
) -> dict[str, list[Panel]]:
    """Section -> its panels: masks, heldout, loss, throughput, choice, tasks, scaling,
    laws, inference. What study.adapt added is a table of the page."""
    every = merged_cells(results)
    look, cells = looks(every), [cell for cell in every if cell.adaptation is None]
    budgets = sorted({cell.budget for cell in cells})
    found: dict[str, list[Panel]] = {"masks": masks(cells)}
    with matplotlib.rc_context(RC):
        for number, amount in enumerate(budgets, 1):
            group = [cell for cell in cells if cell.budget == amount]
            suffix = f"-budget-{number}" if len(budgets) > 1 else ""
            each = f"{notation.budget(results.budget.match, amount)} each"
            for section, make in SECTIONS.items():
                for panel in make(results, group, look, suffix):
                    panel.group = each if suffix else ""
                    found.setdefault(section, []).append(panel)
            found.setdefault("scaling", []).extend(scaling(group, look, number, each))
        found["laws"] = scaling_laws.panels(results, cells, look)
        found["inference"] = dialogue_costs.panels(probed or {}, every, look)
    return found


def masks(cells: Sequence[MergedCell]) -> list[Panel]:
    """One drawing for each cell name; sizes, budgets and seeds share their mask."""
    first: dict[str, MergedCell] = {}
    for cell in cells:
        if cell.masks:
            first.setdefault(cell.name, cell)
    panels = []
    for name, cell in first.items():
        panels.append(mask_panel(cell.masks, name, f"mask-{slug(name)}"))
        if is_mixture(cell.objective):
            panels[-1].caption = "One row of a mixture, whose other parts may be masked otherwise."
    return panels


def is_mixture(objective: str) -> bool:
    row = catalogue.OBJECTIVES.get(objective)
    return row is not None and not row.of_pairs and len(row.components()) > 1


def heldout(
    results: Results, cells: Sequence[MergedCell], look: Looks, suffix: str
) -> Iterator[Panel]:
    """Bits per byte along the run, against compute and time, and at the end."""
    final = reference("unigram", results.unigram_bits_per_byte)
    of_curve = reference("unigram", results.curve_unigram_bits_per_byte)  # its own documents
    comparable = report_findings.comparable(cells)

    def has_curve(cell: MergedCell) -> bool:
        return any(point.heldout is not None for point in cell.curve)

    if order := list(filter(has_curve, comparable)):
        inherits = any(cell.inherited_flops for cell in order)
        starts = "A cell that starts from another begins at what that one spent."
        own = "Each cell's own time, without that of the one it starts from."
        for name, x, note in (("flops", "flops", starts), ("time", "seconds", own)):
            title = "Against compute" if x == "flops" else "Against time"
            panel = charts.curves(f"heldout-{name}{suffix}", title, order, look, x, of_curve)
            if inherits:
                panel.caption = f"{panel.caption} {note}".strip()
            yield panel
    if rows := charts.entries(scores(comparable, CONTINUATION), {}, lowest_first=True):
        title = "At the end, with 95% intervals"
        near = final if final and charts.reference_in_view(rows, final[1]) else None
        panel = charts.dots(f"heldout-final{suffix}", title, rows, look, "bits per byte", near)
        if any(look[row.label].hollow for row in rows):
            panel.caption = HOLLOW
        yield panel
    yield from by_length(comparable, look, suffix)
    if others := list(filter(has_curve, report_findings.apart(cells))):
        title = "Pseudo-likelihood, apart"
        panel = charts.curves(f"heldout-apart{suffix}", title, others, look, "flops", None)
        panel.caption = BOTH_SIDES
        yield panel


def by_length(cells: Sequence[MergedCell], look: Looks, suffix: str) -> Iterator[Panel]:
    """Bits per byte, and what the prefix gains, by the length of the continuation."""
    each = lengths([held for cell in cells for held in cell.heldout.each])
    if len(each) < 2:
        return
    for name, title, unit, yardstick in (
        ("length", "By length of the continuation", "bits per byte", of_length),
        ("gain", "What the right prefix saves", "bits per byte saved", gain_of_length),
    ):
        if series := by_number(cells, each, yardstick):
            yield charts.ranges(
                f"heldout-{name}{suffix}",
                title,
                series,
                look,
                "tokens of the continuation",
                unit,
                "{:.0f}".format,
                apart=1.03,
            )


def scores(cells: Sequence[MergedCell], yardstick: Yardstick) -> dict[str, Score]:
    return {cell.label: cell.heldout.score(yardstick) for cell in cells}


def by_number(
    cells: Sequence[MergedCell], numbers: Sequence[str], of: Callable[[str], Yardstick]
) -> dict[str, list[Point]]:
    """A point of each cell at each number at which it has a value of the number's yardstick."""
    series = {}
    for cell in cells:
        found = [(int(number), cell.heldout.score(of(number))) for number in numbers]
        points = [Point.of(x, s.value, s.interval) for x, s in found if s.value is not None]
        if points:
            series[cell.label] = points
    return series


def tasks(
    results: Results, cells: Sequence[MergedCell], look: Looks, suffix: str
) -> Iterator[Panel]:
    """Mean accuracy by the number of answered examples, and accuracy on each task, of every cell that was
    scored on it."""
    if numbers := shots([held for cell in cells for held in cell.heldout.each]):
        curves = by_number(cells, numbers, of_shots)
        title = "Mean of the tasks by examples"
        yield lines(
            f"shots{suffix}", title, curves, look, "answered examples before a question", "accuracy"
        )
    names = dict.fromkeys(name for cell in cells for name in cell.heldout.tasks)
    whole = unseen([held for cell in cells for held in cell.heldout.each])
    for name in names:
        rows = charts.entries(scores(cells, of_task(name)), pseudo(cells))
        chance = next((t.chance for c in cells if (t := c.heldout.tasks.get(name))), None)
        near = reference("chance", chance)
        title = f"{name} (held out whole)" if name in whole else name
        panel = charts.dots(f"task-{slug(name)}{suffix}", title, rows, look, "accuracy", near)
        panel.caption = note(rows)
        yield panel


def pseudo(cells: Sequence[MergedCell]) -> dict[str, str]:
    """The marks of cells whose value is a pseudo-likelihood."""
    return {cell.label: PSEUDO for cell in cells if not cell.heldout.comparable}


def loss(
    results: Results, cells: Sequence[MergedCell], look: Looks, suffix: str
) -> Iterator[Panel]:
    """One axis for each objective: losses of different objectives never share one."""
    by_objective: dict[str, list[MergedCell]] = {}
    for cell in cells:
        if any(point.loss is not None for point in cell.losses):
            by_objective.setdefault(cell.objective, []).append(cell)
    for objective, group in by_objective.items():
        alone = len(group) == 1 and group[0].label != objective
        title = f"{group[0].label}: {objective}" if alone else objective
        yield charts.losses(f"loss-{slug(objective)}{suffix}", title, group, look)


def mask_name(architecture: str) -> str:
    row = catalogue.ARCHITECTURES.get(architecture)
    return architecture if row is None else row.mask


def throughput(
    results: Results, cells: Sequence[MergedCell], look: Looks, suffix: str
) -> Iterator[Panel]:
    """Seen tokens and useful FLOPs per second, the fastest cell on top."""
    order = sorted(cells, key=lambda cell: -(cell.tokens_per_second or 0))
    kinds = [mask_name(cell.architecture) for cell in order]
    rates = [
        cell.flops / cell.train_seconds if cell.flops is not None and cell.train_seconds else None
        for cell in order
    ]
    divisor, prefix = notation.prefixed(rate for rate in rates if rate is not None)
    labels = [cell.label for cell in order]
    speeds = [cell.tokens_per_second for cell in order]
    useful = [None if rate is None else rate / divisor for rate in rates]
    for name, title, values, unit in (
        ("tokens", "Seen tokens per second", speeds, "seen tokens per second"),
        ("flops", f"Useful {prefix}FLOP/s", useful, f"{prefix}FLOP/s of useful work"),
    ):
        rows = list(zip(labels, kinds, values, strict=True))
        yield charts.bars(f"throughput-{name}{suffix}", title, rows, look, unit)


def choice(
    results: Results, cells: Sequence[MergedCell], look: Looks, suffix: str
) -> Iterator[Panel]:
    """Accuracy of the choice, among which pseudo-likelihoods are marked, and bits per byte of a middle. That is a
    likelihood for every cell that has one (the chain rule, from left to right); those that are told its length are
    marked."""
    text = [cell for cell in cells if not finetuned(cell)]
    if rows := charts.entries(scores(text, CHOICE), pseudo(text)):
        title, unit = "Choice of the true continuation", "accuracy (share of items)"
        chance = ("chance", results.chance)
        panel = charts.dots(f"choice{suffix}", title, rows, look, unit, chance)
        panel.caption = note(rows)
        yield panel
    marks = {cell.label: TOLD for cell in text if knows_length(cell.objective)}
    if rows := charts.entries(scores(text, MIDDLE), marks, lowest_first=True):
        title = "A middle given both sides"
        panel = charts.dots(f"middle{suffix}", title, rows, look, "bits per byte", None)
        others = " The others read one mark for the whole gap."
        told = [bool(row.mark) for row in rows]
        panel.caption = note(rows) + (others if any(told) and not all(told) else "")
        yield panel


def note(rows: Sequence[Entry]) -> str:
    """Says what the marks of these rows mean."""
    marks = dict.fromkeys(row.mark for row in rows if row.mark)
    return " ".join(f"{mark} {NOTES[mark]}" for mark in marks)


def scaling(cells: Sequence[MergedCell], look: Looks, number: int, each: str) -> list[Panel]:
    """The iso-budget curve of budget `number`: held-out bits per byte against parameters, where sizes
    are several."""
    return charts.quality(
        f"scaling-{number}",
        f"At {each}",
        report_findings.ranked(cells),
        look,
        lambda cell: cell.parameters,
        "parameters",
        notation.count,
        least=2,
    )


SECTIONS = {
    "heldout": heldout,
    "loss": loss,
    "throughput": throughput,
    "choice": choice,
    "tasks": tasks,
}
