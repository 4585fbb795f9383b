"""The report: what it says must follow from the numbers, and only from them."""

import copy
import math
import re
from csv import DictReader
from io import StringIO
from itertools import pairwise

import pytest

from megaarch.attention.parts import area
from megaarch.study import report
from megaarch.study.report import figures, masks, plots
from megaarch.study.report.cells import headline, merged_cells, t_interval
from megaarch.study.report.page import page
from megaarch.study.report.style import write
from tests.study.example_results import (
    CELLS,
    example_cell,
    example_results,
    scaling_results,
)


def cell_at(name: str, value: float, low: float, high: float, **more) -> dict:
    cell = example_cell("gpt") | {"name": name} | more
    cell["heldout"] |= {
        "continuation_bits_per_byte": value,
        "continuation_interval": [low, high],
    }
    return cell


@pytest.fixture(scope="module")
def demo_page() -> str:
    return page(example_results())


def clean_results() -> dict:
    """A study that gives no cause for a warning: three seeds, tuned, many items."""
    cells = [example_cell(preset, seed=seed) for preset in ("gpt", "unilm") for seed in (0, 1, 2)]
    return example_results(copy.deepcopy(cells))


# ---------------------------------------------------------------- telling cells apart


@pytest.mark.parametrize(
    "interval, expected",
    [((2.2, 2.4), True), ((2.0, 2.4), False), ((2.1, 2.4), False), ((1.2, 1.8), True)],
)
def test_cells_are_distinguishable_iff_their_intervals_leave_a_gap(interval, expected):
    a = cell_at("a", 2.0, 1.9, 2.1)
    b = cell_at("b", sum(interval) / 2, *interval)
    assert report.distinguishable(a, b) is expected
    assert report.distinguishable(b, a) is expected


def test_no_interval_and_pseudo_likelihood_are_never_distinguishable():
    a, b = cell_at("a", 2.0, 1.9, 2.1), cell_at("b", 9.0, 8.9, 9.1)
    b["heldout"]["continuation_interval"] = None
    assert not report.distinguishable(a, b)
    b["heldout"] |= {"continuation_interval": [8.9, 9.1], "comparable": False}
    assert not report.distinguishable(a, b)


def test_headline_names_the_best_and_says_not_distinguishable_iff_it_overlaps():
    apart = example_results([cell_at("b", 2.5, 2.4, 2.6), cell_at("a", 2.0, 1.9, 2.1)])
    expected = "a predicts held-out text best, with 2.000 bits per byte, 0.500 (20.0%) below b"
    assert expected in headline(apart)[0]
    assert "not distinguishable" not in report.text(apart)
    tied = example_results([cell_at("b", 2.05, 1.95, 2.15), cell_at("a", 2.0, 1.9, 2.1)])
    assert "not distinguishable" in headline(tied)[0]
    assert "2.050~" in report.text(tied)


def test_headline_claims_equal_compute_only_where_it_was_spent():
    cells = [cell_at("b", 2.5, 2.4, 2.6, flops=3e13), cell_at("a", 2.0, 1.9, 2.1, flops=3e13)]
    assert headline(example_results(cells))[0].startswith("At equal compute")
    cells[0]["flops"] = 3.1e13
    assert "equal compute" not in headline(example_results(cells))[0]
    assert "equal compute" not in headline(example_results(cells, "seen_tokens"))[0]


def test_a_pseudo_likelihood_never_wins():
    results = example_results()  # bert's figure is the lowest of all
    assert "gpt predicts held-out text best" in headline(results)[0]
    lines = report.text(results).splitlines()
    apart = lines.index("not comparable: pseudo-likelihood")
    assert [line.split()[0] for line in lines[apart + 1 : apart + 2]] == ["bert"]


def test_headline_counts_who_misses_the_unigram_model():
    results = example_results()
    assert "every comparable cell beats it" in " ".join(headline(results))
    results["unigram_bits_per_byte"] = 2.23
    assert "bart did not beat it" in " ".join(headline(results))


# ---------------------------------------------------------------- seeds


