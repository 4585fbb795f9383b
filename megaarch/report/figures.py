"""The figures of a study, each a panel of its own: PDF and SVG files, or drawings in the page."""

from pathlib import Path

import matplotlib

from megaarch.config import catalogue
from megaarch.report import cells as report_cells
from megaarch.report import notation, plots
from megaarch.report.cells import bits, comparable, interval_of, told_length
from megaarch.report.masks import mask_panel
from megaarch.report.notation import finite
from megaarch.report.plots import Entry
from megaarch.report.style import RC, Panel, looks, slug, write

BOTH_SIDES = "Each token given both of its sides: not comparable with the rest."
PSEUDO, TOLD = "*", "\u2020"  # marks of a row
NOTES = {
    PSEUDO: BOTH_SIDES,
    TOLD: "Told the gap's length: one mask or position for each of its tokens.",
}


def write_figures(results: dict, directory: str | Path) -> list[Path]:
    """Every figure as PDF and SVG in `directory`, made where it is missing. Returns the paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    panels = [panel for section in sections(results).values() for panel in section]
    return [path for panel in panels for path in write(panel, directory)]


def sections(results: dict) -> dict[str, list[Panel]]:
    """Section -> its panels: masks, heldout, loss, throughput, choice, scaling."""
    cells = report_cells.merged_cells(results)
    look = looks(cells)
    budgets = sorted({cell["budget"] for cell in cells})
    found: dict[str, list[Panel]] = {"masks": masks(cells)}
    with matplotlib.rc_context(RC):
        for number, amount in enumerate(budgets, 1):
            group = [cell for cell in cells if cell["budget"] == amount]
            suffix = f"-budget-{number}" if len(budgets) > 1 else ""
            for section, make in SECTIONS.items():
                for panel in make(results, group, look, suffix):
                    if suffix:
                        panel.group = f"{notation.budget(results['budget']['match'], amount)} each"
                    found.setdefault(section, []).append(panel)
        found["scaling"] = scaling(cells, look, budgets, results["budget"]["match"])
    return found


def masks(cells: list[dict]) -> list[Panel]:
    """One drawing for each cell name; sizes, budgets and seeds share their mask."""
    first: dict[str, dict] = {}
    for cell in cells:
        if cell.get("masks"):
            first.setdefault(cell["name"], cell | {"label": cell["name"]})
    labelled = any(mask.get("tokens") for cell in first.values() for mask in cell["masks"])
    panels = []
    for name, cell in first.items():
        panels.append(mask_panel(cell, f"mask-{slug(name)}", labelled))
        if is_mixture(cell["objective"]):
            panels[-1].caption = "One row of a mixture, whose other parts may be masked otherwise."
    return panels


def is_mixture(objective: str) -> bool:
    row = catalogue.OBJECTIVES.get(objective)
    return row is not None and row.mixture is not None and len(row.components()) > 1


def has_points(cell: dict, curve: str, value: str) -> bool:
    return any(finite(point.get(value)) is not None for point in cell.get(curve) or [])


def heldout(results: dict, cells: list[dict], look: dict, suffix: str) -> list[Panel]:
    order = [c for c in report_cells.ranked(cells) if has_points(c, "curve", "heldout")]
    reference, of_curve = (
        None if value is None else ("unigram", value)
        for value in (
            finite(results.get("unigram_bits_per_byte")),
            finite(results.get("curve_unigram_bits_per_byte")),  # the curve's own documents
        )
    )
    panels = []
    if order:
        panels += [
            plots.curves(
                f"heldout-flops{suffix}", "Against compute", order, look, "flops", of_curve
            ),
            plots.curves(f"heldout-time{suffix}", "Against time", order, look, "seconds", of_curve),
        ]
        if any(map(report_cells.inherited, order)):
            starts = "A cell that starts from another begins at what that one spent."
            panels[0].caption = f"{panels[0].caption} {starts}".strip()
            own = "Each cell's own time, without that of the one it starts from."
            panels[1].caption = f"{panels[1].caption} {own}".strip()
    final = entries(cells, "continuation_bits_per_byte")
    if final:
        panels.append(
            plots.dots(
                f"heldout-final{suffix}",
                "At the end, with 95% intervals",
                final,
                look,
                "bits per byte",
                reference,
            )
        )
    others = [c for c in report_cells.apart(cells) if has_points(c, "curve", "heldout")]
    if others:
        panel = plots.curves(
            f"heldout-apart{suffix}", "Pseudo-likelihood, apart", others, look, "flops", None
        )
        panel.caption = BOTH_SIDES
        panels.append(panel)
    return panels


def entries(cells: list[dict], measure: str) -> list[Entry]:
    """Of the cells that have the value, lowest first. Bits per byte of a continuation: comparable
    cells alone; of the choice a pseudo-likelihood stands among the rest, and is marked. A middle is
    a likelihood for every cell that has one (the chain rule, from left to right), and marked are
    those that were told its length."""
    chosen = [c for c in cells if comparable(c) or measure != "continuation_bits_per_byte"]

    def mark(cell: dict) -> str:
        if measure == "middle_bits_per_byte":
            return TOLD if told_length(cell) else ""
        return "" if comparable(cell) else PSEUDO

    found = [
        (c["label"], finite(c["heldout"].get(measure)), interval_of(c, measure), mark(c))
        for c in chosen
    ]
    return sorted((entry for entry in found if entry[1] is not None), key=lambda entry: entry[1])


def loss(results: dict, cells: list[dict], look: dict, suffix: str) -> list[Panel]:
    """One axis for each objective: losses of different objectives never share one."""
    by_objective: dict[str, list[dict]] = {}
    for cell in cells:
        if has_points(cell, "losses", "loss"):
            by_objective.setdefault(cell["objective"], []).append(cell)
    return [
        plots.losses(f"loss-{slug(objective)}{suffix}", loss_title(objective, group), group, look)
        for objective, group in by_objective.items()
    ]


def loss_title(objective: str, cells: list[dict]) -> str:
    """The objective, and whose it is where that is one cell of another name."""
    alone = len(cells) == 1 and cells[0]["label"] != objective
    return f"{cells[0]['label']}: {objective}" if alone else objective


def throughput(results: dict, cells: list[dict], look: dict, suffix: str) -> list[Panel]:
    entries = []
    for cell in sorted(cells, key=lambda cell: -(finite(cell.get("tokens_per_second")) or 0)):
        seconds, flops = finite(cell.get("train_seconds")), finite(cell.get("flops"))
        rate = flops / seconds if flops is not None and seconds else None
        architecture = catalogue.ARCHITECTURES.get(cell["architecture"])
        kind = architecture.mask if architecture else cell["architecture"]
        entries.append((cell["label"], kind, finite(cell.get("tokens_per_second")), rate))
    divisor, prefix = notation.prefixed([e[3] for e in entries if e[3] is not None])
    tokens = [(name, kind, value) for name, kind, value, _ in entries]
    rates = [(name, kind, None if r is None else r / divisor) for name, kind, _, r in entries]
    return [
        plots.bars(
            f"throughput-tokens{suffix}",
            "Seen tokens per second",
            tokens,
            look,
            "seen tokens per second",
        ),
        plots.bars(
            f"throughput-flops{suffix}",
            f"Useful {prefix}FLOP/s",
            rates,
            look,
            f"{prefix}FLOP/s of useful work",
        ),
    ]


def choice(results: dict, cells: list[dict], look: dict, suffix: str) -> list[Panel]:
    chance = ("chance", finite(results.get("chance")) or 0.25)
    accuracy = entries(cells, "choice_accuracy")[::-1]
    middles = entries(cells, "middle_bits_per_byte")
    panels = []
    if accuracy:
        panels.append(
            plots.dots(
                f"choice{suffix}",
                "Choice of the true continuation",
                accuracy,
                look,
                "accuracy (share of items)",
                chance,
                always=True,
            )
        )
        panels[-1].caption = note(accuracy)
    if middles:
        title = "A middle given both sides"
        panels.append(plots.dots(f"middle{suffix}", title, middles, look, "bits per byte", None))
        others = " The others read one mark for the whole gap."
        told = [bool(mark) for *_, mark in middles]
        panels[-1].caption = note(middles) + (others if any(told) and not all(told) else "")
    return panels


def note(rows: list[Entry]) -> str:
    """What the marks of these rows mean."""
    marks = dict.fromkeys(mark for *_, mark in rows if mark)
    return " ".join(f"{mark} {NOTES[mark]}" for mark in marks)


def scaling(cells: list[dict], look: dict, budgets: list[float], match: str) -> list[Panel]:
    """Iso-budget curves: held-out bits per byte against parameters, where sizes are several."""
    panels = []
    for number, amount in enumerate(budgets, 1):
        series: dict[str, list[dict]] = {}
        for cell in cells:
            if cell["budget"] == amount and comparable(cell) and bits(cell) is not None:
                series.setdefault(cell["name"], []).append(cell)
        series = {name: group for name, group in series.items() if len(group) > 1}
        if series:
            title = f"At {notation.budget(match, amount)} each"
            panels.append(plots.sizes(f"scaling-{number}", title, series, look))
    return panels


SECTIONS = {"heldout": heldout, "loss": loss, "throughput": throughput, "choice": choice}
