"""The report page: one self-contained HTML file, no network, readable without scripts."""

from collections.abc import Iterable
from datetime import datetime
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megaarch.report import cells as report_cells
from megaarch.report import notation
from megaarch.report.cells import Finding, bits, interval_of, spent
from megaarch.report.figures import sections
from megaarch.report.masks import kinds
from megaarch.report.notation import finite
from megaarch.report.style import Look, Panel, looks, palette, svg
from megaarch.report.warnings import warnings_for, warnings_of

COLUMNS = (  # title, what the pointer says
    ("Bits per byte", "held-out continuation given its prefix; lower is better"),
    ("95% interval", "over documents, and over seeds where there are several"),
    ("Choice", "accuracy of the four-way choice of the true continuation"),
    ("Middle", "bits per byte of a middle given both its sides, whose length some are told"),
    ("Parameters", "all, with embeddings"),
    ("FLOPs", "useful training FLOPs, with those spent on the weights it starts from"),
    ("Seen", "tokens that passed through the model"),
    ("Targets", "tokens that carried loss"),
    ("Steps", "optimizer steps"),
    ("Tokens/s", "seen tokens per second of training"),
    ("Time", "training time"),
)


def write_page(results: dict, path: str | Path) -> Path:
    """Writes the report of `results` (the dict of `results.json`) to `path`. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results), encoding="utf-8")
    return path


def page(results: dict) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cells = report_cells.merged_cells(results)
    look = looks(cells)
    findings = report_cells.findings(results)
    return environment.get_template("page.html.j2").render(
        study=results["study"],
        created=day(results.get("created") or ""),
        headline=report_cells.headline(results),
        columns=COLUMNS,
        tables=[table(results, finding, look) for finding in findings],
        sections={name: grouped(panels) for name, panels in sections(results).items()},
        kinds=kinds(cells),
        chance=notation.percent(results.get("chance", 0.25)),
        warnings=warnings_for(results),
        differing=differing_settings(cells),
        cells=[details(cell, look[cell["label"]]) for cell in cells],
        tuning=[trial(entry) for entry in results.get("tuning") or []],
        facts=list(facts(results, cells)),
        palette=palette(),
    )


def day(created: str) -> str:
    """An ISO time as people write it; anything else as it is."""
    try:
        return datetime.fromisoformat(created).strftime("%d %B %Y, %H:%M %Z").strip().lstrip("0")
    except ValueError:
        return created


def grouped(panels: list[Panel]) -> list[tuple[str, list[dict]]]:
    """(budget, drawings) in the order of the panels; one group where there is one budget."""
    return [(name, list(map(drawn, run))) for name, run in groupby(panels, lambda p: p.group)]


def drawn(panel: Panel) -> dict:
    return {
        "name": panel.name,
        "title": panel.title,
        "caption": panel.caption,
        "svg": Markup(svg(panel, inline=True)),
    }


def table(results: dict, finding: Finding, look: dict[str, Look]) -> dict:
    ranked = report_cells.ranked(finding.cells)
    span = interval_span(ranked)
    tied = [cell["label"] for cell in finding.tied]
    return {
        "title": f"{notation.budget(results['budget']['match'], finding.budget)} each",
        "ranked": [row(cell, look, span, cell["label"] in tied) for cell in ranked],
        "apart": [row(cell, look, None, False) for cell in report_cells.apart(finding.cells)],
    }


def interval_span(cells: list[dict]) -> tuple[float, float] | None:
    ends = [end for cell in cells for end in (interval_of(cell) or []) + [bits(cell)]]
    ends = [end for end in ends if end is not None]
    return (min(ends), max(ends)) if ends and max(ends) > min(ends) else None


def row(cell: dict, look: dict[str, Look], span: tuple | None, tied: bool) -> dict:
    """A table row: columns as (text, value to sort by)."""
    heldout, interval = cell["heldout"], interval_of(cell)
    accuracy = heldout.get("choice_accuracy")
    words = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else notation.MISSING
    numbers = (
        (notation.fixed(bits(cell)), bits(cell)),
        (words, interval[0] if interval else None),
        (notation.percent(accuracy), accuracy),
        (notation.fixed(heldout.get("middle_bits_per_byte")), heldout.get("middle_bits_per_byte")),
        (notation.count(cell.get("parameters")), cell.get("parameters")),
        (notation.power(spent(cell)), spent(cell)),
        (notation.count(cell.get("seen_tokens")), cell.get("seen_tokens")),
        (notation.count(cell.get("target_tokens")), cell.get("target_tokens")),
        (notation.fixed(cell.get("steps"), 0), cell.get("steps")),
        (whole(cell.get("tokens_per_second")), cell.get("tokens_per_second")),
        (notation.duration(cell.get("train_seconds")), cell.get("train_seconds")),
    )
    return {
        "label": cell["label"],
        "kind": f"{cell['architecture']}, {cell['objective']}".replace("_", " "),
        "seeds": cell["seeds"],
        "parent": cell.get("parent"),
        "tied": tied,
        "colour": look[cell["label"]].variable,
        "numbers": [(text, "" if finite(value) is None else value) for text, value in numbers],
        "strip": strip(cell, span),
    }


def whole(value: object) -> str:
    number = finite(value)
    return notation.MISSING if number is None else f"{number:,.0f}"


def strip(cell: dict, span: tuple[float, float] | None) -> dict | None:
    """Where the interval stands in the column's span, in percent."""
    if span is None or bits(cell) is None:
        return None
    low, high = interval_of(cell) or (bits(cell), bits(cell))
    places = [4 + 92 * (x - span[0]) / (span[1] - span[0]) for x in (low, bits(cell), high)]
    return dict(zip(("low", "middle", "high"), (round(x, 2) for x in places), strict=True))