def test_t_interval_against_the_textbook():
    low, high = t_interval([1.0, 2.0, 3.0])  # mean 2, deviation 1, t(2) = 4.303
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    values = [float(i % 3) for i in range(21)]  # mean 1, variance 14/20, t(20) = 2.086
    low, high = t_interval(values)
    assert (high - low) / 2 == pytest.approx(2.08596 * math.sqrt(0.7 / 21), rel=1e-4)


def test_seeds_merge_into_one_row_with_mean_and_interval_over_seeds():
    cells = [cell_at("a", value, 0, 9, seed=seed) for seed, value in enumerate((1.9, 2.0, 2.1))]
    cells[1]["curve"] = copy.deepcopy(cells[0]["curve"])
    for point in cells[1]["curve"]:
        point["heldout"] += 0.3
    cells[2]["curve"] = cells[0]["curve"]
    [merged] = merged_cells(example_results(cells))
    assert merged["seeds"] == 3
    assert merged["heldout"]["continuation_bits_per_byte"] == pytest.approx(2.0)
    assert merged["heldout"]["interval_kind"] == "seeds"
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert merged["heldout"]["continuation_interval"] == pytest.approx([2 - half, 2 + half])
    assert merged["curve"][-1]["heldout"] == pytest.approx(cells[0]["curve"][-1]["heldout"] + 0.1)


def test_a_seed_without_a_value_is_not_averaged_away():
    cells = [cell_at("a", 2.0, 0, 9, seed=0), cell_at("a", math.nan, 0, 9, seed=1)]
    [merged] = merged_cells(example_results(cells))
    assert merged["heldout"]["continuation_bits_per_byte"] is None
    assert "no comparable cell" in report.text(example_results(cells))


def test_sizes_and_budgets_stay_apart():
    merged = merged_cells(scaling_results())
    assert len(merged) == 3 * 3 * 2
    assert {cell["label"] for cell in merged if cell["name"] == "t5"} == {
        "t5 small",
        "t5 medium",
        "t5 large",
    }


# ---------------------------------------------------------------- text, csv, latex


@pytest.mark.parametrize("make", [example_results, scaling_results, clean_results])
def test_text_stays_within_80_columns_of_ascii(make):
    results = make()
    results["cells"][0]["flops"] *= 1.4  # a warning that names a power of ten
    page_text = report.text(results)
    assert "Unequal compute at " in page_text and "?" not in page_text
    assert max(map(len, page_text.splitlines())) <= 80
    assert page_text.isascii()


def test_text_keeps_80_columns_with_long_names_and_large_numbers():
    cells = [
        cell_at(f"encoder_decoder_span_corruption_{end}", 2.0, 1.9, 2.1, preset=None)
        for end in ("one", "two")
    ]
    cells[0] |= {"tokens_per_second": 12_345_678.9, "parameters": 11_003_000_000, "flops": 1e22}
    page_text = report.text(example_results(cells))
    assert max(map(len, page_text.splitlines())) <= 80
    assert "tion_one" in page_text and "tion_two" in page_text


