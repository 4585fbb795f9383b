"""What generation is planned to cost: times by their formula, and the command as a person sees it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megaarch import config
from megaarch.cli import main
from megaarch.planner.hardware import gpu, hardware
from megaarch.planner.hardware_rates import Cluster
from megaarch.planner.inference import InferenceCost, Lengths, costs

CLUSTER = Cluster(gpu("h100"))
D, H, HKV, DH, F, L, V = 2048, 32, 2, 64, 8192, 2, 8192


def raw_of(*presets):
    model = {"hidden_size": D, "heads": H, "kv_heads": HKV, "feed_forward_size": F, "layers": L}
    model |= {"vocabulary_size": V, "sequence_length": 4096, "tied_embedding": False}
    if len(presets) == 1:
        return {"model": {"preset": presets[0]} | model}
    cells = [{"name": preset, "preset": preset} for preset in presets]
    return {"model": model, "study": {"budgets": [1e15, 1e16], "seeds": [0, 1], "cells": cells}}


def found(lengths, *presets):
    return dict(costs(raw_of(*presets), CLUSTER, lengths))


def gpt_seconds(rows, new, kept, pairs, row):
    """Returns the seconds that FLOPs and bytes take: a call of GPT on so many rows, by the formulas of
    docs/inference.md."""
    constants, tokens = hardware().constants, rows * new
    projections = D * (H + 2 * HKV) * DH + H * DH * D
    work = 2 * tokens * L * (projections + 3 * D * F) + 2 * rows * D * V
    attended = 4 * L * H * DH * rows * pairs
    compute = work / (CLUSTER.gpu.product * 1e12 * constants.product)
    compute += attended / (CLUSTER.gpu.attention * 1e12) * (1 + constants.attention_length / row)
    weights = L * (projections + 3 * D * F + 2 * D) + D + D * V + tokens * D
    cache = rows * L * 2 * HKV * DH * (kept + new)
    activations = tokens * L * (D + (H + 2 * HKV) * DH + H * DH + D + D + 2 * F + F + D)
    activations += tokens * L * 2 * H * DH + rows * (D + V)
    moved = 2 * (weights + cache + activations)
    return compute, moved / (CLUSTER.gpu.bandwidth * 1e9 * constants.bandwidth)


@pytest.mark.parametrize(("rows", "limit"), [(1, "bandwidth"), (4096, "compute")])
def test_a_call_takes_the_longer_of_its_two_times(rows, limit):
    prompt, answer = 100, 9
    (turn,) = found(Lengths(prompt, answer, 1, rows), "gpt")["gpt"].dialogues["recompute"]
    first = gpt_seconds(rows, prompt + 1, 0, (prompt + 1) * (prompt + 2) // 2, prompt + 1)
    assert turn.first_token_seconds == pytest.approx(max(first))
    steps = [
        gpt_seconds(rows, 1, kept, kept + 1, float("inf"))
        for kept in range(prompt + 1, prompt + answer)
    ]
    assert turn.token_seconds == pytest.approx(sum(map(max, steps)) / (answer - 1))
    assert turn.limit == limit
    moved = sum(b for _, b in [first, *steps]) * CLUSTER.memory_rate
    assert turn.moved_bytes == pytest.approx(moved)


def test_what_a_dialogue_saves_depends_on_the_mask():
    models = found(Lengths(64, 16, 4), "gpt", "prefix_lm", "t5")

    def flops(name):
        each = models[name].dialogues
        return {policy: sum(turn.flops for turn in turns) for policy, turns in each.items()}

    gpt, prefix, t5 = map(flops, ("gpt", "prefix_lm", "t5"))
    assert gpt["reuse"] < gpt["recompute"]
    assert prefix["turn_blocks"] < prefix["reuse"] == prefix["recompute"]
    assert t5["reuse"] == t5["recompute"] and set(t5) == {"recompute", "reuse"}


def test_what_does_not_fit_says_so():
    for memory, fits in ((80, True), (0.05, False)):
        cluster = Cluster(CLUSTER.gpu.model_copy(update={"memory": memory}))
        ((_, cost),) = costs(raw_of("gpt"), cluster, Lengths(8, 8, 1))
        assert isinstance(cost, InferenceCost) and cost.fits(cluster) is fits


def run(tmp_path, capsys, raw, *more):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    code = main(["plan-inference", str(path), *more])
    return code, *capsys.readouterr()


def test_the_command_prints_each_model_of_a_study_once(tmp_path, capsys):
    raw = raw_of("gpt", "prefix_lm", "bert")
    code, out, _ = run(tmp_path, capsys, raw, "--prompt", "50", "--turns", "9")
    assert code == 0
    first, dialogues, left_out = out.split("\n\n")[1:]
    assert [line.split()[0] for line in first.splitlines()[2:]] == ["gpt", "prefix_lm"]
    rows = [line.split("  ")[0] for line in dialogues.splitlines()[2:]]
    assert rows == ["gpt", "gpt", "prefix_lm", "prefix_lm"]
    assert "recompute, reuse" in dialogues and "turn blocks" in dialogues
    assert dialogues.splitlines()[1].split()[2:6] == ["1", "4", "6", "9"]
    assert left_out.startswith("left out: bert: a model of masked_lm cannot generate")
    assert all(len(line) <= 110 for line in out.splitlines())
    code, out, _ = run(tmp_path, capsys, raw, "--cell", "p*", "--turns", "1")
    assert code == 0 and "prefix_lm" in out and "gpt" not in out and "policy" not in out


@pytest.mark.parametrize("scale", [1, 64])
def test_figures_of_models_of_any_size_stand_apart(scale, tmp_path, capsys):
    raw = raw_of("gpt", "unilm", "t5")
    raw["model"] |= {"hidden_size": 32 * scale, "heads": 2 * scale, "feed_forward_size": 48 * scale}
    raw["model"]["head_size"] = 16
    more = ("--prompt", "12", "--answer", "9", "--turns", "50")
    _, out, _ = run(tmp_path, capsys, raw, *more)
    for table, figures in zip(out.split("\n\n")[1:], (7, 2 * 4 + 2), strict=True):
        for row in table.splitlines()[2:]:
            shown = re.sub("^\\S+|bandwidth|recompute|, |reuse", "", row).split()
            assert len(shown) == figures, row
            assert all(re.fullmatch(r"[\d,]+(\.\d+)?", figure) for figure in shown)


def test_json_holds_every_turn(tmp_path, capsys):
    more = ("--prompt", "50", "--answer", "1", "--turns", "7", "--gpu", "a100", "--json")
    code, out, _ = run(tmp_path, capsys, raw_of("t5", "bert"), *more)
    found = json.loads(out)
    t5, bert = found["models"]
    assert code == 0 and found["gpu"] == "a100" and "cannot generate" in bert["refused"]
    assert [len(turns) for turns in t5["dialogues"].values()] == [7, 7]
    assert t5["dialogues"]["reuse"][0]["token_seconds"] is None and t5["fits"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--prompt", "0"), "--prompt 0: is not a number from 1"),
        (("--batch", "-1"), "--batch -1: is not a number from 1"),
        (("--turns", "65"), "--turns 65: is not a number from 1 to 64"),
        (("--prompt", "1000000"), "are more than 1,048,576 together"),
        (("--prompt", "4000"), "the 4096 positions that the model knows: give fewer, or set"),
        (("--cell", "t5*"), "--cell t5*: names no model; there are gpt"),
        (("--gpu", "h20"), "did you mean h200?"),
        (("--set", "model.preset=bert"), "cannot generate"),
    ],
)
def test_a_mistake_is_one_sentence(more, sentence, tmp_path, capsys):
    code, out, error = run(tmp_path, capsys, raw_of("gpt"), *more)
    assert code == 2 and not out
    assert sentence in error and error.count("megaarch:") == 1 and "Traceback" not in error


def test_any_length_is_counted_that_the_model_has_positions_for():
    raw = config.read_yaml("configs/tiny.yaml")
    limit = config.resolve(raw).model.sequence_length
    for more in (0, 1):
        ((_, cost),) = costs(raw, CLUSTER, Lengths(limit - 11, 11 + more, 1))
        assert isinstance(cost, InferenceCost) is (more == 0)


def test_the_page_shows_what_the_command_prints(capsys):
    page = Path("docs/inference.md").read_text()
    (command,) = re.findall(r"^    megaarch plan-inference (\S+ --cell \S+ --batch 8)", page, re.M)
    assert main(["plan-inference", *shlex.split(command)]) == 0
    shown = capsys.readouterr().out
    assert re.sub("^(?=.)", "    ", shown, flags=re.M) in page
