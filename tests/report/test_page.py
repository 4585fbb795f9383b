"""The page: complete, self-contained, and sound with missing values."""

import math
import re

import pytest

from megaarch import report
from megaarch.config import catalogue
from megaarch.report.page import page as page_of
from megaarch.study.results import Results
from megaarch.study.sweep_grid import BATCH, SHARE
from tests.report.arguments.example_probes import probed
from tests.report.arguments.example_probes import results as arguments
from tests.study.example_results import cell_at, example_cell, example_results


def page(results) -> str:
    return page_of(Results.of(results))


@pytest.fixture(scope="module")
def demo_page() -> str:
    return page(example_results())


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


def test_all_that_a_trial_tried_is_shown():
    results = example_results()
    results["tuning"][0]["more"] = {BATCH: 4096, SHARE: 0.75}
    assert "0.001 4,096 tokens encoder 0.75" in page(results)


@pytest.mark.parametrize(
    "sizes, named", [(["small", "large"], "gpt/large-3e+13"), (["large"], "gpt")]
)
def test_a_trial_names_its_size_where_several_were_swept(sizes, named):
    results = example_results()
    first = results["tuning"][0]
    results["tuning"] = [first | {"rate_key": f"gpt/{size}-3e+13"} for size in sizes]
    assert f'<th scope="row">{named}</th><td>0.001</td>' in page(results)


def test_who_does_not_read_is_said_once():
    """At the top, where the page begins with the arguments."""
    found = arguments()
    found["cells"][1]["heldout"]["reads_prefix"] = False
    for probes in ({}, probed()):
        assert page_of(Results.of(found), probes).count("prefix may not read its input:") == 1


@pytest.mark.parametrize(
    ("settings", "corner"), [(1, "Cell"), (2, "Setting"), (3, "Setting"), (0, "")]
)
def test_settings_that_differ_are_a_table_that_is_rather_long_than_wide(settings, corner):
    cells = []
    for name in ("a", "b"):
        own = {f"heads_{i}": f"{name}{i}" for i in range(settings)}
        cells.append(cell_at(name, 2.0, 1.9, 2.1, settings={"model": own | {"layers": 2}}))
    html = page(example_results(cells))
    assert (f'<th scope="col">{corner}</th>' in html) == bool(corner)
    for i in range(settings):
        at = [html.index(f"<td>{name}{i}</td>") for name in ("a", "b")]
        between = html[slice(*at)]
        assert ("</tr>" in between) == (corner == "Cell")
    assert "model.layers</th>" not in html


def test_a_reader_of_the_arguments_is_told_what_each_model_is():
    html = page_of(Results.of(arguments()), probed())
    first, others = (part.partition("</ul>")[0] for part in html.split('<ul class="models">')[1:])
    assert "<b>gpt</b> causal decoder, predicts each next token</li>" in first
    assert "<b>masked-blind</b> encoder, restores masked tokens, has no positions</li>" in others
    assert (first + others).count("<li>") == len(arguments()["cells"])
    assert "<dt>encoder</dt><dd>one stack; every token sees every other</dd>" in html
    assert 'class="models"' not in page(example_results())


def test_every_objective_says_what_a_model_of_it_does():
    assert all(row.learns for row in catalogue.OBJECTIVES.values())


def test_the_arguments_are_summed_up_and_each_says_its_rule():
    html = page_of(Results.of(arguments()), probed())
    assert "Of seven arguments 7 hold here, 0 do not, and of 0 it cannot be told" in html
    assert html.count('<p class="rule"><b>Rule.</b> It holds where ') == 7
    left = {name: found for name, found in probed().items() if name != "rank"}
    less = page_of(Results.of(arguments()), left)
    assert (
        "Of seven arguments 6 hold here, 0 do not, and of 0 it cannot be told (1 was not measured),"
        in less
    )
    found = arguments()
    for cell in found["cells"]:
        cell["parameters"] = None  # of an earlier version
        cell["parent"] = "of another study"
    assert "Of seven arguments 7 hold here" in page_of(Results.of(found), probed())
