"""The report page: one self-contained HTML file, no network, readable without scripts."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megaarch.config import catalogue
from megaarch.config.suggest import flatten
from megaarch.probes.catalogue import Probed
from megaarch.report import dialogue_costs, notation, scaling_laws
from megaarch.report import findings as report_findings
from megaarch.report.arguments.evidence import Argument, evidence
from megaarch.report.arguments.judged_cells import Compared
from megaarch.report.arguments.rules import FAILS, HOLDS, UNKNOWN
from megaarch.report.axes import SMALL_WIDTH, Looks
from megaarch.report.figures import sections
from megaarch.report.findings import Finding, Lead
from megaarch.report.headline import headline, unread
from megaarch.report.masks import kinds
from megaarch.report.merged_cells import (
    MergedCell,
    finetuned,
    interval_kinds,
    merged_cells,
    without_positions,
)
from megaarch.report.ranking_table import adaptation_table, columns_of, table
from megaarch.report.style import Look, Panel, looks, palette, svg
from megaarch.report.warnings import warnings_for, warnings_of
from megaarch.study.results import Results, Text
from megaarch.study.sweep_grid import label


def write_page(
    found: Results | dict, path: str | Path, probed: Mapping[str, Probed] | None = None
) -> Path:
    """Writes the report of `found` (what results.json holds) to `path`. Returns the path.

    probed: of the study's probes (probes.catalogue.read); with some, the page begins with the arguments.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(Results.of(found), probed), encoding="utf-8", errors="replace")
    return path


