"""`megaarch lm-eval` and the harness's tasks in `megaarch evaluate`."""

import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from megaarch import config
from megaarch.cli.main import main
from megaarch.errors import UserError
from megaarch.training.trainer import Trainer
from tests.lm_eval.local import write_tasks

NEEDED = "lm-eval is missing: pip install '.[lm-eval]'"
GROUPS = Path("configs/lm_eval")


@pytest.fixture(scope="module")
def run(raw, prepared, tmp_path_factory):
    mine = copy.deepcopy(raw)
    mine["training"]["steps"] = 1
    mine["logging"]["directory"] = str(tmp_path_factory.mktemp("run"))
    Trainer(config.resolve(mine), prepared).run()
    return mine["logging"]["directory"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local tasks, one of data on the hub, one that loads by a script, and a group."""
    found = write_tasks(tmp_path_factory.mktemp("tasks"))
    task = yaml.safe_load((found / "local_choice.yaml").read_text())
    far = {"task": "far", "dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    (found / "far.yaml").write_text(yaml.safe_dump(task | far))
    (found / "loader.py").write_text("")
    old = {"task": "old", "dataset_path": str(found / "loader.py"), "dataset_kwargs": {}}
    (found / "old.yaml").write_text(yaml.safe_dump(task | old))
    group = {"group": "local_group", "task": ["local_choice", "local_word"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": False}]
    (found / "local_group.yaml").write_text(yaml.safe_dump(group))
    return found


@pytest.fixture
def local(monkeypatch):
    """Leaves the thousands of tasks that lm_eval brings out of its index, which takes long."""
    pytest.importorskip("lm_eval", reason=NEEDED)
    from lm_eval.tasks import TaskManager

    index = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", index)


def lm_eval(run, folder, *more):
    model = ["--model", "megaarch", "--model_args", f"run={run}", "--batch_size", "4"]
    return main(["lm-eval", *model, "--include_path", str(folder), *more])


def test_the_command_is_lm_eval_with_our_model(run, folder, local, tmp_path, capsys):
    assert lm_eval(run, folder, "--tasks", "local_group", "--output_path", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "local_choice" in printed and "acc_norm" in printed
    [written] = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model_form"] == "objective"
    assert results["config"]["model_preset"] == "gpt"
    accuracies = [results["results"][name]["acc,none"] for name in ("local_choice", "local_word")]
    assert results["groups"]["local_group"]["acc,none"] == sum(accuracies) / 2


@pytest.mark.parametrize(
    "given, told",
    [
        (["--tasks", "far"], "a task's data cannot be reached"),
        (["--tasks", "old"], "Dataset scripts are no longer supported"),
        (["--tasks", "nonsense"], "Tasks not found: nonsense"),
        (["--tasks", "local_choice", "--model_args", "run=/nowhere"], "/nowhere is no folder"),
        (["--tasks", "local_choice", "--apply_chat_template"], "a run has no chat template"),
        (["--tasks", "local_answer", "--gen_kwargs", "num_beams=2"], "num_beams is not known here"),
    ],
)
def test_what_goes_wrong_is_one_sentence(given, told, run, folder, local, capsys):
    assert lm_eval(run, folder, *given) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megaarch: ")]
    assert len(said) == 1 and told in said[0]


@pytest.fixture
def planted(folder, tmp_path):
    """A folder with a task whose function, and one whose template, make the file `witness`."""
    task = yaml.safe_load((folder / "local_word.yaml").read_text())
    (tmp_path / "planted.py").write_text("open('witness', 'w')\ndef text(item): return 'x'\n")
    called = yaml.safe_dump(task | {"task": "called"}) + "doc_to_text: !function planted.text\n"
    (tmp_path / "called.yaml").write_text(called.replace("doc_to_text: '{{question}}'\n", ""))
    opened = "{{ cycler.__init__.__globals__.os.system('touch witness') }}"
    (tmp_path / "opened.yaml").write_text(
        yaml.safe_dump(task | {"task": "opened"} | {"doc_to_text": opened})
    )
    return tmp_path


@pytest.mark.parametrize("command", ["lm-eval", "evaluate"])
@pytest.mark.parametrize(
    "task, said", [("called", "runs the function planted.text"), ("opened", "is unsafe")]
)
def test_a_task_of_a_folder_executes_nothing(
    command, task, said, planted, run, local, monkeypatch, capsys
):
    monkeypatch.chdir(planted)
    if command == "lm-eval":
        code = lm_eval(run, planted, "--tasks", task)
    else:
        code = main(["evaluate", run, "--tasks", task, "--include-path", str(planted)])
    assert code == 2 and not (planted / "witness").exists()
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith("megaarch: ")]
    assert len(lines) == 1 and said in lines[0]


def test_a_function_of_a_task_runs_where_that_is_confirmed(planted, run, local, monkeypatch):
    monkeypatch.chdir(planted)
    assert lm_eval(run, planted, "--tasks", "called", "--confirm_run_unsafe_code") == 0
    assert (planted / "witness").exists()


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_a_tokenizer_with_code_of_its_own_is_not_run(answer, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from megaarch.lm_eval.request_forms import _tokenizer_of

    there = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(there))
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'witness')!r}, 'w')\nclass Mine: pass\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(UserError, match="custom code"):
        _tokenizer_of(tmp_path)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "arguments", [["lm-eval", "--help"], ["evaluate", "RUN", "--tasks", "piqa"]]
)
def test_without_lm_eval_it_says_how_to_install_it(arguments, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([run if each == "RUN" else each for each in arguments]) == 2
    assert "pip install 'megaarch[lm-eval]'" in capsys.readouterr().err


def test_evaluate_takes_paths_and_names(run, folder, local, tmp_path, capsys):
    wording = {"name": "plain", "prompt": "{{ i }} ||| {{ answer_choices[0] }}"}
    task = {"summary": "?", "data": {"train": "items", "test": "items"}}
    task["wordings"] = [wording | {"choices": "river ||| stone"}]
    (tmp_path / "items").write_text('{"i": 1}\n{"i": 2}\n')
    (tmp_path / "follows.task.yaml").write_text(json.dumps(task))
    ours = [str(tmp_path / "follows.task.yaml")]
    common = ["--num-fewshot", "1", "--include-path", str(folder)]
    given = ["evaluate", run, "--tasks", "local_choice", *ours, *common]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tasks"]) == ["follows"]
    by_metric = {each["metric"]: each for each in found["harness"]}
    assert by_metric.keys() == {"acc", "acc_norm"}

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megaarch.lm_eval.model import MegaarchLM

    wanted = simple_evaluate(
        model=MegaarchLM(run=run),
        tasks=["local_choice"],
        num_fewshot=1,
        task_manager=TaskManager(include_path=str(folder)),
    )
    metrics = wanted["results"]["local_choice"]
    for name, each in by_metric.items():
        assert each["task"] == "local_choice" and each["value"] == metrics[f"{name},none"]
        assert each["error"] == metrics[f"{name}_stderr,none"]
    assert main(given) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["local_choice", "acc_norm"] for line in printed)


def test_the_pages_own_task_runs_as_it_stands(run, local, tmp_path, monkeypatch, capsys):
    page = Path("docs/tasks.md").read_text().partition("### A task of your own")[2]
    lines = re.findall(r"^    (.*)$", page.partition("\n### ")[0], re.MULTILINE)
    first = next(n for n, line in enumerate(lines) if line.startswith("megaarch "))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-e"], input="\n".join(lines[:first]), text=True, check=True)
    assert len(lines) - first == 2
    for line in lines[first:]:
        assert main(line.replace("runs/demo/gpt", run).split()[1:]) == 0
        assert re.search(r"colours.*\bacc\b", capsys.readouterr().out)


def test_evaluate_says_which_name_is_unknown(run, folder, local, capsys):
    assert main(["evaluate", run, "--tasks", "folows", "--include-path", str(folder)]) == 2
    assert "folows is neither a file or folder of tasks nor" in capsys.readouterr().err


def test_the_groups_name_tasks_that_the_harness_has():
    pytest.importorskip("lm_eval", reason=NEEDED)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(GROUPS))
    for file in GROUPS.glob("*.yaml"):
        group = yaml.safe_load(file.read_text())
        assert group["group"] == file.stem in manager.all_tasks
        assert set(group["task"]) <= set(manager.all_tasks)
