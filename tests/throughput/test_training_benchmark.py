"""The training benchmark: what it says of a step in steady state, and that a trainer goes with it."""

import copy
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from megaarch.config import catalogue
from tools.throughput import command, training

FREED = """
import gc, json, sys, weakref
from tools.throughput import training
gc.disable()
kept, right = [], training._measured
def measured(trainer, *rest):
    kept.extend(map(weakref.ref, (trainer, trainer.model, next(trainer.model.parameters()))))
    return right(trainer, *rest)
training._measured = measured
list(training.run(json.loads(sys.argv[1]), ["gpt", "t5"], 1, 1, {}, None))
print([reference() is None for reference in kept])
"""


def figures(raw, presets, steps=2):
    events = training.run(raw, presets, steps, 1, {}, None)
    return {event.head["preset"]: event.result for event in events if event.result}


def test_a_trainer_is_freed_without_the_garbage_collector(raw):
    """In a fresh process: what torch imports late, in the midst of a call, holds the callers' frames."""
    done = subprocess.run(
        [sys.executable, "-c", FREED, json.dumps(raw)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str([True] * 6)


def test_a_preset_that_fails_is_reported_and_the_rest_runs(raw, monkeypatch):
    right = training.measure

    def measure(settings, preset, *rest):
        if preset == "t5":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return right(settings, preset, *rest)

    monkeypatch.setattr(training, "measure", measure)
    found = figures(raw, ["gpt", "t5", "bert"])
    assert found["t5"] == {
        "wrong": "failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    }
    assert found["gpt"]["tokens_per_second"] > 0 and found["bert"]["tokens_per_second"] > 0


@pytest.mark.parametrize("preset", ["prefix_lm", "t5", "xlnet"])
def test_each_stream_tells_its_attention_kernels(raw, preset):
    mine = copy.deepcopy(raw)
    mine["model"]["attention"] = "sdpa"
    mine["training"] |= {"micro_batch_size": 4, "global_batch_size": 8}
    found = figures(mine, [preset], steps=3)[preset]
    names = catalogue.ARCHITECTURES[catalogue.PRESETS[preset].architecture].streams
    wanted = {name: {"sdpa": 6} for name in names}  # two micro-batches in each of three steps
    if len(names) == 2:
        wanted[f"{names[1]} cross"] = {"sdpa": 6}
    assert found["attention_kernels"] == wanted


def test_kernels_are_counted_by_what_auto_chooses_for_each_batch(raw, monkeypatch):
    chosen = iter(["cudnn", "torch_varlen", "cudnn", "cudnn"])
    monkeypatch.setattr(training, "choose", lambda *_: (next(chosen), ""))
    found = figures(raw, ["gpt"])["gpt"]
    (counts,) = found["attention_kernels"].values()
    assert counts == {"cudnn": 3, "torch_varlen": 1}


def test_compilations_within_the_timed_steps_are_counted(raw, monkeypatch):
    steps = Counter()
    right = training.Trainer.train_step

    def launch(self, *rest):
        steps["run"] += 1
        if steps["run"] != 2:  # in the warm-up, and in the last timed step
            torch.compile(lambda x: x + steps["run"], backend="eager")(torch.ones(2))
        return right(self, *rest)

    monkeypatch.setattr(training.Trainer, "train_step", launch)
    assert figures(raw, ["gpt"])["gpt"]["graphs_compiled_in_timed_steps"] == 1


def test_the_wait_for_data_is_told_apart(raw, monkeypatch):
    now = [0.0]
    batch = iter(range(99))

    def slow(steps, start, workers):
        for step in batch:
            now[0] += 3.0  # the loader's
            yield steps[step]

    class Loading:
        def __init__(self, *arguments):
            self.made = slow(*arguments)

        def __enter__(self):
            return self.made

        def __exit__(self, *_):
            pass

    right = training.Trainer.train_step

    def launch(self, *rest):
        now[0] += 1.0
        return right(self, *rest)

    monkeypatch.setattr(training, "prefetch", Loading)
    monkeypatch.setattr(training.Trainer, "train_step", launch)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "peak_flops", lambda device: (1e9, "made up"))
    found = figures(raw, ["gpt"])["gpt"]
    assert found["wait_for_data"]["median_ms"] == 3000.0
    assert found["step"]["median_ms"] == 4000.0
    assert found["wait_for_data_share"] == 0.75
    assert found["utilization"] == pytest.approx(found["flops_per_second"] / 1e9)


def test_settings_of_two_stacks_are_for_encoder_decoders_alone(raw):
    mine = copy.deepcopy(raw)
    mine["model"] |= {"encoder_layers": 1, "decoder_layers": 3}
    assert training.resolve(mine, "gpt").model.layers == 2
    two = training.resolve(mine, "t5").model
    assert (two.encoder_layers, two.decoder_layers) == (1, 3)


@pytest.mark.parametrize("benchmark", ["train", "data"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.attention=nonsense", "model.attention"),
        ("training=[1, [2, {a: 3}]]", "training"),
        ("model=3", "model is a value and has no settings below it"),
        ("__class__=[1]", "__class__"),
    ],
)
def test_mistakes_are_told_before_anything_runs(benchmark, given, said, raw, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    arguments = [benchmark, str(path), "--presets", "gpt", "--set", given]
    assert command.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_time_that_runs_out_leaves_the_rest_unfinished(raw):
    events = list(training.run(raw, ["gpt", "t5"], 1, 1, {}, 1.0))  # a moment long past
    assert [event.result for event in events if event.result] == [{"unfinished": "out of time"}] * 2