def flat(settings: dict, path: str = "") -> dict[str, str]:
    """Nested settings as dotted names; what is None is left at its default, and said so."""
    found = {}
    for key, value in settings.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            found |= flat(value, name)
        else:
            found[name] = "default" if value is None else str(value)
    return found


def differing_settings(cells: list[dict]) -> dict:
    """Settings that are not the same in every cell: names, labels, and a value for each."""
    settings = [flat(cell.get("settings") or {}) for cell in cells]
    # Where a cell writes its files is its own and changes nothing.
    names = dict.fromkeys(n for each in settings for n in each if not n.startswith("logging."))
    rows = [(name, [each.get(name, notation.MISSING) for each in settings]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    return {"labels": [cell["label"] for cell in cells], "rows": rows}


def details(cell: dict, look: Look) -> dict:
    heldout = cell["heldout"]
    raw = notation.fixed(heldout.get("continuation_bits_per_byte_raw"))
    items = heldout.get("items") or {}
    measured = [
        ("bits per byte over the whole vocabulary (raw)", raw),
        ("held-out items", ", ".join(f"{kind} {n}" for kind, n in items.items() if n)),
        ("intervals", heldout.get("interval_kind") or notation.MISSING),
        ("final training loss, nats per target", notation.fixed(cell.get("final_loss"))),
        ("FLOPs of its own run", notation.power(cell.get("flops"))),
        ("FLOPs by the PaLM convention", notation.power(cell.get("palm_flops"))),
        ("parameters without embeddings", notation.count(cell.get("non_embedding_parameters"))),
        ("padding", notation.percent(cell.get("padding_share"))),
        ("epochs", notation.fixed(cell.get("epochs"), 2)),
        ("precision", cell.get("precision") or notation.MISSING),
    ]
    return {
        "label": cell["label"],
        "budget": cell["budget"],
        "colour": look.variable,
        "measured": measured,
        "settings": flat(cell.get("settings") or {}),
        "warnings": warnings_of(cell),
    }


def trial(entry: dict) -> tuple[str, str, str, str]:
    rate = finite(entry.get("learning_rate"))
    return (
        str(entry.get("cell")),
        notation.MISSING if rate is None else f"{rate:g}",
        notation.fixed(entry.get("heldout")),
        notation.power(entry.get("flops")),
    )


def facts(results: dict, cells: list[dict]) -> Iterable[tuple[str, str]]:
    """How it was measured, as (term, words)."""
    hardware, versions = results.get("hardware") or {}, results.get("versions") or {}
    data, match = results.get("data") or {}, results["budget"]["match"]
    if hardware:
        processor = f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
        memory = finite(hardware.get("memory_gib"))
        parts = [processor, hardware.get("gpu"), memory and f"{memory:.0f} GiB of memory"]
        yield "Hardware", "; ".join(part for part in parts if part)
    if versions:
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Commit", results.get("commit") or "not in a repository"
    if results.get("command"):
        yield "Command", results["command"]
    amounts = [notation.budget(match, amount) for amount in results["budget"]["amounts"]]
    yield "Budget", f"{notation.listed(amounts)} for each cell"
    if data:
        yield "Text", text_facts(data)
        per_token = notation.fixed(data.get("bytes_per_token"), 2)
        yield "Tokenizer", f"{data.get('tokenizer')}, {per_token} bytes a token"
        yield "Fingerprint", str(data.get("fingerprint"))
    kinds = {cell["heldout"].get("interval_kind") for cell in cells} - {None}
    if kinds:
        yield "Intervals", f"95%, {notation.listed(sorted(kinds))}"
    spent = [finite(entry.get("flops")) or 0 for entry in results.get("tuning") or []]
    if spent:
        yield "Tuning", f"{len(spent)} trials, {notation.power(sum(spent))} FLOPs, counted apart"


def text_facts(data: dict) -> str:
    words = (
        f"{data.get('source')}: {notation.count(data.get('train_tokens'))} training tokens in "
        f"{whole(data.get('train_documents'))} documents; {whole(data.get('heldout_documents'))} "
        f"held-out documents of {notation.count(data.get('heldout_bytes'))} bytes"
    )
    dropped = finite(data.get("dropped_paragraphs"))
    if dropped is not None:
        words += f"; {dropped:,.0f} held-out paragraphs that also stand in training text dropped"
    return words
