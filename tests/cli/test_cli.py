"""The command as a person meets it: help, exit codes, one clear sentence for a mistake."""

import copy
import errno
import json
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed

from megaarch import __version__, config
from megaarch.cli import compare, describe, main
from megaarch.distributed.heartbeat import LOST
from megaarch.errors import StorageError, UserError
from megaarch.study import lock
from megaarch.study.results import Results
from tests.conftest import made_up_text
from tests.study.example_results import cell_at, example_results
from tests.tools.run import tool


@pytest.fixture
def file(raw, tmp_path):
    """A configuration file of a tiny run that logs below tmp_path."""
    mine = copy.deepcopy(raw)
    mine["logging"]["directory"] = str(tmp_path / "run")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(mine))
    return path


@pytest.mark.parametrize(("value", "joined"), [("--", True), ("", True), ("", False)])
@pytest.mark.parametrize(
    "command",
    [
        ["megaarch", "report", "x", "--figures"],
        ["megaarch", "fit", "--points"],
        ["preprocess", "--output"],
        ["benchmark", "plans", "--output"],
        ["megaarch", "generate", "x", "--stop"],
    ],
)
def test_an_empty_value_and_two_dashes_are_no_value(command, value, joined, capsys):
    program, *arguments, option = command
    arguments += [f"{option}={value}"] if joined else [option, value]
    with pytest.raises(SystemExit, match="2"):
        main(arguments) if program == "megaarch" else tool(program)(arguments)
    assert f"argument {option}: expected a value, not {value!r}" in capsys.readouterr().err


def test_two_dashes_are_no_prompt(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "x", "--prompt=--"])
    assert "argument --prompt: expected a value, not '--'" in capsys.readouterr().err


def test_help_of_every_command(capsys):
    commands = (
        "train",
        "compare",
        "evaluate",
        "report",
        "describe",
        "plan",
        "plan-inference",
        "dry-run",
        "submit",
        "status",
    )
    for command in ([], *([name] for name in commands)):
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
    text = "".join(json.dumps({"text": made_up_text(i, 24)}) + "\n" for i in range(80, 120))
    (tmp_path / "other.jsonl").write_text(text)
    other = f"data.source={tmp_path / 'other.jsonl'}"
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--set", other]) == 0
    elsewhere = json.loads(capsys.readouterr().out)
    assert 0 < elsewhere["continuation_bits_per_byte"] != found["continuation_bits_per_byte"]


def test_train_tells_what_is_given_and_has_no_effect(file, caplog):
    assert main(["train", str(file), "--set", "training.steps=1", "training.decay=0.5"]) == 0
    told = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert told == ["training.decay: 0.5 has no effect, for training.schedule is cosine"]


def test_evaluate_prints_the_panel(file, tmp_path, capsys):
    """Each yardstick's value stands on its line, and what could not be scored is told."""
    given = ["--set", "training.steps=2", "model.preset=prefix_lm", "data.objective=fill_in_middle"]
    assert main(["train", str(file), *given]) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["evaluate", run]) == 0
    printed = capsys.readouterr()
    lines = {line.split()[0]: line for line in printed.out.splitlines() if line[:1].strip()}
    lines |= {line.split()[0]: line for line in printed.out.splitlines() if "token" in line}
    for name, key in (
        ("continuation", "continuation_bits_per_byte"),
        ("middle", "middle_bits_per_byte"),
        ("choice", "choice_accuracy"),
    ):
        assert f"{found[key]:.4f}" in printed.out and name in lines
    assert list(found["continuation"]) == ["1", "2", "4", "8", "16"]
    for length, entry in found["continuation"].items():
        low, high = entry["prefix_gain_interval"]
        assert f"{entry['bits_per_byte']:.4f}" in lines[length]
        assert f"{entry['prefix_gain']:.4f}  {low:.4f} to {high:.4f}" in lines[length]
    assert ("not above 0" in printed.out) is not found["reads_prefix"]
    assert "Continuations of 32 tokens are left out" in printed.err


