"""A study end to end: equal compute, what is finished stays, what is new runs, what changed is
named."""

import copy
import json

import pytest
from rich.console import Console

from megaarch import config
from megaarch.study import compare as study_module
from megaarch.study import report
from megaarch.study.compare import compare

QUIET = Console(quiet=True)


@pytest.fixture
def study(raw):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {
        "name": "s",
        "budgets": [1.2e9],
        "cells": [
            {"name": "gpt", "preset": "gpt"},
            {"name": "t5", "preset": "t5"},
            {"name": "adapted", "preset": "prefix_lm", "from": "gpt", "budget": 6e8},
        ],
        "evaluation": {
            "points": 8,
            "documents": 6,
            "curve_documents": 4,
            "prefix_tokens": 12,
            "continuation_tokens": 6,
            "choices": 8,
            "middles": 4,
        },
    }
    return mine


def test_results_have_what_the_report_and_its_readers_rely_on(study, tmp_path):
    results = compare(study, tmp_path, QUIET)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    gpt, t5, adapted = results["cells"]
    for cell, budget in ((gpt, 1.2e9), (t5, 1.2e9), (adapted, 6e8)):
        assert abs(cell["flops"] / budget - 1) < 0.5 / cell["steps"] + 0.01
        assert len(cell["curve"]) >= 8 and cell["curve"][0]["step"] == 0
        assert cell["curve"][-1]["step"] == cell["steps"]
        assert all({"step", "flops", "seconds", "heldout"} <= set(point) for point in cell["curve"])
        for key in [
            "name",
            "architecture",
            "objective",
            "parameters",
            "flops",
            "palm_flops",
            "seen_tokens",
            "target_tokens",
            "steps",
            "train_seconds",
            "tokens_per_second",
            "final_loss",
            "heldout",
            "warnings",
            "curve",
        ]:
            assert key in cell
        assert {"continuation_bits_per_byte", "comparable", "choice_accuracy"} <= set(
            cell["heldout"]
        )
    assert adapted["parent"] == gpt["key"]
    assert adapted["curve"][0]["heldout"] != gpt["curve"][0]["heldout"]
    for write in (report.text, report.csv, report.latex):
        assert "adapted" in write(results)


def test_only_new_cells_run_and_a_changed_one_is_named(study, tmp_path, monkeypatch):
    compare(study, tmp_path, QUIET)
    ran = []
    honest = study_module.cells.run
    monkeypatch.setattr(
        study_module.cells, "run", lambda cell, *a: ran.append(cell.key) or honest(cell, *a)
    )
    study["study"]["seeds"] = [0, 1]
    study["study"]["cells"] = study["study"]["cells"][:2]
    compare(study, tmp_path, QUIET)
    assert ran == ["gpt/base-1.2e+09-seed1", "t5/base-1.2e+09-seed1"]
    study["training"]["clip_gradient"] = 0.7
    with pytest.raises(config.ConfigError, match=r"clip_gradient was 1.0 and is 0.7"):
        compare(study, tmp_path, QUIET)


def test_an_interrupted_cell_continues_to_the_same_result(study, tmp_path, monkeypatch):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["training"]["save_every"] = 3
    whole = compare(study, tmp_path / "whole", QUIET)["cells"][0]
    from megaarch.training.trainer import Trainer

    honest = Trainer.train_step

    def interrupted(self, batches):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return honest(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(study, tmp_path / "part", QUIET)
    monkeypatch.setattr(Trainer, "train_step", honest)
    part = compare(study, tmp_path / "part", QUIET)["cells"][0]
    for key in ("steps", "flops", "final_loss", "seen_tokens"):
        assert part[key] == whole[key]
    assert part["heldout"] == whole["heldout"]
    assert [p["heldout"] for p in part["curve"]] == [p["heldout"] for p in whole["curve"]]


def test_a_sweep_chooses_rates_and_flags_an_optimum_at_the_edge(study, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-5, 1e-3], "budget": 0.5}
    results = compare(study, tmp_path / "sweep", QUIET)
    cell = results["cells"][0]
    assert cell["learning_rate"] == 1e-3 and cell["tuned"] and cell["learning_rate_at_edge"]
    assert [trial["learning_rate"] for trial in results["tuning"]] == [1e-5, 1e-3]
    assert all(abs(t["flops"] / 0.6e9 - 1) < 0.2 for t in results["tuning"])
    # its file serves another study on the same text
    del study["study"]["tune"]
    study["study"]["rates"] = str(tmp_path / "sweep" / "rates.json")
    again = compare(study, tmp_path / "again", QUIET)["cells"][0]
    assert again["learning_rate"] == 1e-3 and again["tuned"]
    study["study"]["rates"] = str(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="study.rates: cannot read"):
        compare(study, tmp_path / "x", QUIET)


def test_a_cell_can_be_finetuned_on_pairs_of_its_own(study, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for i in range(200):
            pair = {"input": f"what is {i} and {i}?", "target": f"it is {2 * i}."}
            file.write(json.dumps(pair) + "\n")
    study["study"]["cells"] = [
        {"name": "t5", "preset": "t5", "set": {"model.target_length": 24}},
        {
            "name": "finetuned",
            "preset": "t5",
            "from": "t5",
            "budget": 4e8,
            "set": {
                "data.objective": "supervised",
                "data.source": str(pairs),
                "model.target_length": 24,
                "model.dropout": 0.1,
            },
        },
    ]
    parent, child = compare(study, tmp_path / "s", QUIET)["cells"]
    assert child["objective"] == "supervised" and child["parent"] == parent["key"]
    assert child["losses"][-1]["loss"] < child["losses"][0]["loss"]
    # scored on the study's own held-out items, under its tokenizer
    sizes = [cell["heldout"]["paired"]["sizes"] for cell in (parent, child)]
    assert sizes[0] == sizes[1]


def test_lanes_give_what_one_after_another_gives(study, tmp_path):
    alone = compare(study, tmp_path / "alone", QUIET)
    study["study"]["lanes"] = 2
    together = compare(study, tmp_path / "together", QUIET)
    for a, b in zip(alone["cells"], together["cells"], strict=True):
        assert a["final_loss"] == b["final_loss"] and a["heldout"] == b["heldout"]


def test_a_folder_serves_one_process_at_a_time_and_damage_is_named(study, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    with study_module._alone(tmp_path), pytest.raises(ValueError, match="another process"):
        compare(study, tmp_path, QUIET)
    compare(study, tmp_path, QUIET)
    record = next((tmp_path / "cells").rglob("cell.json"))
    record.write_text(record.read_text()[:50])
    with pytest.raises(ValueError, match=r"cell\.json is damaged"):
        compare(study, tmp_path, QUIET)


def test_a_study_without_choices_and_middles_has_a_report(study, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["evaluation"] |= {"choices": 3, "middles": 0}
    results = compare(study, tmp_path, QUIET)
    assert report.write_page(results, tmp_path / "report.html").exists()
    assert "gpt" in report.text(results)
    report.check(results)
    with pytest.raises(KeyError):
        report.check({"format": 99})
