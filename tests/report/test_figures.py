"""The drawings hold what the numbers say."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from megaarch import report
from megaarch.attention.mask import area
from megaarch.report import axes, figures, masks
from megaarch.report.merged_cells import merged_cells
from megaarch.report.style import LIGHT, looks, write
from megaarch.study.results import CellResult, Results
from tests.study.example_results import (
    CELLS,
    cell_at,
    example_cell,
    example_results,
    scaling_results,
    with_lengths,
)

pytestmark = pytest.mark.slow


def sections(results):
    return figures.sections(Results.of(results))


def polygon_area(points) -> float:
    """Shoelace formula."""
    following = [*points[1:], points[0]]
    pairs = zip(points, following, strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


@pytest.mark.parametrize(
    "part", [(1, 2, 7, 0, 9), (2, 0, 8, 0, 8), (2, 3, 7, 0, 9), (2, 0, 6, 2, 5), (2, 4, 5, 0, 1)]
)
def test_a_drawn_part_covers_its_exact_area(part):
    assert polygon_area([tuple(p) for p in masks.outline(*part)]) == area(part)


def test_stacks_are_drawn_as_one_mask():
    placed = {
        p.mask.title: (p.row, p.column) for p in masks.place(CellResult(**example_cell("t5")).masks)
    }
    assert placed == {"encoder": (0, 0), "decoder": (9, 9), "cross-attention": (9, 0)}


def test_the_mask_of_a_mixture_says_that_it_is_of_one_row():
    captions = {panel.name: panel.caption for panel in sections(example_results())["masks"]}
    mixed = {f"mask-{name}" for name in ("unilm", "glm")}
    assert {
        name for name, caption in captions.items() if "One row of a mixture" in caption
    } == mixed


def test_each_objective_has_its_own_loss_axis():
    found = sections(example_results())
    assert len(found["loss"]) == len({cell["objective"] for cell in example_results()["cells"]})
    assert all(len(panel.figure.axes) == 1 for panel in found["loss"])
    shared = example_results([cell_at("a", 2, 1, 3), cell_at("b", 2, 1, 3)])
    assert len(sections(shared)["loss"]) == 1


def test_a_pseudo_likelihood_is_marked_wherever_it_stands_among_others():
    cells = [example_cell("gpt"), example_cell("bert"), example_cell("t5")]
    panels = {
        panel.name: panel
        for section in sections(example_results(cells)).values()
        for panel in section
    }
    assert set(rows_of(panels["choice"])) == {"gpt", "bert *", "t5"}
    assert "not comparable" in panels["choice"].caption
    assert not any("bert" in label for label in rows_of(panels["heldout-final"]))
    [choice] = sections(example_results(cells[:1]))["choice"]
    assert choice.caption == ""


def rows_of(panel) -> list[str]:
    [ax] = panel.figure.axes
    return [tick.get_text() for tick in ax.get_yticklabels()]


def test_a_middle_says_who_was_told_its_length_and_calls_none_incomparable():
    """BERT fills it as UniLM does, token by token from left to right."""
    _, middle = sections(example_results())["choice"]
    told = {"unilm \u2020", "bert \u2020", "xlnet \u2020"}
    assert set(rows_of(middle)) == told | {"t5", "bart", "glm"}
    assert "Told the gap's length" in middle.caption and "one mark for the" in middle.caption
    assert "not comparable" not in middle.caption
    alike = [example_cell("t5"), example_cell("glm")]
    assert sections(example_results(alike))["choice"][1].caption == ""


def test_sizes_draw_iso_budget_curves_and_one_size_draws_none():
    assert sections(example_results())["scaling"] == []
    panels = sections(scaling_results())["scaling"]
    assert [len(panel.groups) for panel in panels] == [3, 3]


def test_names_at_curve_ends_do_not_touch_and_keep_their_order():
    wanted = [0, 1, 2, 50, 51, 200]
    places = axes.spread(wanted, 12)
    gaps = [b - a for a, b in pairwise(places)]
    assert min(gaps) >= 12 - 1e-9
    assert axes.spread([0, 100], 12) == [0, 100]


def test_a_cell_that_starts_from_another_is_drawn_in_its_colour_with_hollow_markers():
    cells = [
        cell_at("b", 2, 1, 3, preset=None),
        cell_at("a", 2, 1, 3, preset=None),
        cell_at("a-tuned", 2, 1, 3, preset=None, parent="a/base-3e+13-seed0"),
    ]
    look = looks(merged_cells(Results.of(example_results(cells))))
    assert look["a-tuned"].key == look["a"].key != look["b"].key
    assert look["a-tuned"].dash != look["a"].dash
    assert look["a"].marks["markerfacecolor"] == look["a"].colour
    assert look["a-tuned"].marks["markerfacecolor"] == LIGHT["page"]


def test_a_cell_without_positions_has_the_colour_of_its_like_and_other_dashes():
    blind = {"model": {"position_encoding": "none"}}
    cells = [
        cell_at("b", 2, 1, 3, preset=None, objective="span_corruption"),
        cell_at("a", 2, 1, 3, preset=None, objective="full_lm"),
        cell_at("b-tuned", 2, 1, 3, preset=None, objective="full_lm", parent="b/base-3e+13-seed0"),
        cell_at("other-nopos", 2, 1, 3, preset=None, objective="prefix_lm", settings=blind),
    ]
    cells.insert(0, cell_at("a-nopos", 2, 1, 3, preset=None, objective="full_lm", settings=blind))
    look = looks(merged_cells(Results.of(example_results(cells))))
    assert look["a-nopos"].key == look["a"].key and look["a-nopos"].dash != look["a"].dash
    assert len({look[name].key for name in ("b", "a", "other-nopos")}) == 3


def test_figures_are_written_as_pdf_and_svg_and_twice_the_same(tmp_path):
    results = example_results([example_cell("t5")])
    paths = report.write_figures(results, tmp_path / "figures")
    names = {path.stem for path in paths}
    assert {"mask-t5", "heldout-flops", "heldout-time", "choice", "middle"} <= names
    assert len(paths) == 2 * len(names)
    for path in paths:
        start = path.read_bytes()[:300]
        assert start.startswith(b"%PDF") if path.suffix == ".pdf" else b"<svg" in start
    [panel] = figures.masks(merged_cells(Results.of(example_results([example_cell("t5")]))))
    again = write(panel, tmp_path)
    assert [p.read_bytes() for p in again] == [
        (tmp_path / "figures" / p.name).read_bytes() for p in again
    ]


def test_a_curve_of_examples_is_the_mean_of_the_tasks(tmp_path):
    """Over tasks, each of which counts alike, and over seeds."""
    results = example_results()
    for cell in results["cells"]:
        right = {"0": [0.0, 1.0], "4": [1.0, 1.0]}
        cell["heldout"]["tasks"] = {
            name: {
                "accuracy": 0.5,
                "items": 2,
                "right": right["0"],
                "by_shots": {
                    n: {"accuracy": sum(each) / 2, "items": 2, "right": each}
                    for n, each in right.items()
                },
            }
            for name in ("a", "b")
        }
    [panel] = [
        p for p in figures.sections(Results.of(results))["tasks"] if p.name.startswith("shots")
    ]
    said = list(panel.groups.values())
    assert len(said) == len({cell["name"] for cell in results["cells"]})
    assert all("1 at the end" in words for words in said)


def test_cells_whose_names_differ_in_marks_have_drawings_and_values_of_their_own():
    results = example_results()
    for cell, name in zip(results["cells"], ("t5", "t5+", "v1.1", "v1_1", "v1-1"), strict=False):
        cell["name"] = name
    panels = [panel for panels in sections(results).values() for panel in panels]
    for panel in panels:
        others = [says for other in panels if other is not panel for says in other.groups]
        assert not set(panel.groups) & set(others)
    names = [panel.name for panel in figures.masks(merged_cells(Results.of(results)))]
    assert len(set(names)) == len(names)
    final = next(panel for panel in panels if panel.name.startswith("heldout-final"))
    assert {says.partition(":")[0] for says in final.groups.values()} >= {"t5", "t5+", "v1.1"}


def test_the_names_of_many_curves_stand_within_their_figure():
    """As many as configs/studies/scale.yaml has at its budget."""
    cells = [example_cell(p, size=size) for p in CELLS for size in ("small", "medium", "large")]
    cells += [cell | {"size": "huge"} for cell in cells[2::3]]
    found = [p for p in sections(example_results(cells))["heldout"] if p.name == "heldout-flops"]
    for panel in (*found, *sections(example_results())["heldout"][:1]):
        canvas = FigureCanvasAgg(panel.figure)
        canvas.draw()
        [ax] = panel.figure.axes
        names = [text for text in ax.texts if text.arrow_patch]
        ends = [Text.get_window_extent(text, canvas.get_renderer()) for text in names]
        assert len(ends) == len(panel.groups)
        assert min(end.y0 for end in ends) > 0
        assert max(end.y1 for end in ends) < panel.figure.bbox.height
        points = [end.y0 / panel.figure.dpi * 72 for end in ends]
        assert min(b - a for a, b in pairwise(sorted(points))) > 10


def test_points_of_many_curves_stand_at_their_lengths():
    """Beside each other, and none nearer to another length than its own."""
    lengths = {str(2**i): 2.0 for i in range(6)}
    cells = [with_lengths(cell_at(f"c{i}", 2.0, 1.9, 2.1), lengths, 0.1) for i in range(32)]
    panels = {p.name: p for p in sections(example_results(cells))["heldout"]}
    [ax] = panels["heldout-length"].figure.axes
    at = np.array([line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 6])
    assert at.shape == (32, 6)
    assert (at[:, :-1].max(axis=0) < at[:, 1:].min(axis=0)).all()


def test_equal_values_are_drawn_in_the_order_of_the_table():
    names = ["a", "b", "c"]
    cells = [cell_at(name, 2.0, 1.9, 2.1) for name in names]
    for cell in cells:
        middle = {"middle_bits_per_byte": 2.0, "middle_interval": [1.9, 2.1]}
        cell["heldout"] |= middle | {"choice_accuracy": 0.5, "choice_interval": [0.4, 0.6]}
    results = example_results(cells)
    panels = {p.name: p for section in sections(results).values() for p in section}
    for name in ("heldout-final", "choice", "middle"):
        assert rows_of(panels[name]) == names
    table = report.text(results).partition("-" * 70)[2].splitlines()[1:4]
    assert [line.split()[0] for line in table] == names


def test_iso_budget_curves_are_of_cells_that_rank_together():
    results = scaling_results()
    cells = merged_cells(Results.of(results))
    look = looks(cells)
    [panel] = figures.scaling(cells, look, 1, "1e15 FLOPs")
    for cell in results["cells"]:
        if cell["name"] == results["cells"][0]["name"]:
            cell["objective"] = "supervised"
    cells = merged_cells(Results.of(results))
    [without] = figures.scaling(cells, looks(cells), 1, "1e15 FLOPs")
    assert 0 < len(without.groups) < len(panel.groups)
