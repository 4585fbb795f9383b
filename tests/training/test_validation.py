"""Held-out text scored while a run trains: when, by what, and what a continued run keeps of it."""

import json
import os
import signal

import pytest
import torch

from megaarch import config
from megaarch.cli.main import main
from megaarch.config.schema import Evaluation
from megaarch.errors import UserError
from megaarch.evaluation import validation
from megaarch.evaluation.items import cut
from megaarch.evaluation.rank_classification import target_bits
from megaarch.evaluation.scorer import Scorer
from megaarch.evaluation.yardsticks import continuation_bits
from megaarch.ingest.prepare import prepare
from megaarch.training.preemption import Stopped
from megaarch.training.trainer import Trainer
from tests.conftest import made_up_text


def points(folder):
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def test_text_is_scored_every_so_many_steps_and_at_both_ends(tiny, prepared, tmp_path):
    """The values go to heldout.jsonl and change nothing of the run."""
    plain = Trainer(tiny(logging__directory=str(tmp_path / "plain")), prepared)
    plain.run()
    settings = tiny(training__eval_every=4)
    score = validation.validate(settings, prepared)
    trainer = Trainer(settings, prepared, hold_out=score, shares=(1.0,))
    trainer.run()
    found = points(tmp_path / "run")
    assert [point["step"] for point in found] == [0, 4, 6]
    assert found[-1]["heldout"] == score(trainer.engine, trainer.progress) > 0
    assert found[0]["heldout"] != found[-1]["heldout"] and found[0]["flops"] == 0
    assert found[-1]["flops"] == trainer.progress.flops
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_a_continued_run_drops_what_it_scores_again(tiny, prepared, tmp_path):
    settings = tiny(training__eval_every=1, training__save_every=3)
    score = validation.validate(settings, prepared)
    dying = Trainer(settings, prepared, hold_out=score)
    dying.watch = lambda step: 1 / (step.progress.step - 5)
    with pytest.raises(ZeroDivisionError):
        dying.run()
    before = points(tmp_path / "run")
    assert [point["step"] for point in before] == [0, 1, 2, 3, 4]
    Trainer(settings, prepared, hold_out=score).run()
    after = points(tmp_path / "run")
    assert [point["step"] for point in after] == [0, 1, 2, 3, 4, 5, 6]
    assert [point["heldout"] for point in after[:5]] == [point["heldout"] for point in before]


@pytest.mark.parametrize("dies_at", [0, 4, 6])
def test_what_dies_while_it_scores_loses_no_step_and_scores_then(dies_at, tiny, prepared, tmp_path):
    settings = tiny(training__eval_every=2, training__save_every=2)
    score, whole = validation.validate(settings, prepared), tmp_path / "whole"
    told = settings.logging.model_copy(update={"directory": str(whole)})
    Trainer(settings.model_copy(update={"logging": told}), prepared, hold_out=score).run()

    def dying(engine, progress):
        return 1 / 0 if progress.step == dies_at else score(engine, progress)

    with pytest.raises(ZeroDivisionError):
        Trainer(settings, prepared, hold_out=dying).run()
    again = Trainer(settings, prepared, hold_out=score)
    assert again.progress.step == dies_at
    again.run()
    for found, wanted in zip(points(tmp_path / "run"), points(whole), strict=True):
        assert found | {"seconds": 0} == wanted | {"seconds": 0}


def test_a_signal_is_answered_before_the_score_that_is_due(tiny, prepared, tmp_path):
    settings = tiny(training__eval_every=3)
    score = validation.validate(settings, prepared)
    stopping = Trainer(settings, prepared, hold_out=score)
    stopping.watch = lambda step: step.progress.step == 3 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="saved at step 3"):
        stopping.run()
    assert [point["step"] for point in points(tmp_path / "run")] == [0]
    Trainer(settings, prepared, hold_out=score).run()
    assert [point["step"] for point in points(tmp_path / "run")] == [0, 3, 6]


