"""What the attention benchmark runs in each repetition, and what it reports of kernels that plan for a
shape, refuse a batch, or fail in the midst."""

import numpy as np
import pytest
import torch

from megaarch.attention.sdpa import SdpaKernel
from tools.throughput import attention, masks

DEVICE = torch.device("cpu")
SHAPE = attention.Shape(400, 200, 2, 2, 8, torch.float32)  # documents are of 64 tokens or more


def results(mask_names, kernels, repetitions=3, seed=0, lost=None):
    """What was found of each (mask, kernel)."""
    found = {}
    events = attention.run(
        [SHAPE], mask_names, kernels, DEVICE, repetitions, seed, lost or {}, None
    )
    for head, result in events:
        if result is not None:
            found[head["mask"], head["kernel"]] = result
    return found


@pytest.fixture
def batches(monkeypatch):
    """Tables of parts that each kernel was given in timed and untimed rounds, in order."""
    seen, right = {}, attention.attend

    def attend(*tensors, kernel):
        seen.setdefault(kernel, []).append(tensors[3].table.tobytes())
        return right(*tensors, kernel=kernel)

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "_check", lambda *_: None)
    return seen


@pytest.mark.parametrize("mask", masks.MASKS)
def test_drawn_masks_are_new_in_each_repetition_and_alike_for_all_kernels(mask, batches):
    results([mask], ["sdpa", "reference"], repetitions=4)
    assert batches["sdpa"] == batches["reference"]
    rounds = attention.WARM_UP + 4
    if mask in masks.DRAWN:
        pairs = list(zip(batches["sdpa"][::2], batches["sdpa"][1::2], strict=True))
        assert len(pairs) == rounds and all(first == again for first, again in pairs)
        assert len(set(pairs)) == rounds
    else:
        assert len(batches["sdpa"]) == rounds and len(set(batches["sdpa"])) == 1


def test_runs_are_reproducible_and_seeds_differ():
    tables = [
        masks.batch("packed_prefix", 3, 90, seed, number).table.tobytes()
        for seed in (5, 6)
        for number in (0, 1)
    ]
    assert len(set(tables)) == 4
    assert tables[0] == masks.batch("packed_prefix", 3, 90, 5, 0).table.tobytes()


class Ticks:
    """A clock that reads what the kernel below says it took."""

    now = 0.0

    def __init__(self, device, flush=True):
        pass

    def start(self):
        self.moments = [Ticks.now]

    def mark(self):
        self.moments.append(Ticks.now)

    def intervals(self):
        return np.diff(self.moments).tolist()


def test_building_a_plan_for_a_shape_has_a_column_of_its_own(monkeypatch):
    """A kernel that takes 1 ms forward and builds for 50 ms whenever its shape is new."""
    known, areas, right = set(), [], SdpaKernel.attend

    def attend(kernel, inputs):
        shape = inputs.parts.table.tobytes()
        Ticks.now += 1e-3 + (0.0 if shape in known else 50e-3)
        known.add(shape)
        areas.append(inputs.parts.area())
        return right(kernel, inputs)

    monkeypatch.setattr(SdpaKernel, "attend", attend)
    monkeypatch.setattr(attention, "Clock", Ticks)
    monkeypatch.setattr(torch.autograd, "grad", _ticking(torch.autograd.grad))
    monkeypatch.setattr(attention, "_check", lambda *_: None)
    found = results(["prefix_random", "causal"], ["sdpa"])
    drawn, fixed = found["prefix_random", "sdpa"], found["causal", "sdpa"]
    assert drawn["new_shape_ms"] == pytest.approx(50.0)
    assert drawn["forward"]["median_ms"] == pytest.approx(51.0)
    assert drawn["warm"]["forward"]["median_ms"] == pytest.approx(1.0)
    assert fixed["forward"]["median_ms"] == pytest.approx(1.0)
    assert "new_shape_ms" not in fixed and "warm" not in fixed
    # by the exact area of each batch that was timed
    timed = areas[attention.WARM_UP * 3 :]  # a round: prefix_random twice, causal once
    flops = 4 * SHAPE.heads * SHAPE.head_size * np.median(timed[::3])
    assert drawn["warm"]["forward"]["tflops"] == pytest.approx(flops / 1e-3 / 1e12)
    assert drawn["area"] == pytest.approx(np.mean(timed[::3]))


