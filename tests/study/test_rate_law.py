"""Rates of sizes that no sweep held: the law against planted ones, and what a study and its report do with it."""

import copy
import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaarch import config
from megaarch.errors import UserError
from megaarch.files import write_json
from megaarch.report.warnings import warnings_of
from megaarch.study import costs, distributed_cell, rate_law, sweep
from megaarch.study.cells import expand, find
from megaarch.study.folder import StudyFolder
from megaarch.study.results import CellResult, Sweep, Trial
from megaarch.study.sweep_grid import BATCH, SHARE
from tests.study.example_results import example_cell

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def trials_at(parameters, budget, optimum, rates=RATES, cell="gpt", **more):
    """Trials whose values are a parabola in log rate about `optimum`."""
    return [
        Trial(
            cell=cell,
            rate_key=f"{cell}/{parameters}-{budget}",
            learning_rate=rate,
            more=more,
            heldout=2 + math.log(rate / optimum) ** 2,
            flops=budget,
            parameters=parameters,
            budget=budget,
        )
        for rate in rates
    ]


@given(st.floats(-1, 1), st.floats(-0.5, 0.5), st.floats(1e-4, 1e-1))
def test_a_law_of_parameters_and_budget_is_found_again(a, b, middle):
    """Exactly, from sweeps whose values are parabolas, and from 9 places that vary both."""
    sizes, budgets = (1e6, 4e6, 1.6e7), (1e12, 1e13, 1e14)

    def optimum(parameters, budget):
        return middle * (parameters / 4e6) ** a * (budget / 1e13) ** b

    made = []
    for parameters in sizes:
        for budget in budgets:
            best = optimum(parameters, budget)
            rates = [best * 2 ** (shift + 0.3) for shift in (-2, -1, 0, 1, 2)]
            made += trials_at(parameters, budget, best, rates)
    law = rate_law.fit(made)
    assert law.places == 9 and law.largest == 1.6e7
    assert law.scatter == pytest.approx(1, abs=1e-5)
    assert law.parameters == pytest.approx(a, abs=1e-6)
    assert law.budget == pytest.approx(b, abs=1e-6)
    log = law.constant + law.parameters * math.log(1e9) + law.budget * math.log(1e17)
    assert math.exp(log) == pytest.approx(optimum(1e9, 1e17), rel=1e-4)


def test_what_the_sweep_did_not_vary_has_no_exponent():
    """Not the budget of sizes at one budget; and of budgets that grow with the sizes each has half, which is
    their product's, compute."""
    one = [t for n in (1e6, 1e7, 1e8) for t in trials_at(n, 1e12, 2e-3 * (n / 1e7) ** -0.2)]
    law = rate_law.fit(one)
    assert law.budget == pytest.approx(0, abs=1e-9)
    assert law.parameters == pytest.approx(-0.2, abs=1e-6)
    both = [t for n in (1e6, 1e7, 1e8) for t in trials_at(n, 20 * n, 2e-3 * (n / 1e7) ** -0.2)]
    law = rate_law.fit(both)
    assert law.parameters == pytest.approx(-0.1, abs=1e-6) == pytest.approx(law.budget, abs=1e-6)


def test_places_that_differ_little_in_one_direction_do_not_decide_its_exponent():
    rng = np.random.default_rng(0)
    made = []
    for n in (1e6, 1e7, 1e8):
        budget = 20 * n * math.exp(rng.normal(0, 0.1))
        made += trials_at(n, budget, 2e-3 * (n / 1e7) ** -0.2 * math.exp(rng.normal(0, 0.1)))
    law = rate_law.fit(made)
    assert abs(law.parameters) < 0.2 and abs(law.budget) < 0.2


def test_a_law_says_how_its_places_lie_about_it():
    made = [
        trial
        for n, factor in ((1e6, 1.1), (1e7, 1 / 1.21), (1e8, 1.1))
        for trial in trials_at(n, 1e12, 2e-3 * factor)
    ]
    law = rate_law.fit(made)
    assert law.parameters == pytest.approx(0, abs=1e-9)
    assert law.scatter == pytest.approx(math.exp(math.sqrt(6) * math.log(1.1)))


