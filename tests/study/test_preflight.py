"""A cell that can never run is named, with its cause, before any cell has started."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megaarch.cli import main
from megaarch.config import ConfigError
from megaarch.study.costs import dry_run
from megaarch.study.describe import describe_all
from megaarch.study.folder import StudyFolder
from megaarch.study.preflight import check
from megaarch.study.run_study import compare

pytestmark = pytest.mark.slow


@pytest.fixture
def study(raw):
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["study"] = {
        "budgets": [1e9],
        "cells": [{"name": "gpt", "preset": "gpt"}],
        "evaluation": {"prefix_tokens": 12, "continuation_tokens": 6, "middles": 4},
    }
    return mine


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"input": f"what is {i} and {i}?", "target": f"it is {2 * i}."} for i in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


WRONG = [
    ({"preset": "t5", "set": {"model.sequence_length": 400}}, "data.sentinels"),
    ({"preset": "bert", "set": {"model.sequence_length": 20}}, "lower study.evaluation.prefix_tok"),
    ({"preset": "t5", "set": {"model.sequence_length": 2}}, "rows of 2 tokens are too short"),
    (
        {"preset": "t5", "set": {"data.objective": "prefix_lm", "model.target_length": 4}},
        "tokens in the decoder and prefix_lm was trained on rows of 3: lower study.evaluation.prefix_tok",
    ),
    (
        {"preset": "gpt", "set": {"model.sequence_length": 200000, "data.document_masks": False}},
        "give more text or lower",
    ),
    ({"preset": "gpt", "set": {"training.global_batch_tokens": 40}}, "40 tokens are less than the"),
    (
        {"preset": "t5", "from": "gpt", "set": {"model.encoder_layers": 1}},
        "cannot start from the weights of gpt: a decoder's layers become those of each stack of an "
        "encoder-decoder, and there are 2 there and 1 and 2 here",
    ),
    (
        {"preset": "t5", "from": "gpt", "set": {"model.kv_heads": 4}},
        "cannot start from the weights of gpt: layers.0.attention.qkv.weight is (64, 32) there and "
        "(96, 32) here",
    ),
    (
        {"preset": "gpt", "from": "gpt", "set": {"model.layers": 3}},
        "layers.2.attention_norm.weight",
    ),
    ({"preset": "gpt", "set": {"data.source": "/nowhere.jsonl"}}, "/nowhere.jsonl does not exist"),
    ({"preset": "gpt", "set": {"training.device": "cuda"}}, "torch finds none"),
    ({"preset": "gpt", "set": {"parallel.tensor_parallel": 3}}, "4 heads do not divide among"),
    ({"preset": "gpt", "set": {"training.optimizer": "apex_adam"}}, "apex"),
    (
        {"preset": "bart", "set": {"model.position_encoding": "learned"}},
        "model.learned_positions: 48 positions are fewer than the 56 tokens of a row that denoising",
    ),
]


@pytest.mark.parametrize(("cell", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_a_cell_that_cannot_run_is_named_before_any_starts(cell, said, study, tmp_path):
    study["study"]["cells"].append({"name": "wrong"} | cell)
    with pytest.raises(ConfigError) as told:
        compare(study, tmp_path, Console(quiet=True))
    assert all(problem.startswith("cell wrong: ") for problem in told.value.problems)
    assert said in str(told.value)
    assert not (tmp_path / "cells").exists()


RELATIVE = {"model.position_encoding": "relative", "model.relative_buckets": 8}
LEARNED = {"model.position_encoding": "learned", "model.position_offset": 0}
ANOTHER_PLACE = {
    "axes": (
        "gpt",
        {},
        "glm",
        {},
        "the number of position axes is 1 there and 2 here, and RoPE divides the frequencies of a "
        "head among them",
    ),
    "fewer": (
        "glm",
        LEARNED,
        "prefix_lm",
        LEARNED,
        "the number of position axes is 2 there and 1 here",
    ),
    "stacks": (
        "gpt",
        RELATIVE,
        "t5",
        RELATIVE,
        "the encoder's rule of relative buckets is absent there and bidirectional here",
    ),
    "none": (
        "gpt",
        {},
        "gpt",
        {"model.position_encoding": "none"},
        "model.position_encoding is rope there and none here",
    ),
    "rule": (
        "gpt",
        RELATIVE,
        "xlnet",
        RELATIVE,
        "the decoder's rule of relative buckets is unidirectional there and bidirectional here",
    ),
    "offset": (
        "gpt",
        LEARNED | {"model.learned_positions": 50},
        "gpt",
        LEARNED | {"model.learned_positions": 48, "model.position_offset": 2},
        "model.position_offset is 0 there and 2 here",
    ),
}


@pytest.mark.parametrize("case", ANOTHER_PLACE)
def test_weights_to_which_positions_mean_something_else_are_refused(case, study, tmp_path):
    preset, of_parent, own_preset, own, said = ANOTHER_PLACE[case]
    study["study"]["cells"] = [
        {"name": "parent", "preset": preset, "set": of_parent},
        {"name": "child", "preset": own_preset, "from": "parent", "set": own},
    ]
    with pytest.raises(ConfigError) as told:
        compare(study, tmp_path, Console(quiet=True))
    assert told.value.problems == [
        "cell child: cannot start from the weights of parent, to which positions mean something "
        f"else: {said}"
    ]


def test_a_prefix_decoder_may_start_from_a_causal_one_with_a_relative_bias(study):
    """Non-causal adaptation, as Wang et al. 2022 did it."""
    study["study"]["cells"] = [
        {"name": "causal", "preset": "gpt", "set": RELATIVE},
        {"name": "adapted", "preset": "prefix_lm", "from": "causal", "set": RELATIVE},
    ]
    check(StudyFolder.open(study, Path("runs")))


@pytest.mark.parametrize("positions", [{}, LEARNED | {"model.learned_positions": 48}])
def test_an_encoder_decoder_may_start_from_a_decoder_and_glm_from_gpts_table(positions, study):
    study["study"]["cells"] = [
        {"name": "gpt", "preset": "gpt", "set": positions},
        {"name": "t5", "preset": "t5", "from": "gpt", "set": positions},
    ]
    if positions:
        study["study"]["cells"] += [
            {"name": "glm", "preset": "glm", "from": "gpt", "set": positions}
        ]
    check(StudyFolder.open(study, Path("runs")))


def test_all_cells_at_fault_are_told_once_each_and_a_dry_run_tells_them_too(study, tmp_path):
    study["study"] |= {"seeds": [0, 1], "budgets": [1e9, 2e9]}
    study["study"]["sizes"] = [{"name": "s", "layers": 1}, {"name": "l", "layers": 2}]
    study["study"]["cells"] += [
        {"name": "a", "preset": "t5", "set": {"model.sequence_length": 400}},
        {"name": "b", "preset": "gpt", "from": "gpt", "set": {"model.bias": True}},
    ]
    with pytest.raises(ConfigError) as told:
        dry_run(study, tmp_path)
    named = [problem.split(":")[0] for problem in told.value.problems]
    assert named == ["cell a (s)", "cell b (s)", "cell a (l)", "cell b (l)"]


def test_a_dry_run_tells_a_mistake_in_the_studys_text_once(study, tmp_path):
    study["study"]["cells"].append({"name": "t5", "preset": "t5"})
    study["data"]["source"] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError) as told:
        dry_run(study, tmp_path)
    assert str(told.value).count("nowhere.jsonl does not exist") == 1


def test_dry_run_and_describe_take_a_cells_own_data(study, pairs, tmp_path):
    own = {"data.objective": "supervised", "data.source": pairs}
    study["study"]["cells"].append({"name": "pairs", "preset": "t5", "set": own})
    shown = dry_run(study, tmp_path).splitlines()
    epochs = {line.split("/")[0]: float(line.split()[3]) for line in shown if "/" in line}
    assert epochs["pairs"] > 2 * epochs["gpt"] > 0  # 200 short pairs are fewer rows than the text
    text, supervised = describe_all(study)
    assert text.lengths["decoder"] == 48
    lengths = supervised.lengths
    assert 30 < lengths["encoder"] <= 48 and 10 < lengths["targets"] <= 48, "packed pairs"
    assert supervised.flops_per_row > 0
    study["model"]["preset"] = "t5"
    study["data"] |= {"objective": "supervised", "source": pairs}
    del study["study"]
    (alone,) = describe_all(study)
    assert alone.lengths["encoder"] > 30


def test_a_dry_run_counts_cells_of_several_processes_and_times_the_others(study, tmp_path):
    layout = {"parallel.tensor_parallel": 2, "parallel.data_parallel_shard": 2}
    study["study"]["cells"].append({"name": "wide", "preset": "gpt", "set": layout})
    lines = dry_run(study, tmp_path).splitlines()
    gpt, wide = (line.split()[1:] for line in lines[1:3])
    assert wide[:4] == gpt[:4]  # a layout changes neither steps nor tokens, epochs or disk
    assert float(gpt[4]) >= 0 and wide[4] == "-"
    assert lines[4].startswith("cells of one process") and "megaarch plan" in lines[5]
    # as many steps as the run then takes
    ran = compare(
        study | {"study": study["study"] | {"cells": study["study"]["cells"][:1]}},
        tmp_path,
        Console(quiet=True),
    )
    assert abs(ran.cells[0].steps - int(gpt[0])) <= 1


def test_a_dry_run_adds_the_sweep_and_reads_the_file_of_one(study, tmp_path):
    study["study"]["tune"] = {"learning_rates": [1e-3, 2e-3], "budget": 0.5}
    training, sweep = dry_run(study, tmp_path).splitlines()[-2:]
    assert training.startswith("all cells") and sweep.startswith("their sweep")
    assert float(sweep.split()[-1]) == pytest.approx(float(training.split()[-1]), abs=2e-3)
    del study["study"]["tune"]
    study["study"]["rates"] = str(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="study.rates: cannot read"):
        dry_run(study, tmp_path)


def test_a_mistake_in_a_cell_is_one_sentence_of_the_command(study, tmp_path, capsys):
    study["study"]["cells"].append(
        {"name": "t5", "preset": "t5", "set": {"model.sequence_length": 400}}
    )
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    assert main(["compare", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "megaarch: cell t5: sentinel 21 asked for" in capsys.readouterr().err


def test_a_task_whose_answers_a_cell_cannot_generate_is_told_before_any_cell_trains(
    study, tmp_path
):
    """A study of BERT trained all cells before it and then ended, without a word of which cell or task."""
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    wording = {"name": "w", "prompt": "{{ text }} ||| yes"}
    said = {"summary": "s", "data": {"test": "items.jsonl"}, "wordings": [wording]}
    (tmp_path / "free.task.yaml").write_text(json.dumps(said))
    study["study"]["evaluation"]["tasks"] = [str(tmp_path / "free.task.yaml")]
    divided = {"parallel.pipeline_parallel": 2}
    study["study"]["cells"] += [
        {"name": "bert", "preset": "bert"},
        {"name": "divided", "preset": "gpt", "set": divided},
    ]
    with pytest.raises(ConfigError) as told:
        check(StudyFolder.open(study, tmp_path))
    asked = "study.evaluation.tasks: free (wordings without choices) asks for generated text, and"
    assert [problem.partition(asked)[::2] for problem in told.value.problems] == [
        ("cell bert: ", " a model of masked_lm generates none: leave out the task or the cell"),
        (
            "cell divided: ",
            " pipeline and context parallelism do not generate: give choices, or evaluate the run in one "
            "process",
        ),
    ]


def test_a_task_that_cannot_be_asked_is_told_before_any_cell_trains(study, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "one", "label": 0}))
    said = {
        "summary": "a test",
        "data": {"test": "items.jsonl"},
        "wordings": [{"name": "w", "prompt": "{{ text }} ||| x", "choices": "x ||| y"}],
    }
    task = tmp_path / "a.task.yaml"
    task.write_text(json.dumps(said))
    study["study"]["evaluation"] |= {"tasks": [str(task)], "shots": 4}
    with pytest.raises(ConfigError, match="4 examples were asked for, and it has 0 items"):
        check(StudyFolder.open(study, tmp_path / "s"))
    study["study"]["evaluation"]["shots"] = 0
    check(StudyFolder.open(study, tmp_path / "s"))
    said["wordings"][0]["choices"] = f"x ||| {'y ' * 40}"
    task.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="cell gpt: an item takes .* tasks with longer answers"):
        check(StudyFolder.open(study, tmp_path / "s"))


def test_a_cell_that_is_not_scored_yet_takes_other_yardsticks(study, tmp_path):
    folder = StudyFolder.open(study, tmp_path / "s")
    [cell] = folder.cells
    signature = folder.identity(cell)
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(json.dumps({"signature": signature, "key": cell.key}))
    study["study"]["evaluation"]["middles"] = 8
    again = StudyFolder.open(study, tmp_path / "s")
    assert again.finished(again.cells[0]) is None
    study["training"]["learning_rate"] = 1e-4
    other = StudyFolder.open(study, tmp_path / "s")
    with pytest.raises(ConfigError, match="training.learning_rate was"):
        other.finished(other.cells[0])


@pytest.mark.parametrize("listed", [True, False], ids=["chosen", "generated"])
def test_an_answer_that_no_decoder_holds_is_named_before_any_cell_trains(
    listed, study, pairs, tmp_path
):
    """With the eos that a finetuned cell's answers end in."""
    words = "the river opens the garden near the stone"
    for name in ("train", "test"):
        lines = [json.dumps({"asked": f"What is {i}?", "answer": words}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    wording = {"name": "it", "prompt": "{{ asked }} ||| {{ answer }}"}
    if listed:
        wording["choices"] = f"no ||| {words}"
    said = {"summary": "what?", "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    path = tmp_path / "own.task.yaml"
    path.write_text(json.dumps(said | {"wordings": [wording]}))
    study["study"]["evaluation"] |= {"tasks": [str(path)], "middles": 0}
    folder = StudyFolder.open(study, tmp_path)
    answer = len(folder.text.tokenizer.encode(words))
    assert answer > 8
    for length, fits in ((answer + 1, True), (answer, False)):
        given = {
            "data.source": pairs,
            "model.target_length": length,
            "data.objective": "supervised",
        }
        study["study"]["cells"] = [{"name": "t5", "preset": "t5", "set": given}]
        if fits:
            check(StudyFolder.open(study, tmp_path))
        else:
            with pytest.raises(
                ConfigError, match="cell t5: an item takes a row of .* in the decoder"
            ):
                check(StudyFolder.open(study, tmp_path))