def page(results: Results, probed: Mapping[str, Probed] | None = None) -> str:
    """The whole page as HTML."""
    probed = probed or {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda panel: Markup(svg(panel, inline=True))
    environment.filters["grid_class"] = grid_class
    cells = merged_cells(results)
    look = looks(cells)
    findings = report_findings.findings(results)
    columns = columns_of(cells)
    arguments = evidence(results, probed)
    return environment.get_template("page.html.j2").render(
        study=results.study,
        created=day(results.created or ""),
        unread=unread(findings),
        arguments=arguments,
        models=models(cells, look),
        architectures=architectures(cells),
        scale=scale(arguments, cells, results) if arguments else "",
        headline=headline(results, leads=False, reading=not arguments),
        leads=leads(findings),
        tables=[table(f, columns, look) for f in findings if f.adaptation is None],
        adaptations=[
            adaptation_table(f, cells, look) for f in findings if f.adaptation is not None
        ],
        sections={  # by budget
            name: [(budget, list(group)) for budget, group in groupby(panels, attrgetter("group"))]
            for name, panels in sections(results, probed).items()
        },
        inference=dialogue_costs.table(probed, cells, look),
        laws=scaling_laws.table(results, look, cells),
        kinds=kinds(cells),
        chance=notation.percent(results.chance),
        warnings=warnings_for(results),
        differing=differing_settings(cells),
        cells=[details(cell, look[cell.label]) for cell in cells],
        tuning=list(tuning(results)),
        facts=list(facts(results, cells)),
        palette=palette(),
    )


def grid_class(panels: Sequence[Panel]) -> str:
    """Returns the class of page.css with columns as wide as these panels are drawn, so that their text can be read."""
    points = max(round(panel.figure.get_figwidth() * 72) for panel in panels)
    return "small" if points <= SMALL_WIDTH else "pair"


def tuning(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yields what each trial tried and found, under its cell's name; with size and budget where a sweep had several."""
    several = len({t.rate_key for t in results.tuning}) > len({t.cell for t in results.tuning})
    for t in results.tuning:
        name = t.rate_key if several and t.rate_key else t.cell
        yield name, label(t.choice), notation.fixed(t.heldout), notation.power(t.flops)


def leads(findings: Sequence[Finding]) -> list[tuple[str, list[Lead]]]:
    """Who is best by which yardstick: (which cells, rows), where there are rows."""
    found = []
    for finding in findings:
        each = [f"at {finding.amount} each"] if len(findings) > 1 else []
        for rankings, whom in (
            (finding.rankings, each),
            (finding.of_finetuned, [*each, "finetuned cells"]),
        ):
            words = ", ".join(whom)
            if rows := report_findings.leads(rankings):
                found.append((words[:1].upper() + words[1:], rows))
    return found


def models(cells: Sequence[MergedCell], look: Looks) -> list[list[tuple[str, str, str]]]:
    """Says of each cell what it is, in words that ask for no knowledge of objectives' names: of those that most
    arguments are about, and of those that are finetuned or have no positions."""
    groups: list[list[tuple[str, str, str]]] = [[], []]
    for cell in cells:
        row = catalogue.OBJECTIVES.get(cell.objective)
        learns = row.learns if row and row.learns else f"trained on {cell.objective}"
        words, blind = [notation.spelled(cell.architecture), learns], without_positions(cell)
        says = ", ".join([*words, "has no positions"] if blind else words)
        groups[blind or finetuned(cell)].append((cell.label, look[cell.label].variable, says))
    return groups


def architectures(cells: Sequence[MergedCell]) -> list[tuple[str, str]]:
    """The architectures of these cells, each with what its tokens see."""
    rows = map(catalogue.ARCHITECTURES.get, dict.fromkeys(cell.architecture for cell in cells))
    return [(notation.spelled(row.name), row.summary) for row in rows if row]


def scale(arguments: Sequence[Argument], cells: Sequence[MergedCell], results: Results) -> str:
    """How many arguments hold, and of what models that is said."""
    answers = [argument.verdict.answer for argument in arguments if argument.verdict]
    hold, fail, unknown = (answers.count(answer) for answer in (HOLDS, FAILS, UNKNOWN))
    missing = len(arguments) - len(answers)
    unmeasured = f" ({missing} {'was' if missing == 1 else 'were'} not measured)" if missing else ""
    text = [cell for cell in cells if cell.start is None] or cells
    sizes = sorted(cell.parameters for cell in text if cell.parameters)
    budgets = notation.listed(
        [
            notation.budget(results.budget.match, amount)
            for amount in dict.fromkeys(cell.budget for cell in text)
        ]
    )
    ends = " to ".join(dict.fromkeys(map(notation.count, (*sizes[:1], *sizes[-1:]))))
    of_sizes = f" of {ends} parameters" if ends else ""
    seeds = min(cell.seeds for cell in text)
    judged = Compared.of(results)
    decoder = f"; the causal decoder of the rules is {judged.decoder.label}" if judged else ""
    return (
        f"Of seven arguments {hold} hold here, {fail} do not, and of {unknown} it cannot be told{unmeasured}, each by the "
        "rule that stands below it and was set before. "
        f"Models{of_sizes} trained for {budgets}, {seeds} {'seed' if seeds == 1 else 'seeds'} each{decoder}. Bars and "
        "bands are 95% intervals. Models are not distinguishable where a test in pairs of items does not tell them apart "
        "at 5%, corrected for the number of comparisons."
    )


def day(created: str) -> str:
    """An ISO time as people write it; anything else as it is."""
    try:
        return datetime.fromisoformat(created).strftime("%d %B %Y, %H:%M %Z").strip().lstrip("0")
    except ValueError:
        return created


def shown_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Settings by their dotted names; what is None is left at its default, and said so."""
    named = flatten(settings).items()
    return {name: "default" if value is None else str(value) for name, value in named}


def differing_settings(cells: Sequence[MergedCell]) -> dict[str, Any]:
    """Settings that are not the same in every cell, as a table with a row for each setting or, where cells
    are more, for each cell."""
    settings = [shown_settings(cell.settings) for cell in cells]
    # Where a cell writes its files is its own and changes nothing.
    names = dict.fromkeys(n for each in settings for n in each if not n.startswith("logging."))
    rows = [(name, [each.get(name, notation.MISSING) for each in settings]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    labels, names = [cell.label for cell in cells], [name for name, _ in rows]
    if len(labels) <= len(names):
        return {"number": len(names), "corner": "Setting", "columns": labels, "rows": rows}
    by_cell = zip(labels, zip(*(values for _, values in rows), strict=True), strict=bool(rows))
    return {"number": len(names), "corner": "Cell", "columns": names, "rows": list(by_cell)}


def details(cell: MergedCell, look: Look) -> dict[str, Any]:
    heldout = cell.heldout
    raw = notation.fixed(heldout.continuation_bits_per_byte_raw)
    counts = ", ".join(f"{kind} {number}" for kind, number in heldout.items.items() if number)
    measured = [
        ("bits per byte over the whole vocabulary (raw)", raw),
        ("held-out items", counts),
        ("intervals", heldout.interval_kind or notation.MISSING),
        ("final training loss, nats per target", notation.fixed(cell.final_loss)),
        ("FLOPs of its own run", notation.power(cell.flops)),
        ("FLOPs by the PaLM convention", notation.power(cell.palm_flops)),
        ("parameters without embeddings", notation.count(cell.non_embedding_parameters)),
        ("padding", notation.percent(cell.padding_share)),
        ("epochs", notation.fixed(cell.epochs, 2)),
        ("precision", cell.precision or notation.MISSING),
    ]
    return {
        "label": cell.label,
        "colour": look.variable,
        "measured": measured,
        "settings": shown_settings(cell.settings),
        "warnings": warnings_of(cell),
    }


def facts(results: Results, cells: Sequence[MergedCell]) -> Iterator[tuple[str, str]]:
    """How it was measured, as (term, words)."""
    hardware, text, match = results.hardware, results.data, results.budget.match
    if hardware and hardware.cpu:
        memory = hardware.memory_gib
        parts = [f"{hardware.cpu}, {hardware.cores} cores", hardware.gpu]
        parts.append(None if memory is None else f"{memory:.0f} GiB of memory")
        yield "Hardware", "; ".join(part for part in parts if part)
    if results.versions:
        yield "Versions", ", ".join(f"{name} {number}" for name, number in results.versions.items())
    yield "Commit", results.commit or "not in a repository"
    if results.command:
        yield "Command", results.command
    amounts = [notation.budget(match, amount) for amount in results.budget.amounts]
    yield "Budget", f"{notation.listed(amounts)} for each cell"
    if text and text.source:
        yield "Text", text_facts(text)
        yield (
            "Tokenizer",
            f"{text.tokenizer}, {notation.fixed(text.bytes_per_token, 2)} bytes a token",
        )
        yield "Fingerprint", str(text.fingerprint)
    intervals = interval_kinds(cells)
    if intervals:
        yield "Intervals", f"95%, {notation.listed(intervals)}"
    if results.tuning:
        flops = notation.power(sum(trial.flops for trial in results.tuning))
        yield "Tuning", f"{len(results.tuning)} trials, {flops} FLOPs, counted apart"


def text_facts(text: Text) -> str:
    words = (
        f"{text.source}: {notation.count(text.train_tokens)} training tokens in "
        f"{notation.whole(text.train_documents)} documents; "
        f"{notation.whole(text.heldout_documents)} held-out documents of "
        f"{notation.count(text.heldout_bytes)} bytes"
    )
    dropped = text.dropped_paragraphs
    if dropped is not None:
        words += f"; {dropped:,.0f} held-out paragraphs that also stand in training text dropped"
    return words
