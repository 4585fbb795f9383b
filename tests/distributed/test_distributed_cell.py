"""A study whose cells run one by one, each in its own layout, gives what one process gives."""

import copy

import pytest
from rich.console import Console

from megaarch import config
from megaarch.study import distributed_cell, run_study
from megaarch.study.folder import load_config
from tests.distributed.pool import RankError
from tests.study.small_study import run_cells, small_study

LAYOUTS = {
    "gpt": {"parallel.tensor_parallel": 2},
    "t5": {"parallel.pipeline_parallel": 2},
    "adapted": {"parallel.data_parallel_shard": 2},
}


@pytest.fixture
def study(raw):
    """Three cells, a child among them, each in a layout of two processes."""
    cells = [
        {"name": "gpt", "preset": "gpt", "set": LAYOUTS["gpt"]},
        {"name": "t5", "preset": "t5", "set": LAYOUTS["t5"]},
        {
            "name": "adapted",
            "preset": "prefix_lm",
            "from": "gpt",
            "budget": 3e8,
            "set": LAYOUTS["adapted"],
        },
    ]
    mine = small_study(raw, cells, 6e8)
    mine["training"]["micro_batch_size"] = 2
    return mine


def run_trials(raw, directory, numbers):
    return [distributed_cell.run_trial(raw, directory, number).heldout for number in numbers]


def without_layouts(study):
    mine = copy.deepcopy(study)
    for cell in mine["study"]["cells"]:
        del cell["set"]
    return mine


def test_cells_in_layouts_of_their_own_make_the_results_of_one_process(study, pool, tmp_path):
    # the main process alone has the record; the third cell starts from the first, whole again
    assert pool.run(2, run_cells, study, tmp_path / "jobs", list(LAYOUTS)) == [
        [True] * 3,
        [False] * 3,
    ]
    apart = run_study.gather(load_config(tmp_path / "jobs"), tmp_path / "jobs").as_json()
    alone = run_study.compare(without_layouts(study), tmp_path / "alone", Console(quiet=True))
    alone = alone.as_json()
    assert [cell["key"] for cell in apart["cells"]] == [cell["key"] for cell in alone["cells"]]
    for a, b in zip(apart["cells"], alone["cells"], strict=True):
        for key in ("steps", "flops", "seen_tokens", "target_tokens", "parent"):
            assert a[key] == b[key]
        assert a["final_loss"] == pytest.approx(b["final_loss"], rel=1e-5)
        for key in ("continuation_bits_per_byte", "continuation_bits_per_byte_raw"):
            assert a["heldout"][key] == pytest.approx(b["heldout"][key], rel=1e-4), key
        curves = [[point["heldout"] for point in cell["curve"]] for cell in (a, b)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert apart["warnings"] == []
    # finished cells stay, whatever layout asks for them again
    before = (tmp_path / "jobs" / "cells" / alone["cells"][0]["key"] / "cell.json").read_bytes()
    distributed_cell.run_cell(without_layouts(study), tmp_path / "jobs", "gpt")
    after = (tmp_path / "jobs" / "cells" / alone["cells"][0]["key"] / "cell.json").read_bytes()
    assert before == after


def test_a_sweep_in_jobs_of_its_own_chooses_what_one_process_chooses(study, pool, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-5, 1e-3], "budget": 0.5}
    with pytest.raises(RankError, match="2 of its 2 trials are not finished"):
        pool.run(2, run_cells, study, tmp_path, ["gpt"])
    first, second = pool.run(2, run_trials, study, tmp_path, [0, 1])
    assert first == second and first[1] < first[0]
    pool.run(2, run_cells, study, tmp_path, ["gpt"])
    (cell,) = run_study.gather(study, tmp_path).cells
    assert cell.learning_rate == 1e-3 and cell.tuned


def test_what_is_not_finished_is_named(study, tmp_path):
    mine = without_layouts(study)
    with pytest.raises(ValueError, match="no cell is finished"):
        run_study.gather(mine, tmp_path)
    with pytest.raises(ValueError, match=r"starts from gpt/base-6e\+08-seed0, which is not"):
        distributed_cell.run_cell(mine, tmp_path, "adapted")
    distributed_cell.run_cell(mine, tmp_path, "0")
    results = run_study.gather(mine, tmp_path).as_json()
    assert [cell["name"] for cell in results["cells"]] == ["gpt"]
    assert "t5/base-6e+08-seed0, adapted/base-6e+08-seed0" in results["warnings"][0]


def test_a_cell_that_is_not_there_or_a_layout_that_is_not_is_one_sentence(study, tmp_path):
    with pytest.raises(ValueError, match="--cell bert: no such cell; give a number from 0 to 2"):
        distributed_cell.run_cell(study, tmp_path, "bert")
    with pytest.raises(ValueError, match="--cell 9+: no such cell; give a number from 0 to 2"):
        distributed_cell.run_cell(study, tmp_path, "9" * 5000)
    with pytest.raises(ValueError, match="--trial 0: the study has 0 trials"):
        distributed_cell.run_trial(study, tmp_path, 0)
    with pytest.raises(config.ConfigError, match="needs 2 processes and 1 process was started"):
        distributed_cell.run_cell(study, tmp_path, "gpt")
    with pytest.raises(config.ConfigError, match="megaarch submit"):
        run_study.compare(study, tmp_path / "whole", Console(quiet=True))
    assert not (tmp_path / "cells").exists()
