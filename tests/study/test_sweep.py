"""What a sweep chooses, and what it may be believed for. Trials are made up."""

import copy
import math
from pathlib import Path

import pytest

from megaarch import config
from megaarch.study import sweep
from megaarch.study.cells import expand
from megaarch.study.folder import StudyFolder
from megaarch.study.results import Sweep, Trial

RATES = [1e-3, 2e-3, 4e-3]


@pytest.fixture
def study(raw):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {
        "budgets": [1e9],
        "sizes": [{"name": "small", "layers": 1}, {"name": "large", "layers": 2}],
        "cells": [{"name": "gpt", "preset": "gpt"}],
        "tune": {"learning_rates": RATES},
    }
    return mine


def trials(grid, value):
    """A trial of each cell at each rate; value(cell, rate) is what it found."""
    return [
        Trial(
            cell=cell.name,
            rate_key=cell.rate_key,
            learning_rate=rate,
            heldout=value(cell, rate),
            flops=cell.budget,
        )
        for cell in grid
        for rate in RATES
    ]


def test_every_size_of_a_sweep_is_tuned_and_one_of_other_settings_is_not(study, tmp_path):
    grid = expand(study, tmp_path)
    wanted = {"small": 4e-3, "large": 2e-3}
    found = sweep.record(
        trials(grid, lambda cell, rate: 2 + abs(rate - wanted[cell.size])),
        grid,
        config.resolve(study).study.tune,
    )
    at_edge = {}
    for cell in expand(study, tmp_path, found.best):
        assert cell.settings.training.learning_rate == wanted[cell.size]
        verdict = sweep.verdict(cell, cell.settings.training.learning_rate, found)
        assert verdict["tuned"]
        at_edge[cell.size] = verdict["learning_rate_at_edge"]
    assert at_edge == {"small": True, "large": False}
    study["training"]["clip_gradient"] = 0.5
    for cell in expand(study, tmp_path, found.best):
        assert not sweep.verdict(cell, cell.settings.training.learning_rate, found)["tuned"]


def test_a_study_that_has_run_has_the_rates_that_its_trials_chose(study, tmp_path, monkeypatch):
    folder = StudyFolder.open(study, tmp_path)
    wanted = {"small": 4e-3, "large": 2e-3}
    made = trials(folder.cells, lambda cell, rate: 2 + abs(rate - wanted[cell.size]))
    monkeypatch.setattr(sweep, "finished", lambda *_: made)
    for cell in sweep.chosen(folder).cells:
        assert cell.settings.training.learning_rate == wanted[cell.size]
    del study["study"]["tune"]
    plain = StudyFolder.open(study, tmp_path)
    assert sweep.chosen(plain) is plain


def test_a_file_that_knows_names_alone_serves_too(study, tmp_path):
    del study["study"]["sizes"]
    [cell] = expand(study, tmp_path)
    found = Sweep(
        grid=RATES,
        best={"gpt": 2e-3},
        trials=[
            Trial(cell="gpt", rate_key="gpt/large-1", learning_rate=2e-3, heldout=2.0, flops=3e9)
        ],
        settings={"gpt": sweep.shared_settings(cell)},
    )
    assert sweep.verdict(cell, 2e-3, found) == {
        "tuned": True,
        "learning_rate_at_edge": False,
        "trial_flops": 3e9,
    }


def test_every_cell_of_the_demo_is_tuned_by_the_committed_sweep(tmp_path):
    """Optional settings that came after the sweep, and that the demo leaves out, change nothing."""
    raw = config.read_yaml(Path("configs/demo.yaml"))
    found = Sweep.read(raw["study"]["rates"])
    verdicts = {
        cell.name: sweep.verdict(cell, cell.settings.training.learning_rate, found)
        for cell in expand(raw, tmp_path, found.best)
    }
    assert len(verdicts) == 8
    assert [name for name, verdict in verdicts.items() if not verdict["tuned"]] == []
    assert all(verdict["trial_flops"] for verdict in verdicts.values())
    raw["model"]["attention_scale"] = 1.0
    for cell in expand(raw, tmp_path, found.best):
        assert not sweep.verdict(cell, cell.settings.training.learning_rate, found)["tuned"]


@pytest.mark.parametrize("failed", [math.nan, math.inf, None])
def test_a_rate_that_diverged_is_never_chosen(study, tmp_path, failed):
    grid = expand(study, tmp_path)
    found = trials(grid, lambda cell, rate: 2.0 if rate == 4e-3 else failed)
    assert set(sweep.best(found).values()) == {4e-3}
    nothing = trials(grid, lambda cell, rate: failed)
    assert sweep.best(nothing) == {}
    untouched = expand(study, tmp_path, sweep.best(nothing))
    assert {cell.settings.training.learning_rate for cell in untouched} == {3e-3}