def test_text_is_sorted_by_bits_per_byte():
    lines = report.text(example_results()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    values = []
    for line in lines[start + 1 :]:
        if not line:
            break
        values.append(float(line.split()[1].rstrip("~")))
    assert len(values) == len(CELLS) - 1
    assert values == sorted(values)


def test_csv_parses_back_to_the_numbers():
    results = example_results()
    rows = {row["name"]: row for row in DictReader(StringIO(report.csv(results)))}
    assert list(rows) == [cell["name"] for cell in results["cells"]]
    for cell in results["cells"]:
        row, heldout = rows[cell["name"]], cell["heldout"]
        assert float(row["flops"]) == cell["flops"]
        assert float(row["continuation_bits_per_byte"]) == heldout["continuation_bits_per_byte"]
        assert float(row["choice_accuracy_high"]) == heldout["choice_interval"][1]
        assert row["comparable"] == str(heldout["comparable"])
    assert rows["gpt"]["middle_bits_per_byte"] == ""


def test_latex_is_balanced_and_escaped():
    odd = cell_at("50%_of_$5 & #1 {x}", 2.0, 1.9, 2.1)
    source = report.latex(example_results([*example_results()["cells"], odd]))
    bare = re.sub(r"\\[&%$#_{}\\]", "", source)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "_" not in bare
    for name in ("table", "tabular"):
        assert source.count(rf"\begin{{{name}}}") == source.count(rf"\end{{{name}}}") == 1
    rules = [source.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == sorted(rules)
    body = source[rules[1] : rules[2]]
    rows = [line for line in body.splitlines() if re.search(r"(?<!\\)&", line)]
    assert len(rows) == len(CELLS) + 1
    assert all(len(re.findall(r"(?<!\\)&", line)) == 6 for line in rows)
    assert all(line.endswith(r"\\") for line in rows)
    assert r"prefix\_lm" in source and r"bert$^{\dagger}$" in source


# ---------------------------------------------------------------- warnings


def change(**values):
    def apply(cell):
        cell.update(values)

    return apply


def items(kind, number):
    return lambda cell: cell["heldout"]["items"].update({kind: number})


def setting(section, key, value):
    return lambda cell: cell["settings"][section].update({key: value})


CAUSES = [
    (change(flops=3.1e13), "Unequal compute"),
    (change(tuned=False), "not tuned for unilm"),
    (change(learning_rate_at_edge=True), "edge of its grid for unilm"),
    (change(padding_share=0.051), "More than 5% padding: unilm"),
    (change(epochs=1.01), "More than one epoch over the training text: unilm"),
    (change(seed=1), "2 seeds in some cells"),
    (items("continuation", 99), "Only 99 held-out continuation items"),
    (items("choice", 20), "Only 20 held-out choice items"),
    (setting("data", "source", "other.txt"), "Cells differ in data"),
    (setting("data", "tokenizer", "other.model"), "Cells differ in tokenizer"),
    (change(precision="bf16"), "Cells differ in precision"),
    (change(parent="gpt"), "starts from the weights of gpt"),
    (change(warnings=["the run was cut short"]), "unilm: the run was cut short"),
]


def test_a_fair_study_has_no_warning():
    assert report.warnings_for(clean_results()) == []
    assert "Read with care" not in report.text(clean_results())
    assert "Read with care" not in page(clean_results())


@pytest.mark.parametrize("cause, sentence", CAUSES, ids=[sentence for _, sentence in CAUSES])
def test_each_cause_gives_its_warning_and_no_other(cause, sentence):
    results = clean_results()
    cause(results["cells"][-1])  # unilm, seed 2
    warnings = report.warnings_for(results)
    assert len(warnings) == 1
    assert sentence in warnings[0]
    assert " ".join(sentence.split()[:3]) in report.text(results)


@pytest.mark.parametrize("what", ["commit", "hardware", "versions", "tokenizer"])
def test_a_different_environment_is_said(what):
    results = clean_results()
    for cell in results["cells"]:
        cell["environment"] = {what: {"cpu": "a"} if what == "hardware" else "a"}
    assert report.warnings_for(results) == []
    other = {"cpu": "b"} if what == "hardware" else "b"
    results["cells"][0]["environment"] = {what: other}
    [warning] = report.warnings_for(results)
    assert warning.startswith(f"Cells differ in {what}: gpt; ")


def test_flops_within_two_percent_and_at_other_budgets_are_equal():
    results = clean_results()
    for cell in results["cells"]:
        cell["flops"] = 3e13
    results["cells"][0]["flops"] = 3.059e13
    assert report.warnings_for(results) == []
    for cell in results["cells"][:3]:
        cell |= {"budget": 6e13, "flops": 6e13}
    assert report.warnings_for(results) == []


def test_warnings_already_stored_are_not_said_twice():
    results = example_results()
    found = report.warnings_for(results)
    for cell in results["cells"]:
        cell["warnings"] = report.warnings_of(cell)
    results["warnings"] = found
    assert report.warnings_for(results) == found
    assert any("its best learning rate" in w for w in report.warnings_of(example_cell("glm")))


# ---------------------------------------------------------------- figures


def polygon_area(points) -> float:
    """Shoelace formula."""
    following = [*points[1:], points[0]]
    pairs = zip(points, following, strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


@pytest.mark.parametrize(
    "part",
    [(1, 2, 7, 0, 9), (2, 0, 8, 0, 8), (2, 3, 7, 0, 9), (2, 0, 6, 2, 5), (2, 4, 5, 0, 1)],
)
def test_a_drawn_part_covers_its_exact_area(part):
    assert polygon_area([tuple(p) for p in masks.outline(*part)]) == area(part)


def test_stacks_are_drawn_as_one_mask():
    placed = {p.mask["title"]: (p.row, p.column) for p in masks.place(example_cell("t5")["masks"])}
    assert placed == {"encoder": (0, 0), "decoder": (9, 9), "cross-attention": (9, 0)}


def test_each_objective_has_its_own_loss_axis():
    sections = figures.sections(example_results())
    assert len(sections["loss"]) == len({cell["objective"] for cell in example_results()["cells"]})
    assert all(len(panel.figure.axes) == 1 for panel in sections["loss"])
    shared = example_results([cell_at("a", 2, 1, 3), cell_at("b", 2, 1, 3)])
    assert len(figures.sections(shared)["loss"]) == 1


def test_sizes_draw_iso_budget_curves_and_one_size_draws_none():
    assert figures.sections(example_results())["scaling"] == []
    panels = figures.sections(scaling_results())["scaling"]
    assert [len(panel.groups) for panel in panels] == [3, 3]


def test_names_at_curve_ends_do_not_touch_and_keep_their_order():
    wanted = [0, 1, 2, 50, 51, 200]
    places = plots.spread(wanted, 12)
    gaps = [b - a for a, b in pairwise(places)]
    assert min(gaps) >= 12 - 1e-9
    assert plots.spread([0, 100], 12) == [0, 100]


def test_figures_are_written_as_pdf_and_svg_and_twice_the_same(tmp_path):
    results = example_results([example_cell("t5")])
    paths = report.write_figures(results, tmp_path / "figures")
    names = {path.stem for path in paths}
    assert {"mask-t5", "heldout-flops", "heldout-time", "choice", "middle"} <= names
    assert len(paths) == 2 * len(names)
    for path in paths:
        start = path.read_bytes()[:300]
        assert start.startswith(b"%PDF") if path.suffix == ".pdf" else b"<svg" in start
    [panel] = figures.masks(merged_cells(example_results([example_cell("t5")])))
    again = write(panel, tmp_path)
    assert [p.read_bytes() for p in again] == [
        (tmp_path / "figures" / p.name).read_bytes() for p in again
    ]


# ---------------------------------------------------------------- the page


def test_page_holds_every_cell_and_reaches_for_nothing(demo_page):
    results, html = example_results(), demo_page
    for cell in results["cells"]:
        value = f"{cell['heldout']['continuation_bits_per_byte']:.3f}"
        assert cell["name"] in html and value in html
    links = re.findall(r'(?:src|href|url|action|import)\s*[=(]\s*"?([^")>\s]+)', html)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert html == page(example_results())  # the same results, the same page


def test_ids_of_inlined_drawings_do_not_clash_and_all_references_hold(demo_page):
    html = demo_page
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {a or b for a, b in references} <= set(ids)


def test_drawings_in_the_page_follow_the_colour_scheme(demo_page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", demo_page, flags=re.DOTALL))
    assert "var(--prefix-lm)" in drawings
    # What is left in plain colours would not turn with the scheme.
    assert re.findall(r"(?:fill|stroke)[:=] *\"?(#[0-9a-f]{3,6})\b", drawings) == []


def test_the_page_shows_warnings_and_escapes_names():
    odd = cell_at("<script>alert('$')</script>", 2.0, 1.9, 2.1, tuned=False)
    html = page(example_results([odd]))
    assert "<script>alert" not in html
    assert "Read with care: 2 notes" in html and "Learning rate not tuned for &lt;script" in html


def test_the_page_bears_missing_values():
    results = example_results([cell_at("a", math.nan, 1, 2), example_cell("bert")])
    results |= {"commit": None, "hardware": {}, "data": {}, "tuning": [], "command": None}
    cell = results["cells"][0]
    cell["heldout"] |= {"choice_accuracy": None, "choice_interval": None, "items": {}}
    cell |= {"losses": [], "masks": [], "train_seconds": 0, "final_loss": None, "settings": {}}
    cell["curve"] = [point | {"heldout": math.nan} for point in cell["curve"]]
    assert "no comparable cell has a held-out value" in page(results)
    assert report.csv(results) and report.latex(results) and report.text(results)