def test_a_place_counts_where_its_best_rate_is_enclosed():
    beyond = trials_at(1e9, 1e12, 3e-2)  # the highest rate that was tried is the best
    assert rate_law.best_rate(beyond) is None
    small, middle, large = (
        trials_at(n, 1e12, r) for n, r in ((1e6, 2.2e-3), (1e7, 1.4e-3), (1e8, 1e-3))
    )
    assert rate_law.fit([*small, *middle, *large, *beyond]).largest == 1e8
    assert rate_law.fit([*small, *middle, *beyond]) is None  # two lie on any law
    assert rate_law.fit([]) is None
    assert rate_law.best_rate(small) == pytest.approx(2.2e-3)
    old = [trial.model_copy(update={"parameters": None}) for trial in small]  # an earlier version's
    assert rate_law.fit([*old, *middle, *large]) is None
    for trial in small[3:]:
        trial.heldout = None  # what diverged encloses too, and bends no parabola
    assert rate_law.best_rate(small) == 2e-3
    for trial in small:
        trial.heldout = None
    assert rate_law.best_rate(small) is None
    assert rate_law.fit([*small, *middle, *large]) is None


def test_divisions_of_the_layers_are_one_place():
    """Of the best one's parameters, though each division has its own; and sizes so near give no exponent."""
    made = []
    for n in (1e6, 1e7, 1e8):
        for share, worse in ((0.3, 0.2), (0.5, 0.0), (0.7, 0.1)):
            trials = trials_at(n * (1 + share / 100), 1e12, 1e-3 * (1 + worse), **{SHARE: share})
            update = {"rate_key": f"t5/{n}"}
            made += [t.model_copy(update=update | {"heldout": t.heldout + worse}) for t in trials]
    found = rate_law.places(made)
    assert [place.parameters for place in found] == [n * 1.005 for n in (1e6, 1e7, 1e8)]
    assert [place.rate for place in found] == pytest.approx([1e-3] * 3)
    near = [t for n in (1e8, 1.01e8, 1.02e8) for t in trials_at(n, 1e12, 1e-3 * (n / 1e8) ** -9)]
    law = rate_law.fit(near)
    assert (law.parameters, law.budget) == (0, 0) and law.scatter > 1


def test_a_law_through_all_of_its_places_is_none():
    three = [trials_at(n, b, 1e-3) for n, b in ((1e6, 1e12), (1e7, 1e12), (1e6, 1e13))]
    assert rate_law.fit(chain(*three)) is None
    assert rate_law.fit(chain(*three, trials_at(1e7, 1e13, 1e-3))).places == 4


def test_the_rates_of_the_best_batch_decide():
    small = trials_at(1e6, 1e12, 1e-3, **{BATCH: 128})
    better = [t.model_copy(update={"heldout": t.heldout - 1}) for t in trials_at(1e6, 1e12, 2e-3)]
    better = [t.model_copy(update={"more": {BATCH: 256}}) for t in better]
    [place] = rate_law.places([*small, *better])
    assert place.rate == pytest.approx(2e-3)


@pytest.fixture
def study(raw):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {
        "budgets": [1e9],
        "sizes": [
            {"name": "small", "hidden_size": 16},
            {"name": "middle", "hidden_size": 32},
            {"name": "wide", "hidden_size": 64},
            {"name": "large", "hidden_size": 128, "layers": 4},
        ],
        "cells": [{"name": "gpt", "preset": "gpt"}, {"name": "t5", "preset": "t5"}],
        "tune": {"learning_rates": RATES, "sizes": SWEPT, "budget": 0.5},
    }
    return mine


SWEPT = ["small", "middle", "wide"]
OPTIMA = {
    "gpt": {"small": 2.8e-3, "middle": 2e-3, "wide": 1e-3},
    "t5": {"small": 1.4e-3, "middle": 1.8e-3, "wide": 3.2e-3},
}


