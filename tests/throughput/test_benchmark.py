"""The benchmarks end to end at tiny sizes: what they refuse, and what their records hold."""

import json

import numpy as np
import pytest
import torch

from megaarch.attention.sdpa import SdpaKernel
from megaarch.kernels import bindings
from tools.throughput import command, fused_kernels, generation_peers, masks, timing, training

ATTENTION = ["attention", "--lengths", "24", "--head-sizes", "8", "--tokens", "48"]


def run(folder, *arguments):
    """Exit code and the record that was written."""
    code = command.main([*arguments, "--repetitions", "3", "--output", str(folder)])
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".svg").read_text().startswith("<?xml")
    return code, json.loads(path.read_text())


def config_file(tmp_path, raw):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    return str(path)


def test_attention_times_every_mask_against_causal(tmp_path):
    code, found = run(tmp_path, *ATTENTION, "--kernels", "auto", "reference")
    assert code == 0
    assert {(r["mask"], r["kernel"]) for r in found["results"]} == {
        (mask, kernel) for mask in masks.MASKS for kernel in ("auto", "reference")
    }
    assert found["hardware"]["cpu"] and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python tools/benchmark.py")
    for r in found["results"]:
        assert r["forward"]["repetitions"] == 3
        if not r["new_lengths_each_repetition"]:
            flops = 4 * r["heads"] * r["head_size"] * r["area"]
            expected = flops / r["forward"]["median_ms"] / 1e9
            assert r["forward"]["tflops"] == pytest.approx(expected, rel=1e-3)
        assert r["operators"]
        if r["mask"] == "causal":
            assert r["area"] == 2 * 24 * 25 // 2
            assert r["forward"]["to_causal"] == r["backward"]["to_causal"] == 1.0


def test_a_wrong_kernel_gets_no_time(tmp_path, monkeypatch):
    right = SdpaKernel.attend
    monkeypatch.setattr(SdpaKernel, "attend", lambda *a, **o: right(*a, **o) * 1.01)
    code, found = run(tmp_path, *ATTENTION, "--masks", "causal", "--kernels", "sdpa")
    assert code == 1
    (result,) = found["results"]
    assert "output differs from the reference" in result["wrong"]
    assert "forward" not in result


