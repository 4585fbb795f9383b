"""Exact match: a model that has learned its answers, one that has not, and layouts that cannot answer."""

import json

import pytest

from megaarch.config.schema import Evaluation
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.evaluation import exact_match, tasks
from megaarch.evaluation.scorer import Scorer
from megaarch.ingest.prepare import prepare
from megaarch.training.trainer import Trainer

ANSWER, OTHERS = "the stone", ("the river", "near winter", "a garden")


@pytest.fixture
def task(tmp_path):
    """Items of one answer, each asked twice, once with choices."""
    asked = [f"number {i}: what does the river find near the garden" for i in range(60)]
    for name, kept in (("train", asked), ("test", asked[:4])):
        lines = [json.dumps({"asked": a, "answer": ANSWER}) for a in kept]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    free = {"name": "free", "prompt": "{{ asked }} ||| {{ answer }}"}
    ranked = free | {"name": "ranked", "choices": " ||| ".join((ANSWER, *OTHERS))}
    said = {
        "summary": "which?",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "wordings": [free, ranked],
    }
    path = tmp_path / "which.task.yaml"
    path.write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_a_model_that_has_learned_its_answers_gives_them(preset, task, tiny, prepared):
    tokenizer = prepared.tokenizer.path
    settings = tiny(
        preset,
        data__source=str(task),
        data__tokenizer=str(tokenizer),
        data__objective="supervised",
        training__steps=60,
        training__learning_rate=1e-2,
    )
    trainer = Trainer(settings, prepare(settings.data, settings.model.vocabulary_size))
    scorer = Scorer(trainer.engine, settings, prepared.tokenizer.vocabulary, 4)
    evaluation = Evaluation(tasks=[str(task)])

    def score():
        [found] = tasks.score(scorer, prepared.tokenizer, evaluation).values()
        return found

    before = score()
    assert before.exact_match == before.by_wording["free"] == 0.0
    assert before.accuracy == before.by_wording["ranked"] and before.chance == 0.25
    trainer.run()
    after = score()
    assert after.exact_match == 1.0 and after.accuracy == 1.0
    assert trainer.model.training, "it goes on as it was"


def test_a_task_without_choices_has_its_matches_as_accuracy(task, tiny, prepared, monkeypatch):
    said = json.loads(task.read_text())
    said["wordings"] = said["wordings"][:1]
    task.write_text(json.dumps(said))
    given = [(True, False), (False, True), (True, False), (True, False)]
    monkeypatch.setattr(exact_match, "right", lambda scorer, tokenizer, asked, evaluation: given)
    evaluation = Evaluation(tasks=[str(task)])
    [found] = tasks.score(None, prepared.tokenizer, evaluation).values()
    assert found.right == [1.0, 0.0, 1.0, 1.0] and found.chance is None
    assert found.accuracy == found.exact_match == 0.75 and found.shortened == 0.25
    low, high = found.exact_match_interval
    assert low < 0.75 < high


def test_a_layout_that_cannot_generate_says_so(task, tiny, prepared, monkeypatch):
    settings = tiny("gpt")
    trainer = Trainer(settings, prepared)
    scorer = Scorer(trainer.engine, settings, prepared.tokenizer.vocabulary, 4)
    monkeypatch.setattr(Grid, "size", lambda self, axis: 2 if axis == "pp" else 1)
    evaluation = Evaluation(tasks=[str(task)])
    with pytest.raises(UserError, match="pipeline and context parallelism do not generate"):
        tasks.score(scorer, prepared.tokenizer, evaluation)
