"""What a run takes from the run it starts from: the optimizer's state, its step and its totals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaarch.checkpoint import checkpoint, manifest
from megaarch.checkpoint.record import CheckpointRecord
from megaarch.config import ConfigError
from megaarch.errors import UserError
from megaarch.training.trainer import Trainer

# steps of the whole run, and those that it decays over
WSD = {"training__schedule": "wsd", "training__warmup": 3.0, "model__dropout": 0.1}


def metrics(settings):
    path = Path(settings.logging.directory) / "metrics.jsonl"
    kept = ("step", "loss", "gradient_norm", "learning_rate", "flops", "seen_tokens")
    return [[json.loads(line)[k] for k in kept] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_annealed_branches_of_one_run_equal_uninterrupted_runs_bit_for_bit(
    preset, optimizer, tiny, prepared, tmp_path
):
    """Losses, gradient norms, rates, counts and every tensor of weights and optimizer."""
    given = WSD | {"training__optimizer": optimizer}
    trunk = tiny(
        preset,
        training__save_every=3,
        training__keep_checkpoints=0,
        training__steps=9,
        training__decay=0.0,
        logging__directory=str(tmp_path / "trunk"),
        **given,
    )
    Trainer(trunk, prepared).run()
    for step, steps in ((6, 9), (9, 13)):
        decay = {"training__steps": steps, "training__decay": 1 - step / steps}
        whole = tiny(preset, logging__directory=str(tmp_path / f"whole{step}"), **given, **decay)
        Trainer(whole, prepared).run()
        branch = tiny(
            preset,
            logging__directory=str(tmp_path / f"branch{step}"),
            training__start_from=str(tmp_path / f"trunk/checkpoints/step-{step:08d}"),
            training__start_optimizer=True,
            **given,
            **decay,
        )
        trainer = Trainer(branch, prepared)
        assert trainer.progress.step == step and trainer.is_new
        trainer.run()
        rates = [rate for *_, rate, _, _ in metrics(whole)]
        assert rates[step - 1] == max(rates) and min(rates[step:]) < 0.5 * max(rates)
        assert metrics(branch) == metrics(whole)[step:]
        assert_same_state(tmp_path / f"whole{step}", tmp_path / f"branch{step}")


def assert_same_state(*runs):
    states = [checkpoint.storage.read_whole(checkpoint.newest(run) / "state") for run in runs]
    assert states[0].keys() == states[1].keys()
    assert any(name.startswith("optimizer.") for name in states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def started(tiny, prepared, tmp_path, **given):
    return Trainer(
        tiny(
            training__start_from=str(tmp_path / "run"),
            logging__directory=str(tmp_path / "child"),
            **{"training__start_optimizer": True, "training__steps": 9} | given,
        ),
        prepared,
    )


def test_a_run_that_took_an_optimizer_along_resumes_and_tells_its_own_share(
    tiny, prepared, tmp_path
):
    Trainer(tiny(), prepared).run()
    given = {"training__save_every": 2}
    child = started(tiny, prepared, tmp_path, **given)

    class Stop(Exception):
        pass

    def stop(step):
        if step.progress.step == 9:
            raise Stop

    child.watch = stop
    with pytest.raises(Stop):
        child.run()
    again = started(tiny, prepared, tmp_path, **given)
    assert (again.progress.step, again.inherited.step, again.is_new) == (8, 6, False)
    total = again.run()
    assert total.since(again.inherited).step == 3
    parent = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert total.since(again.inherited).flops == total.flops - parent["flops"]


def test_a_run_that_continues_says_that_it_reads_no_other_weights(tiny, prepared, tmp_path, caplog):
    Trainer(tiny(), prepared).run()
    child = {"logging__directory": str(tmp_path / "child")}
    begun = child | {"training__start_from": str(tmp_path / "run")}
    Trainer(tiny(**begun), prepared).run()
    for given in (begun, child):
        Trainer(tiny(**given), prepared)
    assert "is not read" not in caplog.text
    Trainer(tiny(**child, training__start_from="other"), prepared)
    assert f"the run began from {tmp_path / 'run'} and continues, so that" in caplog.text
    Trainer(tiny(training__start_from=str(tmp_path / "child")), prepared)
    assert f"training.start_from={tmp_path / 'child'} is not read" in caplog.text


def test_held_out_points_lie_within_what_a_run_adds(tiny, prepared, tmp_path):
    Trainer(tiny(), prepared).run()
    seen = []
    settings = tiny(
        training__start_from=str(tmp_path / "run"),
        logging__directory=str(tmp_path / "child"),
        training__start_optimizer=True,
        training__steps=10,
    )
    Trainer(
        settings,
        prepared,
        hold_out=lambda _, progress: seen.append(progress.step),
        shares=(0, 0.5, 1),
    ).run()
    assert seen == [6, 8, 10]


def test_an_inherited_optimizer_keeps_its_state_and_the_childs_own_options(
    tiny, prepared, tmp_path
):
    parent = Trainer(tiny(training__weight_decay=0.1), prepared)
    parent.run()
    child = started(tiny, prepared, tmp_path, training__weight_decay=0.3, training__beta2=0.99)
    options = [(group["weight_decay"], group["betas"]) for group in child.optimizer.param_groups]
    assert options == [(0.3, (0.9, 0.99)), (0.0, (0.9, 0.99))]
    moments = [
        [trainer.optimizer.state[p]["exp_avg_sq"] for p in trainer.model.parameters()]
        for trainer in (parent, child)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_an_optimizer_that_cannot_be_taken_along_is_told(tiny, prepared, tmp_path):
    with pytest.raises(ConfigError, match="training.start_optimizer: is the state of the run that"):
        tiny(training__start_optimizer=True)
    Trainer(tiny(), prepared).run()
    with pytest.raises(UserError, match="state of adamw, and training.optimizer is adafactor"):
        started(tiny, prepared, tmp_path, training__optimizer="adafactor")
    with pytest.raises(UserError, match="has already come to 6 steps, for training.steps"):
        started(tiny, prepared, tmp_path, training__steps=6)
    path = checkpoint.newest(tmp_path / "run")
    record = checkpoint.read_record(path)
    checkpoint.save_weights(tmp_path / "run", checkpoint.read_weights(path), at(record, 7))
    with pytest.raises(UserError, match="step-00000007 holds weights alone: leave it out"):
        started(tiny, prepared, tmp_path)


def at(record, step):
    progress = record.progress.model_copy(update={"step": step})
    return record.model_copy(update={"progress": progress})


# what an encoder-decoder takes of a decoder, and what GLM's second axis begins with


def trained(tiny, prepared, tmp_path, preset="gpt", **given):
    """The weights of a run in tmp_path / "run", and its trainer."""
    trainer = Trainer(tiny(preset, **given), prepared)
    trainer.run()
    return weights_of(trainer), trainer


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


LEARNED = {"model__position_encoding": "learned", "model__learned_positions": 56}
T5GEMMA = {"rope": {}, "learned": LEARNED, "biases": {"model__bias": True, **LEARNED}}
OF_STREAMS = ("positions", "embedding_norm")


@pytest.mark.parametrize("form", T5GEMMA)
@pytest.mark.parametrize("parent", ["gpt", "unilm"])
def test_an_encoder_decoder_takes_both_stacks_of_a_decoder_and_cross_attention_of_its_own(
    parent, form, tiny, prepared, tmp_path
):
    """Every tensor of T5Gemma's balanced form, by a second writing of the layouts."""
    given = T5GEMMA[form] | {"model__embedding_normalization": True}
    theirs, _ = trained(tiny, prepared, tmp_path, parent, **given)
    start = {"training__start_from": str(tmp_path / "run")}
    child = Trainer(
        tiny("t5", logging__directory=str(tmp_path / "child"), **given, **start), prepared
    )
    mine, used = weights_of(child), set()
    heads, keys, size, layers = 4, 2, 8, 2
    for name, value in mine.items():
        wanted = name.replace("encoder_norm", "norm")
        for table in OF_STREAMS:
            wanted = wanted.replace(f"{table}.encoder", f"{table}.decoder")
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            wanted = f"layers.{int(index) % layers}.{rest.replace('cross_', '')}"
        rows = slice(None)
        if wanted.split(".")[-2] in ("q", "kv"):
            blocks = [["q"] * (heads // keys) + ["k", "v"]] * keys
            kinds = [kind for group in blocks for kind in group for _ in range(size)]
            part = wanted.split(".")[-2]
            rows = [i for i, kind in enumerate(kinds) if kind in part]
            wanted = wanted.replace(f".{part}.", ".qkv.")
        used.add(wanted)
        assert torch.equal(value, theirs[wanted][rows]), name
    assert used == theirs.keys()


def test_an_encoder_decoder_that_starts_from_a_decoder_begins_below_a_new_one(
    tiny, prepared, tmp_path
):
    Trainer(tiny(training__steps=20), prepared).run()
    losses = []
    for number, start in enumerate(({"training__start_from": str(tmp_path / "run")}, {})):
        given = {"logging__directory": str(tmp_path / str(number)), "training__steps": 1} | start
        settings = tiny("t5", data__objective="prefix_lm", **given)
        Trainer(settings, prepared).run()
        losses.append(metrics(settings)[0][1])
    assert losses[0] < losses[1] - 0.3


def test_cross_attention_is_drawn_anew_on_demand(tiny, prepared, tmp_path):
    theirs, _ = trained(tiny, prepared, tmp_path)
    given = {"training__start_from": str(tmp_path / "run")}
    drawn = {"training__start_cross_attention": "random", "logging__directory": str(tmp_path / "b")}
    mine = weights_of(Trainer(tiny("t5", **given, **drawn), prepared))
    fresh = weights_of(Trainer(tiny("t5", logging__directory=str(tmp_path / "c")), prepared))
    crossed = [name for name in mine if ".cross_attention" in name]
    assert len(crossed) == 2 * 4
    assert all(torch.equal(mine[name], fresh[name]) for name in crossed)
    assert torch.equal(
        mine["layers.3.attention.qkv.weight"], theirs["layers.1.attention.qkv.weight"]
    )
    for wrong in ({}, given):
        with pytest.raises(ConfigError, match="start_cross_attention: is of an encoder_decoder"):
            tiny("gpt", training__start_cross_attention="random", **wrong)


def test_glm_starts_from_gpts_table_and_computes_what_gpt_does(tiny, prepared, tmp_path):
    theirs, parent = trained(tiny, prepared, tmp_path, **LEARNED)
    given = LEARNED | {"training__start_from": str(tmp_path / "run")}
    child = Trainer(tiny("glm", logging__directory=str(tmp_path / "child"), **given), prepared)
    mine = weights_of(child)
    assert mine.keys() - theirs.keys() == {"positions.decoder.1.weight"}
    assert not mine["positions.decoder.1.weight"].any()
    batch = parent.steps[0][0]
    [stream] = batch.streams
    one = stream.positions
    two = replace(stream, positions=torch.cat((one, one.flip(1)), -1))
    with torch.no_grad():
        logits = child.model.logits(replace(batch, streams=(two,)))
        assert torch.equal(logits, parent.model.logits(batch))
    child.run()
    assert child.model.get_parameter("positions.decoder.1.weight").any()


def test_weights_that_cannot_pass_are_told(tiny, prepared, tmp_path):
    Trainer(tiny(), prepared).run()
    start = {
        "training__start_from": str(tmp_path / "run"),
        "logging__directory": str(tmp_path / "child"),
    }
    with pytest.raises(UserError, match="there are 2 there and 2 and 3 here: make them equal"):
        Trainer(tiny("t5", model__decoder_layers=3, **start), prepared)
    with pytest.raises(UserError, match="and 2 here, and RoPE divides the frequencies of a head"):
        Trainer(tiny("glm", **start), prepared)
    along = {"training__start_optimizer": True, "training__steps": 9}
    with pytest.raises(
        UserError, match="has no state of encoder_norm.weight, which starts from other"
    ):
        Trainer(tiny("t5", **start, **along), prepared)


def test_a_child_draws_other_samples_than_all_before_it(tiny, prepared, tmp_path):
    """With its parent's it would see again what the weights have learned of; one that takes the optimizer
    along goes on in them, and one that was stopped in its own."""

    def run(name, parent=None, **given):
        start = {"training__start_from": str(tmp_path / parent)} if parent else {}
        where = {"logging__directory": str(tmp_path / name)}
        trainer = Trainer(tiny("t5", **{"training__steps": 4, **start, **where, **given}), prepared)
        tokens = trainer.steps[1][0].streams[0].tokens
        trainer.run()
        return trainer.generation, tokens

    longer = {"training__steps": 6}
    found = {
        "first": run("first"),
        "child": run("child", "first"),
        "grandchild": run("grandchild", "child"),
        "same": run("same", "child", training__start_optimizer=True, **longer),
        "again": run("child", "first", **longer),
    }
    generations = {name: generation for name, (generation, _) in found.items()}
    assert generations == {"first": 0, "child": 1, "grandchild": 2, "same": 1, "again": 1}
    for name, (generation, tokens) in found.items():
        for other, (its, theirs) in found.items():
            assert torch.equal(tokens, theirs) is (generation == its), (name, other)


def test_a_child_that_an_earlier_version_began_goes_on_in_its_samples(tiny, prepared, tmp_path):
    parent = {"logging__directory": str(tmp_path / "parent"), "training__steps": 2}
    Trainer(tiny("gpt", **parent), prepared).run()
    child = {"training__start_from": str(tmp_path / "parent")}
    Trainer(tiny("gpt", training__steps=2, **child), prepared).run()
    path = checkpoint.newest(tmp_path / "run")
    record = json.loads((path / "progress.json").read_text())
    assert record.pop("generation") == 1
    (path / manifest.MANIFEST).unlink()
    (path / "progress.json").unlink()
    manifest.bind(path, manifest.seal(path), CheckpointRecord.model_validate(record))
    assert Trainer(tiny("gpt", training__steps=3, **child), prepared).generation == 0