def swept(study, directory):
    """The record of a sweep of the study whose best rates are OPTIMA."""
    made = []
    for cell in sweep.trials(study, directory, expand(study, directory)):
        parameters, budget = rate_law.place_of(cell)
        [trial] = trials_at(
            parameters,
            budget,
            OPTIMA[cell.name][cell.size],
            [cell.choice["training.learning_rate"]],
            cell.name,
        )
        made.append(trial.model_copy(update={"rate_key": cell.rate_key}))
    grid = expand(study, directory)
    return sweep.record(made, grid, config.resolve(study).study.tune)


def test_sizes_that_are_not_swept_get_the_rate_of_their_own_architecture(study, tmp_path):
    """gpt's falls with its size and t5's rises; what is swept has what was best on its grid."""
    folder = StudyFolder.open(study, tmp_path)
    assert {cell.size for cell in sweep.trials(study, tmp_path, folder.cells)} == set(SWEPT)
    counts = {(cell.name, cell.size): costs.trials(cell, folder.study) for cell in folder.cells}
    assert counts == {key: 0 if key[1] == "large" else 5 for key in counts}
    write_json(tmp_path / "rates.json", swept(study, tmp_path).as_json())
    found = Sweep.read(str(tmp_path / "rates.json"))
    cells = {(c.name, c.size): c for c in folder.with_choices(found).cells}
    rates = {key: cell.settings.training.learning_rate for key, cell in cells.items()}
    for name, optima in OPTIMA.items():
        n = {size: rate_law.place_of(cells[name, size])[0] for size in (*SWEPT, "large")}
        x, y = np.log([n[size] for size in SWEPT]), np.log(list(optima.values()))
        wanted = math.exp(np.polyval(np.polyfit(x, y, 1), math.log(n["large"])))
        assert rates[name, "large"] == pytest.approx(wanted, rel=5e-3)
        verdict = sweep.verdict(cells[name, "large"], rates[name, "large"], found)
        assert not verdict["tuned"]
        reach = verdict["extrapolation"]
        assert (reach.places, reach.same_batch) == (3, True)
        assert reach.scatter == pytest.approx(found.laws[name].scatter) and reach.scatter > 1
        assert reach.times == pytest.approx(n["large"] / n["wide"])
        for size, best in optima.items():
            assert rates[name, size] == min(RATES, key=lambda rate: abs(math.log(rate / best)))
            assert sweep.verdict(cells[name, size], rates[name, size], found)["tuned"]
    assert rates["gpt", "large"] < 1e-3 and rates["t5", "large"] > 3.2e-3


def test_a_job_of_its_own_takes_the_rate_that_one_process_takes(study, tmp_path, monkeypatch):
    """From the trials of all sizes of its name, which have to be finished."""
    folder, made = StudyFolder.open(study, tmp_path), swept(study, tmp_path).trials
    wanted = {c.key: c for c in folder.with_choices(swept(study, tmp_path)).cells}

    def finished(folder, cells):
        keys = {cell.rate_key for cell in cells}
        return [trial for trial in made if trial.rate_key in keys]

    monkeypatch.setattr(sweep, "finished", finished)
    for cell in folder.cells:
        found = distributed_cell._tuned(folder, cell)
        assert find(found.cells, cell.key) == wanted[cell.key]
    made = made[1:]
    large = next(cell for cell in folder.cells if cell.size == "large")
    with pytest.raises(UserError, match="1 of its 15 trials are not finished"):
        distributed_cell._tuned(folder, large)


def test_a_cell_whose_trials_all_diverged_keeps_its_rate_everywhere(study, tmp_path, monkeypatch):
    found = swept(study, tmp_path)
    for trial in found.trials:
        if trial.rate_key.startswith("gpt/wide"):
            trial.heldout = None
    tune = config.resolve(study).study.tune
    again = sweep.record(found.trials, expand(study, tmp_path), tune)
    folder = StudyFolder.open(study, tmp_path)
    monkeypatch.setattr(
        sweep,
        "finished",
        lambda _, cells: [t for t in found.trials if t.rate_key in {c.rate_key for c in cells}],
    )
    [wide] = [c for c in folder.with_choices(again).cells if (c.name, c.size) == ("gpt", "wide")]
    assert find(distributed_cell._tuned(folder, wide).cells, wide.key) == wide