def test_a_kernel_that_fails_costs_its_own_time_only(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no image for this device\nand more")

    monkeypatch.setattr(SdpaKernel, "attend", fail)
    code, found = run(tmp_path, *ATTENTION, "--masks", "causal", "--kernels", "sdpa", "reference")
    assert code == 1
    first, second = found["results"]
    assert first["wrong"] == "sdpa failed with RuntimeError: no image for this device"
    assert found["complete"]
    assert second["forward"]["tflops"] > 0


@pytest.mark.parametrize("name", masks.MASKS)
def test_masks_leave_no_row_without_a_key(name):
    parts = masks.draw(name, 3, 70, np.random.default_rng(5))
    assert parts.dense().any(2).all()


def test_training_and_data(tmp_path, raw):
    path = config_file(tmp_path, raw)
    code, found = run(tmp_path / "train", "train", path, "--presets", "gpt", "t5")
    assert code == 0
    for r in found["results"]:
        assert 0 < r["utilization"] < 2 and r["peak_memory_gib"] > 0
        assert r["tokens_per_second"] >= r["target_tokens_per_second"] > 0
    code, found = run(tmp_path / "data", "data", path, "--presets", "bert", "xlnet")
    assert code == 0
    for r in found["results"]:
        ratio = r["rows_per_second"] / r["demand_rows_per_second"]
        assert r["supply_to_demand"] == pytest.approx(ratio)
        assert r["workers_needed"] * ratio >= 1


def test_peers_start_alike_and_learn_alike(tmp_path):
    size = "--hidden-size 16 --layers 2 --heads 2 --feed-forward-size 24 --vocabulary-size 128"
    arguments = ["peers", *size.split(), "--rows", "2", "--length", "24"]
    code, found = run(tmp_path, *arguments)
    assert code == 0
    assert {(r["family"], r["precision"]) for r in found["results"]} == {
        (family, precision) for family in ("llama", "t5", "bert") for precision in ("fp32", "bf16")
    }
    for r in found["results"]:
        assert r["loss_difference"] < 1e-4
        assert len(r["loss_ours"]) == len(r["loss_theirs"]) == 5


GENERATION = {
    "hidden-size": 32,
    "layers": 2,
    "heads": 2,
    "feed-forward-size": 48,
    "vocabulary-size": 1024,
    "length": 24,
    "answer": 6,
}


def test_generation_by_turn_and_against_transformers(tmp_path):
    sizes = [text for name, size in GENERATION.items() for text in (f"--{name}", str(size))]
    code, found = run(tmp_path, "inference", *sizes, "--presets", "gpt", "prefix_lm")
    assert code == 0
    peers = [r for r in found["results"] if "family" in r]
    presets = [r for r in found["results"] if "preset" in r]
    assert {(r["family"], r["batch"]) for r in peers} == {
        (family, batch) for family in ("llama", "t5") for batch in (1, 8)
    }
    token = 2 * 2 * 32 * 4  # bytes of keys and values in both layers
    for r in peers:
        assert r["first_token_ratio"] > 0 and r["decode_ratio"] > 0
        run_in_decoder = 24 + 5 if r["family"] == "llama" else 1 + 5
        crossed = 0 if r["family"] == "llama" else 24
        assert r["cache_bytes_theirs"] == r["batch"] * token * (run_in_decoder + crossed)
        assert r["cache_bytes_ours"] >= r["cache_bytes_theirs"]
    policies = [("gpt", "reuse"), ("gpt", "recompute")]
    policies += [("prefix_lm", "turn_blocks"), ("prefix_lm", "reuse")]
    assert [(r["preset"], r["policy"]) for r in presets] == 2 * policies
    for r in presets:
        run_alone = r["policy"] == "turn_blocks" or r["label"].startswith("gpt reuse")
        for number, turn in enumerate(r["turns"]):
            before = number * (24 + 6)
            assert turn["tokens_reused"] == (before if run_alone else 0)
            new = 25 if run_alone and number else 25 + before
            assert turn["tokens_run"] == new
            rate = r["batch"] * new / turn["first_token"]["median_ms"] * 1e3
            assert turn["prefill_tokens_per_second"] == pytest.approx(rate, rel=1e-3)
            in_use = r["batch"] * (before + 30) * (token + 8)
            assert turn["cache_bytes_in_use"] == in_use <= turn["cache_bytes"]


def test_generation_of_other_tokens_gets_no_time(monkeypatch, tmp_path, capsys):
    class Side:
        def __init__(self, serve, which, *_):
            self.told = [[3, 4 + which]], 100

    monkeypatch.setattr(generation_peers, "Apart", Side)
    arguments = ["inference", "--presets", "--families", "llama", "--output", str(tmp_path)]
    assert command.main(arguments) == 2
    assert "greedy tokens of the same weights differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plans_are_timed_for_a_device_that_is_not_there(tmp_path):
    code, found = run(tmp_path, "plans", "--lengths", "64", "--rows", "2", "--kernels", "flex")
    assert code == 0
    assert {r["mask"] for r in found["results"]} == set(masks.MASKS)
    assert all(r["built_ms"] > 0 and r["bytes"] > 0 for r in found["results"])


def test_records_are_never_overwritten(tmp_path, capsys):
    arguments = [*ATTENTION, "--masks", "causal", "--repetitions", "1", "--output", str(tmp_path)]
    assert command.main(arguments) == command.main(arguments) == 0
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.svg"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_a_missing_device_is_one_sentence(tmp_path, capsys):
    assert command.main([*ATTENTION, "--device", "cuda", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_a_job_whose_gpus_torch_does_not_find_measures_no_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    arguments = [*ATTENTION, "--masks", "causal", "--repetitions", "1", "--output", str(tmp_path)]
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert "SLURM gave this job 8 GPUs" in said and said.endswith("or set --device to cpu\n")
    assert not list(tmp_path.iterdir())
    assert command.main([*arguments, "--device", "cpu"]) == 0


@pytest.mark.parametrize("benchmark", ["peers", "inference"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--heads", "10"], "--hidden-size 256 has to be a multiple of twice --heads 10"),
        (["--hidden-size", "4"], "--hidden-size 4 has to be a multiple of twice --heads 4"),
        (["--length", "3"], "--length must be at least 4"),
        (["--vocabulary-size", "3"], "--vocabulary-size must be at least 4"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_sentence(benchmark, given, said, tmp_path, capsys):
    assert command.main([benchmark, *given, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    "flag", ["--threads=1000000", "--threads=0", "--seed=-1", f"--seed={10**20}"]
)
def test_threads_and_seeds_are_bounded(flag, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["peers", flag, "--output", str(tmp_path)])
    assert "is not a number from" in capsys.readouterr().err


def test_times_alternate():
    order = []

    def candidate(name):
        def once(clock):
            clock.start()
            order.append(name)
            clock.mark()

        return once

    found = timing.alternate([candidate("a"), candidate("b")], torch.device("cpu"), 3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert [len(stages[0].seconds) for stages in found] == [3, 3]


def test_overlapping_collectives_count_once():
    assert training._union([(0, 4), (2, 5), (7, 8), (7.5, 7.75)]) == 6


@pytest.mark.skipif(bindings.obstacle("cpu") is not None, reason=str(bindings.obstacle("cpu")))
def test_fused_kernels_are_checked_then_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    sizes = ["--tokens", "32", "--length", "16", "--width", "64", "--vocabulary-size", "128"]
    code, found = run(tmp_path / "right", "fused", *sizes)
    assert code == 0 and len(found["results"]) == 3 + 3 + 2
    for r in found["results"]:
        assert r["forward"]["median_ms"] > 0 and r["gb_per_s"] > 0
    right = fused_kernels.rms_norm
    monkeypatch.setattr(fused_kernels, "rms_norm", lambda *a: right(*a) * 1.01)
    code, found = run(tmp_path / "wrong", "fused", *sizes)
    wrong = [r for r in found["results"] if "wrong" in r]
    assert code == 1 and [r["label"] for r in wrong] == ["rms_norm, fused"]
    assert "forward" not in wrong[0]
