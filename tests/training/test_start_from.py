"""What a run takes from the run it starts from: the optimizer's state, its step and its totals."""

import json
from pathlib import Path

import pytest
import torch

from megaarch.config import ConfigError
from megaarch.errors import UserError
from megaarch.training import checkpoint
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
    record = checkpoint.read_record(path).raw()
    checkpoint.save_weights(tmp_path / "run", 7, checkpoint.read_weights(path), at(record, 7))
    with pytest.raises(UserError, match="step-00000007 holds weights alone: leave it out"):
        started(tiny, prepared, tmp_path)


def at(record, step):
    return record | {"progress": record["progress"] | {"step": step}}
