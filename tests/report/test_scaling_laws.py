"""Scaling laws in a study's report."""

import copy

import numpy as np
import pytest

from megaarch import report
from megaarch.report import notation, scaling_laws
from megaarch.report.merged_cells import merged_cells
from megaarch.report.page import page
from megaarch.report.style import looks
from megaarch.scaling.law import Law, fit
from megaarch.scaling.points import of_study
from megaarch.study.results import Results
from tests.study.example_results import example_cell, example_results, scaling_results

LAWS = {
    "gpt": Law(A=60.0, B=90.0, E=1.1, alpha=0.32, beta=0.3),
    "t5": Law(A=60.0, B=90.0, E=1.3, alpha=0.32, beta=0.3),
}


def planted_results(budgets=(1e13, 4e13, 1.6e14, 6.4e14)) -> dict:
    """Five sizes at four budgets of two architectures, whose losses follow LAWS but for 0.2%."""
    cells, rng = [], np.random.default_rng(0)
    for name, law in LAWS.items():
        for budget in budgets:
            for number, size in enumerate(np.geomspace(1e6, 2e7, 5)):
                cell = example_cell(name, budget)
                loss = float(law.loss(size, budget / 6 / size) * np.exp(0.002 * rng.normal()))
                cell |= {"flops": budget, "parameters": size, "size": f"size{number}"}
                cell["heldout"] |= {
                    "continuation_bits_per_byte": loss,
                    "continuation_interval": [loss - 0.01, loss + 0.01],
                }
                cells.append(cell)
    return example_results(cells)


def test_the_page_shows_each_law_and_says_who_is_better():
    results = Results.of(planted_results())
    found = scaling_laws.fits(results)
    assert set(found) == set(LAWS)
    for name, law in LAWS.items():
        low, high = found[name].intervals()["E"]
        assert low < law.E < high
        assert found[name].intervals() == fit(of_study(results)[name]).intervals(), "megaarch fit's"
    html = page(results)
    assert (
        f"gpt is better at {notation.power(1e13)} and at" in html
        and f"{found['t5'].law.E:.2f}" in html
    )
    assert html.count('id="laws--') == 2, "a curve of each"


def test_a_best_size_that_was_not_run_is_said_to_be_extrapolated():
    """Where the sizes begin above the best one of the lowest budget; and of three laws, that pairs are three."""
    said = "the best size at {} FLOPs, "
    found = planted_results()
    html = page(Results.of(found))
    for name in LAWS:
        assert f"{name}: {said.format(notation.power(1e13))}" in html
        assert f"{name}: {said.format(notation.power(6.4e14))}" not in html
    assert "beyond those that were run (1.00 M to 20.0 M)" in html
    assert "comparisons is held to 5% by itself" not in html
    third = [copy.deepcopy(cell) for cell in found["cells"] if cell["name"] == "t5"]
    found["cells"] += [cell | {"name": "glm"} for cell in third]
    assert "Each of these 3 comparisons is held to 5% by itself" in page(Results.of(found))


def test_what_the_documents_favour_is_no_difference():
    """One law for both; the documents cost t5 5% more, most of it on three of twelve."""
    favours = 1 + np.where(np.arange(12) < 3, 0.2, 0.0)
    raw, sizes = planted_results(), np.full(12, 100.0)
    for cell in raw["cells"]:
        loss = cell["heldout"]["continuation_bits_per_byte"]
        if cell["name"] == "t5":
            loss -= LAWS["t5"].E - LAWS["gpt"].E
        amounts = loss * sizes * (favours if cell["name"] == "t5" else 1)
        cell["heldout"] |= {"continuation_bits_per_byte": amounts.sum() / sizes.sum()}
        lists = {"documents": np.arange(12), "sizes": sizes, "amounts": amounts}
        cell["heldout"]["paired"] = {key: value.tolist() for key, value in lists.items()}
    html = page(Results.of(raw))
    assert "gpt and t5 cannot be told apart" in html
    assert "a bootstrap over runs and held-out documents" in html
    for cell in raw["cells"]:
        del cell["heldout"]["paired"]
    html = page(Results.of(raw))
    assert "gpt is better at" in html and "leave out the choice of held-out documents" in html
    assert "a bootstrap over runs." in html


def test_a_study_of_few_points_has_no_law():
    few = scaling_results()
    few["cells"] = few["cells"][:4]
    for results in map(Results.of, (example_results(), few)):
        assert scaling_laws.fits(results) == {} and 'id="laws"' not in page(results)


@pytest.mark.parametrize(
    "budgets, named",
    [
        ((1e13, 1e14, 1e15), ["10¹³", "10¹⁴", "10¹⁵"]),
        ((1.5e13, 3e13, 6e13), [notation.power(budget) for budget in (1.5e13, 3e13, 6e13)]),
        ((8e13, 8.1e13, 4e14), [notation.power(budget) for budget in (8e13, 4e14)]),
    ],
    ids=["decades", "within one", "about one"],
)
def test_its_axis_of_budgets_has_numbers(budgets, named):
    results = Results.of(planted_results(budgets))
    cells = merged_cells(results)
    [panel] = scaling_laws.panels(results, cells, looks(cells))
    panel.figure.draw_without_rendering()
    [ax] = panel.figure.axes
    low, high = ax.get_xlim()
    ticks = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    assert [text.get_text() for at, text in ticks if low <= at <= high] == named


def test_its_figure_is_a_file_of_its_own(tmp_path):
    results = planted_results()
    results["cells"] = results["cells"][:10]  # two budgets of one
    written = report.write_figures(results, tmp_path)
    assert {"laws.pdf", "laws.svg"} <= {path.name for path in written}