def test_train_scores_continuations_of_documents_from_all_over_the_held_out_text(raw, tmp_path):
    mine = {name: dict(section) for name, section in raw.items()}
    mine["logging"]["directory"] = str(tmp_path / "run")
    mine["training"] |= {"eval_every": 3, "eval_documents": 5}
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(mine))
    assert main(["train", str(file)]) == 0
    assert [point["step"] for point in points(tmp_path / "run")] == [0, 3, 6]
    settings = config.resolve(mine)
    text = prepare(settings.data, settings.model.vocabulary_size)
    trainer = Trainer(settings, text)
    assert trainer.progress.step == 6
    evaluation = Evaluation(prefix_tokens=24, continuation_tokens=6)  # half and an eighth of a row
    every = cut(text.heldout, text.tokenizer, evaluation)
    firsts = sorted(
        {item.document: item for item in every[::-1]}.values(), key=lambda x: x.document
    )
    items = [firsts[i * len(firsts) // 5] for i in range(5)]
    assert items[-1].document > 0.7 * len(text.heldout) > 0
    scorer = Scorer(trainer.engine, settings, text.tokenizer.vocabulary, 2)
    value = continuation_bits(scorer, items)
    assert points(tmp_path / "run")[-1]["heldout"] == pytest.approx(value, rel=1e-6)


def test_a_run_of_pairs_is_scored_on_held_out_targets(tiny, tmp_path):
    pairs = [{"input": made_up_text(i, 6), "target": made_up_text(-i, 3)} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = {"data__source": str(tmp_path / "pairs.jsonl"), "data__objective": "supervised"}
    settings = tiny("t5", **data, training__eval_every=6)
    text = prepare(settings.data, settings.model.vocabulary_size)
    trainer = Trainer(settings, text, hold_out=validation.validate(settings, text))
    trainer.run()
    scorer = Scorer(trainer.engine, settings, text.tokenizer.vocabulary, 4)
    pairs = text.heldout_pairs
    assert len(pairs) < 64
    value = target_bits(scorer, text.tokenizer, pairs)
    assert points(tmp_path / "run")[-1]["heldout"] == pytest.approx(value, rel=1e-6)


def test_no_more_held_out_text_is_read_than_is_scored(prepared, monkeypatch):
    whole = prepared.heldout
    monkeypatch.setattr(
        "megaarch.ingest.prepared_data.read_bytes", lambda *_: pytest.fail("all of it is read")
    )
    few, half = (prepared.some_heldout(n).documents for n in (3, len(whole) // 2))
    assert few[0] == whole[0] and len(few) == 3 and whole.index(few[2]) > len(whole) / 2
    assert len(half) > len(whole) / 3 and half == sorted(set(half), key=whole.index)
    assert prepared.some_heldout(50 * len(whole)).documents == whole


def test_data_that_hold_nothing_out_are_one_sentence(tiny, prepared, monkeypatch):
    settings = tiny(training__eval_every=2)
    empty = type(prepared.some_heldout(0))([])
    monkeypatch.setattr(type(prepared), "some_heldout", lambda *_: empty)
    with pytest.raises(UserError, match=r"training.eval_every: this data has no held-out text"):
        validation.validate(settings, prepared)


def test_documents_that_are_all_too_short_are_one_sentence(tiny, prepared, monkeypatch):
    short = type(prepared.some_heldout(0))(prepared.some_heldout(3).rows)
    short.__dict__["documents"] = ["two words"] * 3
    monkeypatch.setattr(type(prepared), "some_heldout", lambda *_: short)
    with pytest.raises(UserError, match=r"training.eval_every: none of 3 held-out documents has"):
        validation.validate(tiny(training__eval_every=2), prepared)


def test_items_are_shortened_to_what_a_decoder_of_whole_texts_holds(tiny, prepared):
    given = {"model__sequence_length": 96, "model__target_length": 32, "training__eval_every": 3}
    settings = tiny("bart", **given)
    trainer = Trainer(settings, prepared, hold_out=validation.validate(settings, prepared))
    assert trainer.run().step == 6


def test_a_run_that_scores_nothing_leaves_a_file_of_that_name(tiny, prepared, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heldout.jsonl").write_text('{"text": "mine"}\n')
    Trainer(tiny(training__steps=1), prepared).run()
    assert (tmp_path / "run" / "heldout.jsonl").read_text() == '{"text": "mine"}\n'
