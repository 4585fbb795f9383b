"""A run: every preset learns, the split into micro-batches changes nothing, and a stopped run
continues bit for bit."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaarch.checkpoint import checkpoint, retention
from megaarch.checkpoint.manifest import find_fault
from megaarch.errors import UserError
from megaarch.ingest.prepare import prepare
from megaarch.model import flops
from megaarch.study import evaluate_run
from megaarch.training.trainer import Trainer
from tests.conftest import PRESETS
from tests.steps import forward_backward


def lines(settings):
    path = Path(settings.logging.directory) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns_and_counts_what_it_ran(preset, tiny, prepared):
    settings = tiny(preset, training__steps=12)
    trainer = Trainer(settings, prepared)
    progress = trainer.run()
    written = lines(settings)
    assert [line["step"] for line in written] == list(range(1, 13))
    assert written[-1]["loss"] < written[0]["loss"] - 0.1
    counts = [b.counts for s in range(12) for b in trainer.steps[s]]
    assert progress.flops == sum(flops.training(settings.model, c) for c in counts)
    assert progress.seen_tokens == sum(sum(c.tokens) for c in counts)
    assert progress.target_tokens == sum(c.targets for c in counts)
    assert written[-1]["flops"] == progress.flops
    assert all(line["tokens_per_second"] > 0 for line in written)


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_change_neither_loss_nor_gradients(preset, tiny, prepared):
    found = []
    for size in (1, 2, 8):
        trainer = Trainer(
            tiny(preset, training__micro_batch_size=size, training__z_loss=1e-3), prepared
        )
        batches = [without_targets(b, rows={1, 6}) for b in trainer.steps[3]]
        loss = forward_backward(trainer, batches)
        grads = {name: p.grad for name, p in trainer.model.named_parameters()}
        found.append((loss, grads))
    for loss, grads in found[1:]:
        assert torch.allclose(loss, found[0][0], rtol=1e-6)
        for name, grad in grads.items():
            reference = found[0][1][name]
            assert (grad - reference).norm() <= 1e-6 * max(float(reference.norm()), 1e-3), name


def without_targets(batch, rows):
    """The batch with some rows of the step (by their place in it) freed of all targets."""
    keep = torch.tensor([int(i) % 8 not in rows for i in batch.sample_index])
    weights = batch.target_weights * keep[:, None]
    used = weights.flatten().nonzero()[:, 0]
    padded = torch.zeros(max(128, -(-len(used) // 128) * 128), dtype=torch.int64)
    padded[: len(used)] = used
    return replace(batch, target_weights=weights, head_rows=padded, head_count=len(used))


@pytest.mark.parametrize("preset", ["gpt", "t5", "xlnet"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_stopped_run_continues_bit_for_bit(preset, optimizer, tiny, prepared, tmp_path):
    given = {"training__optimizer": optimizer, "model__dropout": 0.1, "training__save_every": 2}
    whole = tiny(preset, logging__directory=str(tmp_path / "whole"), **given)
    unbroken = Trainer(whole, prepared)
    unbroken.run()
    part = tiny(preset, logging__directory=str(tmp_path / "part"), **given)
    first = Trainer(part, prepared)

    class Stop(Exception):
        pass

    def stop(step):
        if step.progress.step == 5:  # one step past the checkpoint of step 4
            raise Stop

    first.watch = stop
    with pytest.raises(Stop):
        first.run()
    second = Trainer(part, prepared)
    assert second.progress.step == 4
    second.run()
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    kept = ("step", "loss", "flops", "gradient_norm", "learning_rate")
    assert [[line[k] for k in kept] for line in lines(whole)] == [
        [line[k] for k in kept] for line in lines(part)
    ]


def test_loader_workers_change_nothing(tiny, prepared, tmp_path):
    losses = []
    for workers in (0, 2):
        settings = tiny(
            "glm", data__workers=workers, logging__directory=str(tmp_path / str(workers))
        )
        Trainer(settings, prepared).run()
        losses.append([line["loss"] for line in lines(settings)])
    assert losses[0] == losses[1]


def test_learned_positions_reach_as_far_as_the_rows(tiny, prepared):
    given = {"model__position_encoding": "learned", "training__steps": 1}
    with pytest.raises(ValueError, match=r"48 positions are fewer than the 56 .* set it to 56"):
        Trainer(tiny("bart", **given), prepared)
    Trainer(tiny("bart", model__learned_positions=56, **given), prepared).run()


def test_too_few_sentinels_are_told_before_the_first_step(tiny, prepared):
    long = tiny("t5", model__sequence_length=400)
    with pytest.raises(ValueError, match=r"sentinel 21 asked for.*raise data.sentinels"):
        Trainer(long, prepared)


def test_pairs_that_are_cut_are_told_as_a_run_starts(tiny, tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    texts = [f"{'so it is ' * (30 if i % 4 else 1)}{i}" for i in range(100)]
    path.write_text("".join(json.dumps({"input": t, "target": "yes"}) + "\n" for t in texts))
    settings = tiny(data__source=str(path), data__objective="supervised")
    trainer = Trainer(settings, prepare(settings.data, settings.model.vocabulary_size))
    cut, pairs = trainer.rows.truncated, trainer.rows.examples
    assert 0 < cut < pairs
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{cut} of {pairs} {{input, target}} pairs ({cut / pairs:.1%}) are too")


def test_other_data_is_refused(tiny, prepared):
    settings = tiny()
    Trainer(settings, prepared).run()
    other = replace(
        prepared, manifest=prepared.manifest.model_copy(update={"fingerprint": "another"})
    )
    with pytest.raises(ValueError, match="was trained on other data"):
        Trainer(settings, other)


def edit_record(folder, edit):
    """Changes progress.json of a run's newest checkpoint, and its entry in the manifest."""
    path = checkpoint.newest(folder)
    file, listed = path / "progress.json", path / "manifest.json"
    record, manifest = json.loads(file.read_text()), json.loads(listed.read_text())
    edit(record)
    file.write_text(json.dumps(record))
    content = file.read_bytes()
    listed.write_text(json.dumps(manifest | {file.name: (len(content), zlib.crc32(content))}))