def _ticking(grad):
    def once(*arguments):
        Ticks.now += 2e-3
        return grad(*arguments)

    return once


def test_batches_that_a_kernel_refuses_are_counted_and_the_rest_timed(monkeypatch):
    lengths = [
        masks.batch("prefix_random", SHAPE.rows, SHAPE.length, 0, n).row(0) for n in range(9)
    ]
    refused = [n % 3 == 0 for n in range(9)]

    def cannot_run(kernel, inputs):
        if inputs.parts.row(0) in [row for row, out in zip(lengths, refused, strict=True) if out]:
            return "one key is too few"
        return None

    monkeypatch.setattr(SdpaKernel, "cannot_run", cannot_run)
    found = results(["prefix_random"], ["sdpa"], repetitions=7)["prefix_random", "sdpa"]
    assert found["forward"]["repetitions"] == 7 - sum(refused[attention.WARM_UP :])
    ((reason, count),) = found["refused"].items()
    assert "one key is too few" in reason and count == sum(refused)


def test_a_kernel_that_takes_no_batch_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(SdpaKernel, "cannot_run", lambda *_: "no such luck")
    found = results(["prefix_random"], ["sdpa", "reference"])
    assert "no such luck" in found["prefix_random", "sdpa"]["skipped"]
    assert found["prefix_random", "reference"]["forward"]["repetitions"] == 3


@pytest.mark.parametrize("fault", ["nan", "error"])
def test_a_fault_in_a_later_batch_is_reported_and_the_rest_runs(fault, monkeypatch):
    right, count = SdpaKernel.attend, 0

    def attend(kernel, inputs):
        nonlocal count
        count += 1
        if count < 6:  # checked and run twice, and the first rounds are right
            return right(kernel, inputs)
        if fault == "error":
            raise RuntimeError("no plan for this length\nstack")
        return right(kernel, inputs) * float("nan")

    monkeypatch.setattr(SdpaKernel, "attend", attend)
    found = results(["prefix_random"], ["sdpa", "reference"])
    wanted = {
        "nan": "sdpa failed with FloatingPointError: output is not finite",
        "error": "sdpa failed with RuntimeError: no plan for this length",
    }
    assert found["prefix_random", "sdpa"]["wrong"].startswith(wanted[fault])
    assert "\n" not in found["prefix_random", "sdpa"]["wrong"]
    assert found["prefix_random", "reference"]["forward"]["repetitions"] == 3


def test_auto_takes_the_times_of_the_kernel_that_it_chooses(batches, monkeypatch):
    """Run again, it would find that kernel's plans built."""
    monkeypatch.setattr(
        attention, "choose", lambda name, *_: ("sdpa" if name == "auto" else name, "")
    )
    found = results(["prefix_random"], ["auto", "sdpa"])
    assert set(batches) == {"sdpa"}
    auto, named = (found["prefix_random", name] for name in ("auto", "sdpa"))
    assert auto["forward"] == named["forward"] and auto["ran"] == {"sdpa": 3}


def test_a_kernel_that_lost_its_process_twice_is_left_out():
    events = list(attention.run([SHAPE], ["causal"], ["sdpa"], DEVICE, 1, 0, {}, None))
    key = events[0].key
    assert results(["causal"], ["sdpa"], lost={key: "ended"})["causal", "sdpa"] == {
        "wrong": "ended"
    }
    lost = {(mask, *key[1:]): "ended" for mask in ("full", "turns")}
    found = results(["causal"], ["sdpa", "reference"], lost=lost)
    assert "full and turns" in found["causal", "sdpa"]["wrong"]
    assert "forward" in found["causal", "reference"]
