"""What a sweep chooses, and what it may be believed for. Trials are made up."""

import copy
import math
from pathlib import Path

import pytest

from megaarch import config
from megaarch.files import write_json
from megaarch.model.parameter_count import parameter_count
from megaarch.study import sweep
from megaarch.study.cells import expand
from megaarch.study.folder import StudyFolder
from megaarch.study.results import Sweep, Trial
from megaarch.study.sweep_grid import BATCH, RATE, SHARE

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
    for cell in expand(study, tmp_path, found.chosen):
        assert cell.settings.training.learning_rate == wanted[cell.size]
        verdict = sweep.verdict(cell, cell.settings.training.learning_rate, found)
        assert verdict["tuned"]
        at_edge[cell.size] = verdict["learning_rate_at_edge"]
    assert at_edge == {"small": True, "large": False}
    study["training"]["clip_gradient"] = 0.5
    for cell in expand(study, tmp_path, found.chosen):
        assert not sweep.verdict(cell, cell.settings.training.learning_rate, found)["tuned"]


def test_batches_and_divisions_of_the_layers_are_tried_with_every_rate(study, tmp_path):
    """An encoder's share of both stacks' layers; what has one stack has none to try."""
    study["study"] |= {
        "sizes": [{"name": "base", "layers": 4}],
        "encoder_decoder_size": "layers_per_stack",
    }
    study["study"]["cells"] += [{"name": "t5", "preset": "t5"}]
    study["study"]["tune"] |= {
        "global_batch_tokens": [128, 256],
        "encoder_shares": [0.25, 0.5, 0.01],
    }
    tried = sweep.trials(study, tmp_path, expand(study, tmp_path))
    names = [trial.name for trial in tried]
    assert [names.count("gpt"), names.count("t5")] == [3 * 2, 3 * 2 * 3]
    assert len({t.folder for t in tried}) == len({t.locked for t in tried}) == len(tried)
    for cell in tried:
        training, model, choice = cell.settings.training, cell.settings.model, cell.choice
        assert (training.learning_rate, training.global_batch_tokens) == (
            choice[RATE],
            choice[BATCH],
        )
        if cell.name == "t5":
            encoder = {0.25: 2, 0.5: 4, 0.01: 1}[choice[SHARE]]
            assert (model.encoder_layers, model.decoder_layers) == (encoder, 8 - encoder)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_division_keeps_the_parameters_where_these_are_matched(share, study, tmp_path):
    study["study"] |= {"sizes": [{"name": "base", "layers": 12}], "match": "parameters"}
    study["study"]["cells"] += [{"name": "t5", "preset": "t5"}]
    gpt, t5 = (cell.settings.model for cell in expand(study, tmp_path, {"t5": {SHARE: share}}))
    assert abs(parameter_count(t5) / parameter_count(gpt) - 1) < 0.05
    assert t5.encoder_layers / (t5.encoder_layers + t5.decoder_layers) == pytest.approx(
        share, abs=0.1
    )


def test_a_division_is_not_tried_on_what_starts_from_others(study):
    study["study"]["tune"]["encoder_shares"] = [0.5]
    study["study"]["cells"].append({"name": "on", "preset": "gpt", "from": "gpt", "budget": 1e8})
    with pytest.raises(config.ConfigError, match=r"study.tune.encoder_shares: cannot be tried"):
        config.resolve(study)


def test_what_was_chosen_is_known_with_its_edges(study, tmp_path):
    """The middle batch at the highest rate is the best; another batch is not the sweep's."""
    del study["study"]["sizes"]
    study["study"]["tune"]["global_batch_tokens"] = [64, 128, 256]
    cells = expand(study, tmp_path)

    def found(best):
        made = [
            Trial(
                cell=cell.name,
                rate_key=cell.rate_key,
                learning_rate=choice[RATE],
                more={BATCH: choice[BATCH]},
                heldout=2 + abs(choice[BATCH] - best) / 1e3 - choice[RATE],
                flops=1e9,
            )
            for cell in sweep.trials(study, tmp_path, cells)
            for choice in [cell.choice]
        ]
        return sweep.record(made, cells, config.resolve(study).study.tune)

    for best, edges in ((128, []), (256, [BATCH])):
        kept = tmp_path / "rates.json"
        write_json(kept, found(best).as_json())
        read = Sweep.read(str(kept))
        [cell] = expand(study, tmp_path, read.chosen)
        assert cell.settings.training.global_batch_tokens == best
        verdict = sweep.verdict(cell, max(RATES), read)
        assert verdict["tuned"] and verdict["learning_rate_at_edge"]
        assert verdict.get("more_at_edge", []) == edges
        own = copy.deepcopy(study)  # a study that takes the rates, and sweeps nothing itself
        del own["study"]["tune"]
        own["study"]["cells"][0]["set"] = {"training.global_batch_tokens": 512}
        [other] = expand(own, tmp_path, read.chosen)
        assert not sweep.verdict(other, max(RATES), read)["tuned"]


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
        for cell in expand(raw, tmp_path, found.chosen)
    }
    assert len(verdicts) == 8
    assert [name for name, verdict in verdicts.items() if not verdict["tuned"]] == []
    assert all(verdict["trial_flops"] for verdict in verdicts.values())
    raw["model"]["attention_scale"] = 1.0
    for cell in expand(raw, tmp_path, found.chosen):
        assert not sweep.verdict(cell, cell.settings.training.learning_rate, found)["tuned"]


@pytest.mark.parametrize("failed", [math.nan, math.inf, None])
def test_a_rate_that_diverged_is_never_chosen(study, tmp_path, failed):
    grid = expand(study, tmp_path)
    found = trials(grid, lambda cell, rate: 2.0 if rate == 4e-3 else failed)
    assert [choice for choice in sweep.best(found).values() if choice != {RATE: 4e-3}] == []
    nothing = trials(grid, lambda cell, rate: failed)
    assert sweep.best(nothing) == {}
    untouched = expand(study, tmp_path, sweep.best(nothing))
    assert {cell.settings.training.learning_rate for cell in untouched} == {3e-3}
