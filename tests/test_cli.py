"""The command as a person meets it: help, exit codes, one clear sentence for a mistake."""

import copy
import json

import pytest
import yaml

from megaarch.cli import main


@pytest.fixture
def file(raw, tmp_path):
    """A configuration file of a tiny run that logs below tmp_path."""
    mine = copy.deepcopy(raw)
    mine["logging"]["directory"] = str(tmp_path / "run")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(mine))
    return path


def test_help_of_every_command(capsys):
    for command in ([], ["train"], ["compare"], ["evaluate"], ["report"], ["describe"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(len(line) <= 100 for line in text.splitlines())


def test_train_evaluate_and_resume(file, tmp_path, capsys):
    assert main(["train", str(file), "--set", "training.steps=3", "--set", "model.preset=t5"]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert main(["train", str(file), "--set", "training.steps=5", "model.preset=t5"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert 0 < found["continuation_bits_per_byte"] < 20


def test_describe_prints_cells(file, capsys):
    assert main(["describe", str(file), "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert set(cell) == {
        "name",
        "architecture",
        "objective",
        "parameters",
        "non_embedding_parameters",
        "flops_per_row",
        "palm_flops_per_row",
        "seen_tokens_per_row",
        "target_tokens_per_row",
        "lengths",
    }
    assert cell["seen_tokens_per_row"] == 48 and cell["target_tokens_per_row"] == 48
    assert main(["describe", str(file)]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "absent.yaml"], "absent.yaml: cannot read the configuration"),
        (["train", "{file}", "--set", "model.layrs=3"], "did you mean model.layers?"),
        (["train", "{file}", "--set", "data.source=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["train", "{file}", "--set", "model.vocabulary_size=20"], "vocabulary"),
        (["train", "{file}", "--set", "data.sentinels=500"], "sentinels"),
        (["train", "{file}", "--set", "data.tokenizer=/nowhere.model"], "/nowhere.model"),
        (["train", "{file}", "--set", "model.sequence_length=200000"], "give more text or lower"),
        (["train", "{file}", "--set", "training.device=cuda"], "torch finds none"),
        (["compare", "{file}"], "has no grid of cells"),
        (["report", "/nowhere"], "give the folder of a study"),
        (["evaluate", "/nowhere"], "is no folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([a.format(file=file) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert error.count("megaarch:") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_dry_run_prints_what_a_study_takes_and_trains_nothing(raw, tmp_path, capsys):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {"name": "s", "budgets": [1e10], "cells": [{"name": "gpt", "preset": "gpt"}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(mine))
    assert main(["compare", str(path), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "gpt/base-1e+10-seed0" in out and "hours" in out
    assert not (tmp_path / "out").exists()
