"""The studies whose records are committed: docs/findings.md and docs/wang2022.md say what they say."""

import json
import re
from pathlib import Path

import pytest

from megaarch.files import fit
from megaarch.probes import catalogue
from megaarch.report.arguments.evidence import evidence
from megaarch.report.findings import findings
from megaarch.report.merged_cells import merged_cells
from megaarch.report.yardsticks import TASKS
from megaarch.study.results import Results

RECORD = Path("benchmarks/2026-11-29-why-decoder-only")
WANG = Path("benchmarks/2026-11-29-wang2022-small/results.json")
WANG_CELLS = (
    "causal-full_lm",
    "prefix-prefix_lm",
    "encdec-prefix_lm",
    "causal-span",
    "encdec-span",
    "prefix-span",
)


@pytest.fixture(scope="module")
def arguments():
    return evidence(Results.read(RECORD / "results.json"), catalogue.read(RECORD))


def test_every_answer_of_the_findings_is_the_record_s(arguments):
    rows = re.findall(r"^\| (\d) \|[^|]*\| ([^|]*) \|", Path("docs/findings.md").read_text(), re.M)
    assert rows == [(str(i), a.verdict.answer) for i, a in enumerate(arguments, 1)]


def test_the_committed_page_says_the_same(arguments):
    page = (RECORD / "report.html").read_text()
    for argument in arguments:
        assert argument.verdict.found.replace("'", "&#39;") in page


@pytest.fixture(scope="module")
def wang():
    return Results.read(WANG)


def test_the_table_of_the_small_grid_is_its_record_s(wang):
    cells = {cell.label: cell for cell in merged_cells(wang)}
    wanted = []
    for name in WANG_CELLS:
        held, tuned, adapted = (cells[n].heldout for n in (name, f"{name}-mtf", f"{name}-adapted"))
        shares = (held.choice_accuracy, held.score(TASKS).value, tuned.score(TASKS).value)
        values = (f"{held.continuation_bits_per_byte:.3f}", f"{held.prefix_gain:.3f}")
        wanted.append((*values, *(f"{share:.0%}" for share in shares)))
        wanted[-1] += (f"{adapted.continuation_bits_per_byte:.3f}",)
    page = Path("docs/wang2022.md").read_text().partition("## What the small grid gave")[2]
    rows = [line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line[:2] == "| "]
    assert [tuple(row) for row in rows[1:]] == wanted


def test_what_the_small_grid_is_said_to_have_told_apart(wang):
    raw, adapted = findings(wang)
    assert raw.main is not None and adapted.main is not None
    assert [cell.label for cell in raw.main.top] == list(WANG_CELLS[:3])
    assert all(cell.heldout.reads_prefix for cell in merged_cells(wang))
    assert [c.label for c in adapted.main.top] == [
        f"{name}-adapted" for name in ("causal-span", "causal-full_lm", "prefix-prefix_lm")
    ]
    tasks = {v.yardstick.key: v for v in (*raw.rankings, *raw.of_finetuned)}
    assert len(raw.of_finetuned) > 10 and all(len(v.top) == 6 for v in raw.of_finetuned)
    assert tasks["tasks"].order[0].label == "encdec-span-mtf"
    tops = {v.yardstick.key: [c.label for c in v.top] for v in adapted.rankings}
    assert tops["tasks"][0] == "encdec-span-adapted"
    assert {f"{name}-adapted" for name in WANG_CELLS} - {*tops["tasks"]} == {"causal-span-adapted"}
    missing = {v.yardstick.key: v for v in raw.rankings}["task missing_word"]
    assert missing.order[0].label == "encdec-prefix_lm"
    assert "causal-full_lm" not in [cell.label for cell in missing.top]
    assert len(tasks["tasks"].top) == 6


def test_what_the_small_grid_s_adaptation_is_said_to_give(wang):
    """By validation documents, along each seed's run."""
    runs = {(c.name, c.seed): [p for p in c.curve if p.heldout] for c in wang.cells}
    for seed in range(3):
        child = runs["prefix-span-to-causal-full_lm", seed]
        scratch = [p.heldout for p in runs["causal-full_lm", seed]]
        for wanted, reach in ((scratch[-1], (125, 250)), (min(scratch), (374, 499))):
            first = next(i for i, p in enumerate(child) if p.heldout <= wanted)
            assert child[first - 1].step >= reach[0] and child[first].step == reach[1]
    other = [runs["causal-full_lm-to-prefix-span", seed][0].heldout for seed in range(3)]
    assert round(sum(other) / 3, 2) == 2.15
    ends = [runs["prefix-span", seed][-1].heldout for seed in range(3)]
    assert round(sum(ends) / 3, 2) == 2.32
    assert all(a < min(p.heldout for p in runs["prefix-span", s]) for s, a in enumerate(other))


def test_the_position_probe_reads_places_off_a_causal_model_alone():
    record = json.loads(Path("benchmarks/2026-11-29-position-probe.json").read_text())
    found = fit(record["found"], catalogue.Probed, "the record")
    chance = {
        cell.partition("/")[0]: [layer["of_chance"] for layer in stream["layers"][1:]]
        for cell, probed in found.cells.items()
        for stream in probed["streams"].values()
    }
    assert all(len(of["seeds"]) == 3 for layers in chance.values() for of in layers)
    causal = [of["interval"] for of in chance["causal-none"]]
    assert all(high < 0.4 for _, high in causal[1:])
    assert all(
        low < 1 < high for low, high in (of["interval"] for of in chance["bidirectional-none"])
    )
    said = Path("docs/why.md").read_text()
    for low, high in causal:
        assert f"({low:.2f} to {high:.2f})" in said