def test_text_is_prepared_ahead_of_a_run(file, tmp_path, capsys):
    assert main(["train", str(file), "--prepare"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"[\d,]+ tokens to train on, prepared in \S+\n", said), said
    folder = Path(said.split()[-1])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before and not (tmp_path / "run").exists()
    assert main(["train", str(file), "--set", "training.steps=1"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


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
        (["train", "{file}", "--set", "logging.directory="], "logging.directory: must be text"),
        (["train", "{file}", "--set", "model.hidden_size=4000000000"], "must be at most 1048576"),
        (["train", "{file}", "--set", "model.hidden_size=1048576"], "this model needs"),
        (["train", "{file}", "--set", "model.layers=100000000000000000000"], "at most 1024"),
        (["describe", "{file}", "--set", "model.layers=100000000000000000000"], "at most 1024"),
        (["dry-run", "{file}", "--set", "model.layers=100000"], "at most 1024"),
        (["train", "{file}", "--set", "training.micro_batch_size=1000000000"], "at most 65536"),
        (["train", "{file}", "--set", "data.workers=100000"], "at most 1024"),
        (["train", "{file}", "--set", f"model.head_size={1 << 63}"], "at most 1048576"),
        (["train", "{file}", "--set", f"model.segments={1 << 63}"], "at most 1048576"),
        (["train", "{file}", "--set", f"model.position_offset={1 << 63}"], "at most 1048576"),
        (["train", "{file}", "--set", f"model.relative_max_distance={1 << 63}"], "at most 1048576"),
        (["train", "{file}", "--set", "logging.directory=/proc/run"], "/proc/run"),
        (["train", "{file}", "--set", ".=3"], "--set takes section.name=value, not '.=3'"),
        (["train", "{file}", "--set", 'data.source="a\\0b"'], "text without control characters"),
        (
            ["train", "{file}", "--set", "model.preset=t5", "model.target_length=1"],
            "model.target_length: rows of 1 tokens are too short for span_corruption",
        ),
        (
            ["train", "{file}", "--set", "model.preset=t5", "data.noise_density=0.999"],
            "at most 0.9, not 0.999",
        ),
        (["compare", "{file}"], "has no grid of cells"),
        (["compare", "{file}", "--cell", "gpt"], "has no grid of cells"),
        (["submit", "{file}", "--nodes", "2", "--time", "60"], "has no grid of cells"),
        (["status", "/nowhere"], "is no study's folder"),
        (["report", "/nowhere"], "give the folder of a study"),
        (["report", "/nowhere", "--gather"], "is no study's folder"),
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


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough values to unpack"),
        OSError("cannot load library"),
        OSError(errno.ECHILD, os.strerror(errno.ECHILD)),
        RuntimeError("shape mismatch"),
        KeyError("loss"),
    ],
    ids=repr,
)
def test_a_bug_shows_its_traceback_and_where_to_report_it(error, file, capsys, monkeypatch):
    def broken(options):
        raise error

    monkeypatch.setattr(describe, "run", broken)
    assert main(["describe", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "in broken" in shown
    assert shown.splitlines()[-1].startswith(f"megaarch: this is a bug of megaarch {__version__}")
    with pytest.raises(type(error)):
        main(["--debug", "describe", str(file)])


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (distributed.DistBackendError("NCCL error: remote process exited"), "the network"),
        (distributed.DistStoreError("timed out: 1/2 clients joined"), "the network"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error", 214), "a GPU"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_network_or_gpu_sends_the_job_back_to_the_queue(
    error, part, file, capsys, monkeypatch
):
    def broken(options):
        raise error

    monkeypatch.setattr(describe, "run", broken)
    assert main(["describe", str(file)]) == LOST
    shown = capsys.readouterr().err
    assert "in broken" in shown and "this is a bug" not in shown
    assert shown.splitlines()[-1].startswith(f"megaarch: {part} failed, seen from ")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("a: give b"), "a: give b"),
        (config.ConfigError(["a: is wrong"]), "a: is wrong"),
        (StorageError("the disk gave other bytes"), "the disk gave other bytes"),
        (FloatingPointError("3 steps were not finite"), "3 steps were not finite"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), "/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("CUDA out of memory"), "out of memory: lower the model's sizes"),
        (MemoryError(), "out of memory: lower the model's sizes"),
    ],
    ids=repr,
)
def test_what_a_user_can_mend_is_one_sentence(error, sentence, file, capsys, monkeypatch):
    def wrong(options):
        raise error

    monkeypatch.setattr(describe, "run", wrong)
    assert main(["describe", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megaarch: ") and sentence in line


@pytest.mark.parametrize(
    ("command", "continues"),
    [
        (["train", "x"], True),
        (["compare", "x"], True),
        (["compare", "x", "--cell", "a"], True),
        (["compare", "x", "--dry-run"], False),
        (["compare", "x", "--prepare"], False),
        (["describe", "x"], False),
        (["plan", "x", "--gpus", "1"], False),
        (["report", "x"], False),
        (["evaluate", "x"], False),
        (["generate", "x", "--prompt", "a"], False),
    ],
    ids=str,
)
def test_only_a_command_that_continues_says_so_when_interrupted(
    command, continues, capsys, monkeypatch
):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["megaarch.cli.main"].COMMANDS[command[0]], "run", interrupted)
    assert main(command) == 130
    more = "; run the same command again to continue" if continues else ""
    assert capsys.readouterr().err == f"megaarch: interrupted{more}\n"


def test_two_runs_in_one_directory_are_refused(file, raw, capsys):
    directory = Path(yaml.safe_load(file.read_text())["logging"]["directory"])
    with lock.alone(directory, "run"):
        assert main(["train", str(file)]) == 2
    assert "another process is running this run" in capsys.readouterr().err
    assert not (directory / "checkpoints").exists()


@pytest.mark.parametrize(
    "written", ["{}", "[]", "3", "null", '{"cells": 3}', '{"format": 99}', "{"]
)
def test_a_results_json_that_is_none_is_one_sentence(written, tmp_path, capsys):
    (tmp_path / "results.json").write_text(written)
    for form in ([], ["--text"], ["--csv"], ["--latex"]):
        assert main(["report", str(tmp_path), *form]) == 2
        error = capsys.readouterr().err
        assert "results.json is not" in error and "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("presets", "seeds", "cell"),
    [
        (["bert", "gpt"], [0], "gpt"),
        (["gpt"], [0, 1], "gpt/base-1e+07-seed?"),  # the better one
        (["bert"], [0], None),
    ],
)
def test_compare_ends_with_a_command_that_generates(
    presets, seeds, cell, raw, prepared, tmp_path, capsys
):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    cells = [{"name": preset, "preset": preset} for preset in presets]
    mine["study"] = {"name": "s", "budgets": [1e7], "seeds": seeds, "cells": cells}
    mine["study"]["evaluation"] = {"prefix_tokens": 12, "continuation_tokens": 6}
    path, folder = tmp_path / "study.yaml", tmp_path / "a folder"
    path.write_text(yaml.safe_dump(mine))
    assert main(["compare", str(path), "--output", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    if cell is None:
        assert lines[-1] == str(folder / "results.json")
        return
    assert lines[-4:-1] == [str(folder / "report.html"), str(folder / "results.json"), ""]
    program, command, run, *arguments = shlex.split(lines[-1])
    assert (program, command, arguments) == (
        "megaarch",
        "generate",
        ["--prompt", "The", "--max-tokens", "32"],
    )
    assert fnmatch(run, str(folder / cell)) and main([command, run, *arguments]) == 0


def test_the_command_at_the_end_of_a_study_takes_a_cell_that_reads_its_prefix():
    cells = [cell_at(name, bits, bits, bits) for name, bits in (("a", 2.0), ("b", 2.2), ("c", 2.5))]
    cells[0]["heldout"]["reads_prefix"] = False
    tuned = cell_at("tuned", 1.0, 1.0, 1.0, objective="supervised")
    results = Results.of(example_results([tuned, *reversed(cells)]))
    assert compare.generating(results, Path("runs/s")) == Path("runs/s/b")


def test_dry_run_prints_what_a_study_takes_and_trains_nothing(raw, tmp_path, capsys):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {"name": "s", "budgets": [1e10], "cells": [{"name": "gpt", "preset": "gpt"}]}
    mine["study"]["evaluation"] = {"prefix_tokens": 12, "continuation_tokens": 6}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(mine))
    assert main(["compare", str(path), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "gpt/base-1e+10-seed0" in out and "hours" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["pydantic", "torch"])  # of all commands, and of their work
@pytest.mark.parametrize(
    "start", [["-m", "megaarch"], ["-c", "import megaarch.__main__ as m, sys; sys.exit(m.main())"]]
)
def test_ctrl_c_while_modules_load_ends_the_command(module, start, tmp_path):
    """Extension modules turn a KeyboardInterrupt into another error, or swallow it."""
    stub = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept: raise ImportError"
    (tmp_path / f"{module}.py").write_text(stub)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    found = subprocess.run(
        [sys.executable, *start, "generate", "/nowhere", "--prompt", "a"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (130, "megaarch: interrupted\n")
