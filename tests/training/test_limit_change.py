"""A run that continues with another limit: what that does to its learning rate is told, and no other
setting of the schedule can change."""

import json
import re
from pathlib import Path

import pytest

from megaarch.training.limit import Limit
from megaarch.training.trainer import Trainer

TOLD = re.compile(r"from ([\d.e+-]+) at step (\d+) to ([\d.e+-]+) at step (\d+)$")
FLOPS, SEEN, TARGETS = "flops", "seen_tokens", "target_tokens"


def lines(settings):
    text = (Path(settings.logging.directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def limited(tiny, limit, **more):
    """Settings that end at so many steps, or at (match, amount)."""
    if isinstance(limit, int):
        return tiny(training__steps=limit, **more)
    kind, amount = limit
    budget = {"match": kind, "amount": amount}
    return tiny(training__steps=None, training__budget=budget, **more)


def cost(tiny, prepared, kind):
    """What a step costs; all of these rows are full."""
    trainer = Trainer(tiny(logging__directory="unused"), prepared)
    trainer.step(trainer.steps[0])
    return getattr(trainer.progress, kind)


@pytest.mark.parametrize(
    "schedule, before, after",
    [
        ("cosine", 4, 12),
        ("cosine", 4, (FLOPS, 12)),
        ("cosine", (FLOPS, 4), (FLOPS, 12)),
        ("cosine", (FLOPS, 4), (SEEN, 12)),
        ("cosine", (TARGETS, 4), 12),
        ("wsd", 4, 12),
        ("inverse_square_root", (SEEN, 4), (SEEN, 12)),
        ("constant", 4, 12),
    ],
)
def test_both_rates_of_a_run_that_goes_further_are_told(
    schedule, before, after, tiny, prepared, tmp_path, caplog
):
    def given(limit):
        if not isinstance(limit, int):  # so many steps' worth of it
            limit = limit[0], limit[1] * cost(tiny, prepared, limit[0])
        return limited(tiny, limit, training__schedule=schedule, training__warmup=0.5)

    settings = given(before)
    Trainer(settings, prepared).run()
    caplog.clear()
    longer = given(after)
    Trainer(longer, prepared).run()
    (said,) = [r.getMessage() for r in caplog.records if "the run's limit was" in r.getMessage()]
    was, step, rate, following = TOLD.search(said).groups()
    assert (int(step), int(following)) == (4, 5)
    assert f"was {Limit.of(settings.training)} and is {Limit.of(longer.training)}" in said
    ran = lines(longer)
    assert len(ran) == 12
    assert float(was) == pytest.approx(ran[3]["learning_rate"], rel=0.01)
    assert float(rate) == pytest.approx(ran[4]["learning_rate"], rel=0.01)


def test_a_limit_is_told_in_its_unit():
    limits = [Limit("step", 20000), Limit(FLOPS, 2.4e20), Limit(SEEN, 1e9)]
    assert list(map(str, limits)) == ["20,000 steps", "2.4e+20 FLOPs", "1e+09 seen tokens"]


def test_the_same_limit_and_one_that_is_reached_are_no_news(tiny, prepared, caplog):
    Trainer(tiny(training__save_every=2), prepared).run()
    Trainer(tiny(), prepared).run()
    Trainer(tiny(training__steps=3), prepared).run()
    assert "the run's limit was" not in caplog.text
    Trainer(tiny(training__steps=7), prepared)
    assert "the run's limit was 6 steps and is 7 steps" in caplog.text


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", 1e-3),
        ("schedule", "wsd"),
        ("warmup", 0.2),
        ("warmup", 3),
        ("decay", 0.5),
        ("minimum_learning_rate", 0.0),
    ],
)
def test_no_other_setting_of_the_schedule_changes_on_the_way(name, value, tiny, prepared):
    Trainer(tiny(), prepared).run()
    with pytest.raises(ValueError, match=rf"other settings: training\.{name} was .* and is"):
        Trainer(tiny(training__steps=9, **{f"training__{name}": value}), prepared)