def test_a_rate_that_a_cell_sets_itself_or_other_settings_are_no_law_s(study, tmp_path):
    found = swept(study, tmp_path)
    large = [
        c for c in StudyFolder.open(study, tmp_path).with_choices(found).cells if c.size == "large"
    ]
    rate = large[0].settings.training.learning_rate
    study["study"]["cells"][0]["set"] = {"training.learning_rate": 7e-3}
    folder = StudyFolder.open(study, tmp_path).with_choices(found)
    [cell] = [c for c in folder.cells if (c.name, c.size) == ("gpt", "large")]
    assert cell.settings.training.learning_rate == 7e-3
    assert sweep.verdict(cell, 7e-3, found)["extrapolation"] is None
    study["study"]["cells"][0]["set"] = {"model.activation": "relu"}
    folder = StudyFolder.open(study, tmp_path).with_choices(found)
    [cell] = [c for c in folder.cells if (c.name, c.size) == ("gpt", "large")]
    assert sweep.verdict(cell, cell.settings.training.learning_rate, found)["extrapolation"] is None
    study["study"]["cells"][0]["set"] = {"training.global_batch_size": 16}
    folder = StudyFolder.open(study, tmp_path).with_choices(found)
    [cell] = [c for c in folder.cells if (c.name, c.size) == ("gpt", "large")]
    assert cell.settings.training.learning_rate == rate
    assert not sweep.verdict(cell, rate, found)["extrapolation"].same_batch


def test_a_sweep_of_another_study_serves_sizes_and_budgets_in_its_unit(study, tmp_path):
    write_json(tmp_path / "rates.json", swept(study, tmp_path).as_json())
    del study["study"]["tune"]
    study["study"] |= {"rates": str(tmp_path / "rates.json"), "budgets": [4e9]}
    by_law = {
        c.key: c.settings.training.learning_rate for c in StudyFolder.open(study, tmp_path).cells
    }
    assert len(set(by_law.values())) == 8
    study["study"] |= {"match": "seen_tokens", "budgets": [1e5]}
    cells = StudyFolder.open(study, tmp_path).cells
    by_name = {c.name: {c.settings.training.learning_rate} for c in cells}
    assert by_name == {"gpt": {2e-3}, "t5": {2e-3}}  # best by the mean over sizes, as without a law


def test_the_sweep_for_the_study_at_scale_serves_all_of_its_cells(tmp_path):
    """Nothing but sizes and budgets differs between the two configurations."""
    made = []
    small, scale = (
        config.read_yaml(f"configs/studies/{name}.yaml") for name in ("scale_rates", "scale")
    )
    grid = expand(small, tmp_path)
    for cell in grid:
        parameters, budget = rate_law.place_of(cell)
        trials = trials_at(parameters, budget / 2, 1e-3, cell=cell.name)
        made += [trial.model_copy(update={"rate_key": cell.rate_key}) for trial in trials]
    found = sweep.record(made, grid, config.resolve(small).study.tune)
    cells = StudyFolder.open(scale, tmp_path).with_choices(found).cells
    assert len(cells) == 32
    for cell in cells:
        reach = sweep.verdict(cell, cell.settings.training.learning_rate, found)["extrapolation"]
        assert reach.places == 6 and reach.same_batch and reach.times > 1, cell.key


def test_sizes_that_a_sweep_names_must_be_there(study):
    study["study"]["tune"]["sizes"] = ["smal"]
    with pytest.raises(config.ConfigError, match=r"study.tune.sizes: 'smal' is no size .*small"):
        config.resolve(study)


def test_the_report_says_from_how_far_a_rate_was_taken():
    cell = example_cell("gpt")
    told = cell | {
        "tuned": False,
        "extrapolation": {"places": 3, "scatter": 1.234, "times": 12.4, "same_batch": False},
    }
    found = [
        line for line in warnings_of(CellResult.model_validate(told)) if "learning rate" in line
    ]
    assert found == [
        f"its learning rate ({cell['learning_rate']}) is extrapolated: swept at 3 sizes or budgets and with "
        "another batch, which lie within a factor of 1.23 of their law, for 12 times their parameters"
    ]