def test_a_run_records_the_version_of_its_samples_and_is_refused_under_another(tiny, prepared):
    settings = tiny("gpt")
    folder = Path(settings.logging.directory)
    Trainer(settings, prepared).run()
    assert Trainer(settings, prepared).progress.step == 6
    edit_record(folder, lambda record: record.update(samples=record["samples"] + 1))
    with pytest.raises(UserError, match="samples of version 3 of full_lm, and this .* version 2"):
        Trainer(settings, prepared)


@pytest.mark.parametrize("preset, continues", [("t5", False), ("gpt", True)])
def test_a_record_without_the_version_is_of_the_samples_before_it(
    preset, continues, tiny, prepared
):
    settings = tiny(preset)
    Trainer(settings, prepared).run()
    edit_record(Path(settings.logging.directory), lambda record: record.pop("samples"))
    if continues:
        assert Trainer(settings, prepared).progress.step == 6
        return
    with pytest.raises(UserError, match="samples of version 1 of span_corruption.*start_from="):
        Trainer(settings, prepared)


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", None])
def test_a_damaged_record_is_named_before_a_run_is_scored(damage, tiny, prepared):
    """Where there is one before it, that one's settings are read."""
    settings = tiny(training__save_every=3)
    folder = Path(settings.logging.directory)
    Trainer(settings, prepared).run()
    for step, others in ((6, True), (3, False)):
        file = folder / "checkpoints" / f"step-{step:08d}" / "progress.json"
        file.unlink() if damage is None else file.write_bytes(damage)
        if others:
            assert checkpoint.latest_settings(folder)["data"]["objective"] == "full_lm"
    with pytest.raises(UserError, match=r"step-00000006 is damaged.*progress\.json"):
        evaluate_run.evaluate_run(folder)


def test_a_run_can_start_from_anothers_weights(tiny, prepared, tmp_path):
    parent = tiny("gpt", logging__directory=str(tmp_path / "parent"))
    trained = Trainer(parent, prepared)
    trained.run()
    child = tiny(
        "prefix_lm",
        training__start_from=str(tmp_path / "parent"),
        logging__directory=str(tmp_path / "child"),
    )
    started = Trainer(child, prepared)
    assert started.progress.step == 0
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, started.model.state_dict()[name]), name
    given = {"training__start_from": str(tmp_path / "parent"), "model__hidden_size": 64}
    misfit = tiny("prefix_lm", **given)
    with pytest.raises(ValueError, match="is of another model"):
        Trainer(misfit, prepared)
    turned = tiny("glm", training__start_from=str(tmp_path / "parent"))
    with pytest.raises(ValueError, match="number of position axes is 1 there and 2 here"):
        Trainer(turned, prepared)
    farther = {"model__rope_base": 5e5, "training__start_from": str(tmp_path / "parent")}
    Trainer(tiny("gpt", **farther), prepared)  # context extension
    with pytest.raises(ValueError, match="no complete checkpoint"):
        Trainer(tiny(training__start_from=str(tmp_path / "nowhere")), prepared)
    step = tmp_path / "parent" / "checkpoints" / "step-00000006"
    Trainer(tiny(training__start_from=str(step)), prepared)
    flip(step)
    with pytest.raises(ValueError, match="step-00000006 is damaged .*wrong checksum"):
        Trainer(tiny(training__start_from=str(step)), prepared)


