"""A cell whose loss is not finite is a finding of its study: the others run, and the report says so."""

import io

import pytest
import torch
from rich.console import Console

from megaarch import report
from megaarch.cluster import status
from megaarch.cluster.submit import unfinished
from megaarch.errors import UserError
from megaarch.report.headline import headline
from megaarch.report.ranking_table import DIVERGED
from megaarch.scaling.points import runs_of_study
from megaarch.study import run_study
from megaarch.study.cells import expand
from megaarch.study.distributed_cell import run_cell, run_trial
from megaarch.training.trainer import Trainer
from tests.study.small_study import small_study

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
GONE = ["gpt/base-1.2e+09-seed1", "adapted/base-1.2e+09-seed1"]


@pytest.fixture
def study(raw):
    cells = [
        {"name": "gpt", "preset": "gpt"},
        {"name": "prefix_lm", "preset": "prefix_lm"},
        {"name": "adapted", "preset": "prefix_lm", "from": "gpt", "budget": 6e8},
    ]
    return small_study(raw, cells, seeds=[0, 1])


def diverging(monkeypatch, *seeds):
    """Makes the weights of every decoder of full_lm with one of these seeds nan in its third step."""
    honest = Trainer.train_step

    def train_step(self, *given):
        settings = self.settings
        mine = settings.data.objective == "full_lm" and settings.training.seed in seeds
        if mine and self.launched.step == 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        honest(self, *given)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_a_cell_that_diverges_is_said_to_and_the_others_run(study, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        diverging(patched, 1)
        results = run_study.compare(study, tmp_path, QUIET)
    keys = [cell.key for cell in expand(study, tmp_path)]
    assert [cell.key for cell in results.cells] == [key for key in keys if key not in GONE]
    own, behind = (cell.divergence for cell in results.diverged)
    assert [cell.key for cell in results.diverged] == GONE
    assert (own.step, own.parent, behind.parent) == (6, None, GONE[0])
    assert "up to step 6" in own.said and "larger training.skip_limit" in own.said

    said = " ".join(headline(results))
    assert "gpt (at 1 of 2 seeds) diverged in training, and ranks with no other." in said
    assert "prefix_lm predicts held-out text best" in said and "no other comparable cell" in said
    text = " ".join(report.text(results).split())
    assert f"Diverged, so left out: {GONE[0]} (step 6)." in text
    assert f"Not run, for what they start from diverged: {GONE[1]}." in text
    assert "adapted (at 1 of 2 seeds) was not run, for what it starts from diverged" in said
    assert "for training diverged: not ranked gpt" in text
    page = report.write_page(results, tmp_path / "report.html").read_text()
    assert DIVERGED in page
    assert r"gpt$^{\S}$ & causal decoder" in report.latex(results)
    assert set(runs_of_study(results)) == {"prefix_lm"}

    shown = {state.name: state for state in status.status(tmp_path)}
    assert (shown[GONE[0]].state, shown[GONE[1]].state) == ("diverged", "not run")
    assert "larger training.skip_limit" in status.table(list(shown.values()))

    # the same command has nothing to do, by itself or in jobs
    monkeypatch.setattr(Trainer, "train_step", None)
    console = Console(file=io.StringIO(), width=300)
    again = run_study.compare(study, tmp_path, console)
    assert again.cells == results.cells and again.diverged == results.diverged
    assert unfinished(expand(study, tmp_path)) == []
    for key in GONE:
        record = run_cell(study, tmp_path, key)
        assert record and record.diverged and record.result is None
    assert run_study.gather(study, tmp_path).diverged == results.diverged
    monkeypatch.undo()

    # one that may skip more goes on, and its child with it
    study["study"]["cells"][0]["set"] = {"training.skip_limit": 100}
    study["study"]["cells"][2]["set"] = {"training.skip_limit": 1}
    assert [cell.key for cell in unfinished(expand(study, tmp_path))] == GONE
    whole = run_study.compare(study, tmp_path, QUIET)
    assert [cell.key for cell in whole.cells] == keys and not whole.diverged
    assert "diverged" not in report.text(whole)


def test_trials_of_a_child_whose_parent_diverged_are_none(study, tmp_path, monkeypatch):
    study["study"] |= {"seeds": [0], "tune": {"learning_rates": [1e-3, 2e-3], "budget": 0.5}}
    with monkeypatch.context() as patched:
        diverging(patched, 0)
        results = run_study.compare(study, tmp_path, QUIET)
    found = {(trial.cell, trial.heldout is None) for trial in results.tuning}
    assert found == {("gpt", True), ("prefix_lm", False)}
    assert [cell.name for cell in results.cells] == ["prefix_lm"]
    record = run_cell(study, tmp_path, GONE[1].replace("seed1", "seed0"))
    assert record and record.diverged and record.diverged.parent
    assert run_trial(study, tmp_path, 4) is None

    # trials of the parent diverged too, and its own rate stays; with a larger limit it goes on, and its child
    study["training"]["skip_limit"] = 100
    results = run_study.compare(study, tmp_path, QUIET)
    assert [cell.name for cell in results.cells] == ["gpt", "prefix_lm", "adapted"]
    assert {trial.cell for trial in results.tuning if trial.heldout} == {"prefix_lm", "adapted"}


def test_a_study_of_which_every_cell_diverges_says_why(study, tmp_path, monkeypatch):
    study["study"] |= {"seeds": [0], "cells": study["study"]["cells"][:1]}
    diverging(monkeypatch, 0)
    with pytest.raises(UserError, match="every cell diverged.*not finite in 4 steps in a row"):
        run_study.compare(study, tmp_path, QUIET)
    study["study"]["seeds"] = [0, 1]
    with pytest.raises(UserError, match="no cell has a result yet"):
        run_study.gather(study, tmp_path)
