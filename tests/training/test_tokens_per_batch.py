"""Batches in tokens: every preset's steps see as many, micro-batches change nothing, a stopped run
continues bit for bit, and rows that a step leaves out count as nothing."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from megaarch import config
from megaarch.data import tokens_per_batch
from megaarch.data.loader import Steps
from megaarch.model import flops
from megaarch.training.trainer import Trainer
from tests.conftest import PRESETS
from tests.steps import forward_backward

STEPS = 24


@pytest.fixture
def in_tokens(tiny):
    """tiny with batches in tokens in place of rows."""
    return lambda preset, tokens, **given: tiny(
        preset, training__global_batch_tokens=tokens, **given
    )


@pytest.mark.parametrize("masks", (False, True), ids=("", "document masks"))
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_of_every_preset_see_the_same_tokens(preset, masks, in_tokens, prepared):
    settings = in_tokens(preset, 3000, data__document_masks=masks)
    trainer = Trainer(settings, prepared)
    seen = [sum(sum(b.counts.tokens) for b in trainer.steps[s]) for s in range(STEPS)]
    assert sum(seen) / STEPS == pytest.approx(3000, rel=0.01)
    per_row, _ = tokens_per_batch.tokens_per_row(trainer.rows)
    assert max(seen) - min(seen) < 6 * per_row
    samples = [trainer.steps.samples(s) for s in range(STEPS)]
    assert samples[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(samples))
    assert {len(s) for s in samples} <= {math.floor(3000 / per_row), math.ceil(3000 / per_row)}


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_that_a_step_leaves_out_count_as_nothing(preset, in_tokens, prepared):
    trainer = Trainer(in_tokens(preset, 480, training__micro_batch_size=3), prepared)
    steps = [trainer.steps[s] for s in range(STEPS)]
    sizes = {(len(step), *{b.target_tokens.shape[0] for b in step}) for step in steps}
    assert len(sizes) == 1  # fixed shapes
    left_out = 0
    for s, step in enumerate(steps):
        counts = sum((b.counts for b in step[1:]), step[0].counts)
        examples = [e for i in trainer.steps.samples(s) for e in trainer.rows[i]]
        held = [sum(len(e.streams[n].tokens) for e in examples) for n in range(len(counts.tokens))]
        assert list(counts.tokens) == held
        assert counts.targets == sum(int((e.target_weights > 0).sum()) for e in examples)
        left_out += sum(len(b.target_tokens) for b in step) - len(trainer.steps.samples(s))
    assert left_out > 0
    # and the loss is that of the rows that are there
    full = Steps(
        trainer.rows,
        global_batch_size=len(trainer.steps.samples(0)),
        micro_batch_size=len(trainer.steps.samples(0)),
    )
    found = forward_backward(trainer, steps[0])
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer.zero_grad(set_to_none=True)
    assert torch.allclose(found, forward_backward(trainer, full[0]), rtol=1e-6)
    for name, p in trainer.model.named_parameters():
        assert (p.grad - grads[name]).norm() <= 1e-5 * max(float(grads[name].norm()), 1e-3), name


def test_a_stopped_run_continues_bit_for_bit_at_its_sample(in_tokens, prepared, tmp_path):
    def run(folder, steps):
        where = str(tmp_path / folder)
        rate = {"training__schedule": "constant", "training__warmup": 0.0}
        given = {"training__steps": steps, "logging__directory": where} | rate
        settings = in_tokens("t5", 700, **given)
        trainer = Trainer(settings, prepared)
        trainer.run()
        return trainer

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6)
    assert (
        parts.progress.plus(seconds=whole.progress.seconds - parts.progress.seconds)
        == whole.progress
    )
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    counts = [b.counts for s in range(6) for b in parts.steps[s]]
    assert parts.progress.flops == sum(flops.training(whole.settings.model, c) for c in counts)


@pytest.mark.parametrize("match", ("flops", "seen_tokens", "target_tokens"))
def test_a_budget_ends_such_a_run_within_half_a_step(match, in_tokens, prepared):
    amounts = {"flops": 3e9, "seen_tokens": 8000, "target_tokens": 5000}
    budget = {"match": match, "amount": amounts[match]}
    trainer = Trainer(
        in_tokens("gpt", 900, training__steps=None, training__budget=budget), prepared
    )
    spent = getattr(trainer.run(), match)
    assert abs(spent / amounts[match] - 1) < 0.5 / trainer.progress.step + 0.01


@pytest.mark.parametrize("wanted", (Fraction(1), Fraction(37, 4), Fraction(64), Fraction(1001, 10)))
@pytest.mark.parametrize("deep", (1, 2, 4))
@pytest.mark.parametrize("size", (1, 3, 8))
def test_micro_batches_have_room_for_the_largest_step(wanted, deep, size, in_tokens):
    settings = in_tokens(
        "gpt",
        1000,
        training__micro_batch_size=size,
        parallel__data_parallel_shard=2,
        parallel__pipeline_parallel=deep,
    )
    training = tokens_per_batch.in_rows(settings, wanted).training
    count, rest = divmod(training.global_batch_size, training.micro_batch_size * 2)
    assert rest == 0 and count % deep == 0 and training.micro_batch_size <= size
    assert training.global_batch_size >= wanted
    assert training.global_batch_size < math.ceil(wanted) + 2 * count


def test_mistakes_are_sentences(tiny, in_tokens, prepared):
    with pytest.raises(config.ConfigError, match="cannot be given together with"):
        tiny("gpt", training__global_batch_size=16, training__global_batch_tokens=500)
    with pytest.raises(ValueError, match="30 tokens are less than the 48 of a row"):
        Trainer(in_tokens("gpt", 30), prepared)
    assert tokens_per_batch.uncertain(0.001) is None
    assert "to 2.0% only" in tokens_per_batch.uncertain(0.01)