def flip(step):
    """Flips a bit in the weights of a checkpoint, whose size stays."""
    file = next((step / "state").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_skipped_and_the_one_before_used(tiny, prepared, caplog):
    settings = tiny(training__save_every=2, training__keep_checkpoints=0)
    Trainer(settings, prepared).run()
    folder = Path(settings.logging.directory)
    steps = sorted((folder / "checkpoints").glob("step-*"))
    assert [p.name for p in steps] == ["step-00000002", "step-00000004", "step-00000006"]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    data = next((steps[-1] / "state").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    (steps[1] / "progress.json").unlink()
    assert checkpoint.newest(folder) == steps[0]
    assert "step-00000006 is damaged" in caplog.text and "step-00000004 is damaged" in caplog.text


def test_only_the_newest_checkpoints_are_kept(tiny, prepared):
    settings = tiny(training__save_every=1, training__keep_checkpoints=2)
    Trainer(settings, prepared).run()
    steps = sorted((Path(settings.logging.directory) / "checkpoints").glob("step-*"))
    assert [p.name for p in steps] == ["step-00000005", "step-00000006"]


def test_seconds_hold_the_making_of_batches_and_no_evaluation(tiny, prepared, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("megaarch.training.trainer.time", clock)
    settings = tiny(training__steps=3)
    trainer = Trainer(settings, prepared, hold_out=lambda *_: clock.pass_by(100), shares=(0, 0.5))
    make, learn = trainer.steps.batch, trainer.engine.forward_backward
    trainer.steps.batch = lambda *given: clock.pass_by(1) or make(*given)  # two to a step
    trainer.engine.forward_backward = lambda *given: clock.pass_by(5) or learn(*given)
    assert trainer.run().seconds == 3 * (2 + 5)
    for line in lines(settings):
        assert line["tokens_per_second"] == line["seen_tokens"] / line["step"] / (2 + 5)


class Clock:
    """Stands in for `time`: passes when told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_a_budget_is_met_within_half_a_step(tiny, prepared):
    settings = tiny(training__steps=None, training__budget={"match": "flops", "amount": 1.0e9})
    progress = Trainer(settings, prepared).run()
    assert abs(progress.flops - 1.0e9) <= 0.51 * progress.flops / progress.step


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(tiny, prepared):
    settings = tiny(training__learning_rate=1e-3, training__skip_limit=2)
    trainer = Trainer(settings, prepared)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    honest = trainer.engine.forward_backward

    def poisoned(*given):
        loss = honest(*given)
        next(trainer.model.parameters()).grad.fill_(float("nan"))
        return loss

    trainer.engine.forward_backward = poisoned
    with pytest.raises(FloatingPointError, match="3 steps in a row.*samples 16 to 23"):
        trainer.run()
    assert trainer.progress.skipped == 2
    text = (Path(settings.logging.directory) / "metrics.jsonl").read_text()
    assert "NaN" not in text, "not JSON"
    assert [line["gradient_norm"] for line in lines(settings)] == [None, None]
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_a_run_that_ended_for_steps_that_are_not_finite_goes_on_as_it_is_told(
    tiny, prepared, tmp_path
):
    def poisoned(**given):
        trainer = Trainer(tiny(training__save_every=3, training__warmup=0.0, **given), prepared)
        honest = trainer.engine.forward_backward

        def forward_backward(*given):
            loss = honest(*given)
            if trainer.progress.step in (3, 4):
                next(trainer.model.parameters()).grad.fill_(float("nan"))
            return loss

        trainer.engine.forward_backward = forward_backward
        return trainer

    with pytest.raises(FloatingPointError) as told:
        poisoned(training__skip_limit=1).run()
    assert "larger training.skip_limit" in str(told.value)
    assert f"training.start_from={tmp_path / 'run'}" in str(told.value)
    again = poisoned(training__skip_limit=2)
    assert again.progress.step == 3
    assert (again.run().step, again.progress.skipped) == (6, 2)
    start = {"training__start_from": str(tmp_path / "run"), "training__learning_rate": 1e-4}
    other = Trainer(tiny(logging__directory=str(tmp_path / "lower"), **start), prepared)
    for name, value in again.model.named_parameters():
        assert torch.equal(dict(other.model.named_parameters())[name], value), name
    other.run()


def test_compiled_layers_train_as_eager_ones_do(tiny, prepared, tmp_path):
    from torch._dynamo.utils import counters

    given = {"model__layers": 1, "model__kv_heads": 4, "training__steps": 2}
    losses = []
    for compiled in (False, True):
        counters.clear()
        settings = tiny(
            training__compile=compiled, logging__directory=str(tmp_path / str(compiled)), **given
        )
        Trainer(settings, prepared).run()
        losses.append([line["loss"] for line in lines(settings)])
        assert (counters["frames"]["ok"] > 0) == compiled, "or it has run eagerly"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains(tiny, prepared):
    settings = tiny("t5", training__precision="bf16", training__steps=8)
    Trainer(settings, prepared).run()
    written = lines(settings)
    assert written[-1]["loss"] < written[0]["loss"]


def test_a_run_continued_with_other_settings_is_refused_and_names_them(tiny, prepared):
    Trainer(tiny(), prepared).run()
    Trainer(tiny(training__steps=8), prepared)  # going further is no other run
    with pytest.raises(ValueError, match=r"training.learning_rate was 0.003 and is 0.5"):
        Trainer(tiny(training__learning_rate=0.5), prepared)
    with pytest.raises(ValueError, match=r"model.attention_scale was None and is 0.5"):
        Trainer(tiny(model__attention_scale=0.5), prepared)
    with pytest.raises(ValueError, match=r"model.preset was 'gpt' and is 'prefix_lm'"):
        Trainer(tiny("prefix_lm"), prepared)


def test_a_budget_may_grow(tiny, prepared):
    def budget(amount):
        return tiny(training__steps=None, training__budget={"match": "flops", "amount": amount})

    step = Trainer(budget(1e8), prepared).run().step
    assert Trainer(budget(3e8), prepared).run().step > step


def test_a_sound_checkpoint_of_a_later_step_stays(tiny, prepared):
    Trainer(tiny(training__save_every=2), prepared).run()
    folder = Path(tiny().logging.directory) / "checkpoints"
    retention.prune(folder, folder / "step-00000004", keep=1, keep_every=0)
    assert [path.name for path in retention.complete(folder)] == ["step-00000004", "step-00000006"]


def test_a_damaged_checkpoint_never_outlives_a_sound_one(tiny, prepared):
    Trainer(tiny(training__save_every=3), prepared).run()
    folder = Path(tiny().logging.directory) / "checkpoints"
    (folder / "step-00000006" / "manifest.json").unlink()
    further = tiny(training__steps=5, training__keep_checkpoints=1)
    Trainer(further, prepared).run()
    assert find_fault(folder / "step-00000005") is None
    assert (folder / "latest").read_text().strip() == "step-00000005"
    assert not (folder / "step-00000003").exists()


@pytest.mark.parametrize("manifest", ["{", "[4]", '{"progress.json": 3, "state/.metadata": [1]}'])
def test_a_run_whose_only_checkpoint_is_damaged_is_not_begun_anew(manifest, tiny, prepared):
    Trainer(tiny(), prepared).run()
    step = Path(tiny().logging.directory) / "checkpoints" / "step-00000006"
    (step / "manifest.json").write_text(manifest)
    before = lines(tiny())
    with pytest.raises(ValueError, match="is damaged .*, and there is none before it"):
        Trainer(tiny(training__steps=8), prepared)
    assert lines(tiny()) == before


def test_a_checkpoint_with_a_flipped_bit_does_not_count_as_one_to_keep(tiny, prepared):
    Trainer(tiny(training__save_every=2), prepared).run()
    folder = Path(tiny().logging.directory) / "checkpoints"
    flip(folder / "step-00000006")
    Trainer(tiny(training__steps=5, training__keep_checkpoints=2), prepared).run()
    left = {p.name for p in folder.glob("step-*")}
    assert left >= {"step-00000004", "step-00000005"}


def test_a_folder_that_holds_a_run_is_not_started_anew(tiny, prepared):
    Trainer(tiny(), prepared).run()
    with pytest.raises(ValueError, match="holds a run, up to step-00000006"):
        Trainer(tiny(training__resume=False), prepared)
