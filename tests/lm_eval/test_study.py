"""Tasks of lm-evaluation-harness that a study scores its cells by."""

import copy
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install '.[lm-eval]'")

from megaarch.config import ConfigError  # noqa: E402
from megaarch.config.schema import Evaluation  # noqa: E402
from megaarch.errors import UserError  # noqa: E402
from megaarch.evaluation import tasks  # noqa: E402
from megaarch.lm_eval.model import MegaarchLM  # noqa: E402
from megaarch.study.evaluate_run import evaluate_run  # noqa: E402
from megaarch.study.run_study import compare  # noqa: E402
from tests.lm_eval.local import write_tasks  # noqa: E402

ITEMS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), ITEMS)


def overrides(folder, names, **more):
    given = {"tasks": names, "include_path": str(folder), "by_length": 0, "middles": 0} | more
    return [f"study.evaluation.{name}={json.dumps(value)}" for name, value in given.items()]


@pytest.mark.parametrize("preset", ["gpt", "t5", "glm"])
def test_scores_are_the_harness_s_own(preset, runs, folder):
    names = ["local_choice", "local_answer"]
    heldout, _ = evaluate_run(Path(runs(preset)), overrides(folder, names, shots=[1, 0]))
    harness = tasks.harness_of(Evaluation(tasks=names, include_path=str(folder)))
    for shots in (0, 1):
        wanted = lm_eval.simple_evaluate(
            model=MegaarchLM(run=runs(preset)),
            tasks=names,
            num_fewshot=shots,
            task_manager=harness.manager,
        )
        for name, metric in zip(names, ("acc", "exact_match"), strict=True):
            found = heldout.tasks[name].by_shots[str(shots)]
            assert found.accuracy == pytest.approx(wanted["results"][name][f"{metric},none"])
            assert found.right == [sample[metric] for sample in wanted["samples"][name]]
            assert found.items == ITEMS and len(found.right) == ITEMS
    choice, answer = (heldout.tasks[name] for name in names)
    assert choice.chance == 0.25 and choice.exact_match is None
    assert choice.right == choice.by_shots["1"].right  # the first number of shots ranks
    assert answer.chance is None and answer.exact_match == answer.accuracy


def test_a_cell_is_scored_at_its_end_and_another_question_is_another_study(raw, tmp_path):
    folder = write_tasks(tmp_path / "tasks", ITEMS)
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    asked = {"tasks": ["local_choice"], "include_path": str(folder), "task_items": 4, "points": 1}
    few = {"documents": 4, "curve_documents": 2, "prefix_tokens": 8, "continuation_tokens": 4}
    mine["study"] = {
        "name": "s",
        "budgets": [4e8],
        "cells": [{"name": "gpt", "preset": "gpt"}],
        "evaluation": asked | few | {"choices": 4, "middles": 0, "by_length": 0},
    }
    [cell] = compare(mine, tmp_path / "study", Console(quiet=True)).cells
    assert cell.heldout.tasks["local_choice"].items == 4
    tasks._harness.cache_clear()
    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join([lines[1], *lines[1:]]))
    with pytest.raises(ConfigError, match="study.evaluation.tasks"):
        compare(mine, tmp_path / "study", Console(quiet=True))


def test_what_cannot_be_scored_is_said_before_training(raw, folder, tmp_path):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {
        "name": "s",
        "budgets": [4e8],
        "cells": [{"name": "bert", "preset": "bert"}],
        "evaluation": {"tasks": ["local_answer"], "include_path": str(folder)},
    }
    with pytest.raises(ConfigError, match="cell bert: .*local_answer asks for generated text"):
        compare(mine, tmp_path / "study", Console(quiet=True))
    for names, said in (
        (["local_rolling"], "local_rolling measures bits_per_byte and none of acc"),
        (["nothing"], "nothing is neither a file or folder of tasks nor"),
    ):
        with pytest.raises(UserError, match=said):
            tasks.identity(Evaluation(tasks=names, include_path=str(folder)))
