"""Cells that start from a checkpoint that no cell of their study has made."""

import copy
import shutil

import pytest
from rich.console import Console

from megaarch.config import ConfigError
from megaarch.errors import UserError
from megaarch.report.headline import headline
from megaarch.report.warnings import warnings_for
from megaarch.scaling import points
from megaarch.study.run_study import compare, gather

QUIET = Console(quiet=True)


@pytest.fixture
def study(raw):
    """A cell that starts from nothing; `starting` adds one that starts from a checkpoint."""
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    items = {"points": 2, "documents": 6, "prefix_tokens": 12, "continuation_tokens": 6}
    mine["study"] = {
        "name": "s",
        "budgets": [3e8],
        "cells": [{"name": "gpt", "preset": "gpt"}],
        "evaluation": items | {"choices": 8, "middles": 4, "curve_documents": 4},
    }
    return mine


def starting(study, path, **more):
    found = copy.deepcopy(study)
    settings = {"training.start_from": str(path), **more}
    found["study"]["cells"].append({"name": "tuned", "preset": "gpt", "set": settings})
    return found


@pytest.fixture
def outside(study, tmp_path):
    """A run that began with random weights, and one that began with its weights."""
    first = compare(study, tmp_path / "outside", QUIET).cells[0]
    run = tmp_path / "outside" / "cells" / first.key
    again = starting(study, run)
    del again["study"]["cells"][0]
    second = compare(again, tmp_path / "again", QUIET).cells[0]
    return run, tmp_path / "again" / "cells" / second.key


def test_a_start_from_outside_is_counted_ranked_apart_and_fitted_by_no_law(
    study, outside, tmp_path
):
    first, second = outside
    spent = compare(study, first.parents[1], QUIET).cells[0]
    known = compare(starting(study, first), tmp_path / "known", QUIET)
    assert known.cells[1].inherited_flops == spent.flops
    assert known.cells[1].inherited_tokens == spent.seen_tokens
    unknown = compare(starting(study, second), tmp_path / "unknown", QUIET)
    assert unknown.cells[1].inherited_flops is None
    assert unknown.cells[1].inherited_tokens is None
    for results, path, said in (
        (known, first, "FLOPs spent before count as its own."),
        (unknown, second, "whose compute is not known and not counted."),
    ):
        assert "gpt predicts held-out text best" in headline(results, reading=False)[0]
        assert any(
            s.startswith("tuned (")
            and s.endswith("from other weights, and is ranked with no other.")
            for s in headline(results)
        )
        named = [w for w in warnings_for(results) if w.startswith("tuned starts from the weights")]
        assert len(named) == 1 and said in named[0]
        assert str(path).removesuffix("-seed0") in named[0]
        assert set(points.of_study(results)) == {"gpt"}


def test_cells_that_all_start_from_outside_claim_no_equal_compute(study, outside, tmp_path):
    mine = starting(study, outside[1])
    mine["study"]["cells"][0]["set"] = {"training.start_from": str(outside[1])}
    results = compare(mine, tmp_path / "all", QUIET)
    assert "At equal compute" not in headline(results, reading=False)[0]
    assert "not known of the weights that cells start from" in headline(results, reading=False)[0]
    with pytest.raises(UserError, match="no finished cell"):
        points.of_study(results)


def test_another_checkpoint_is_another_cell_and_one_that_has_gone_is_the_same(
    study, outside, tmp_path
):
    first, second = outside
    mine = tmp_path / "mine"
    before = compare(starting(study, first), mine, QUIET)
    moved = first.rename(tmp_path / "moved")
    assert compare(starting(study, moved), mine, QUIET).cells == before.cells
    with pytest.raises(ConfigError, match="start_from was 'checkpoint .* and is 'checkpoint "):
        compare(starting(study, second), mine, QUIET)
    with pytest.raises(ConfigError, match="tuned: training.start_from: .*no complete checkpoint"):
        compare(starting(study, tmp_path / "typo"), mine, QUIET)
    moved.rename(first)
    shutil.rmtree(first)
    assert compare(starting(study, first), mine, QUIET).cells == before.cells
    assert gather(starting(study, first), mine).cells == before.cells


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vocabulary_size": 400}, "was trained with another tokenizer"),
        ({"layers": 3}, "parameters differ"),
        ({"position_encoding": "none"}, "positions mean something else"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_start_that_fits_a_cell_not_is_told_before_any_trains(
    changed, said, study, outside, tmp_path
):
    study["model"] |= changed
    with pytest.raises(ConfigError, match="^.*cell tuned: .*" + said):
        compare(starting(study, outside[0]), tmp_path / "mine", QUIET)
    assert not (tmp_path / "mine" / "cells").exists()


def test_a_child_of_a_cell_from_outside_inherits_what_is_not_known(study, outside, tmp_path):
    mine = starting(study, outside[1])
    mine["study"]["cells"].append({"name": "child", "preset": "gpt", "from": "tuned"})
    assert compare(mine, tmp_path / "mine", QUIET).cells[2].inherited_flops is None


def test_an_optimizer_taken_along_from_outside_is_one_run(study, outside, tmp_path):
    along = {"training.start_optimizer": True, "training.schedule": "wsd"}
    study["study"]["budgets"] = [6e8]
    results = compare(starting(study, outside[0], **along), tmp_path / "mine", QUIET)
    gpt, more = results.cells
    assert more.total_flops == pytest.approx(gpt.flops, rel=0.1)
    assert set(points.of_study(results)) == {"gpt", "tuned"}
