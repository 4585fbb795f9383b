"""Rank classification against models whose answers are known, and a finetuned cell of a study."""

import json

import numpy as np
import pytest
import torch

from megaarch.config import ConfigError
from megaarch.config.schema import Evaluation
from megaarch.data.dataset import PairRows
from megaarch.data.feature_converters import converter_of
from megaarch.data.row_lengths import longest_example
from megaarch.evaluation import rank_classification, tasks
from megaarch.evaluation.scorer import Scorer, Scores, fits
from megaarch.ingest.tasks.task import Task
from megaarch.ingest.tasks.template import Question
from megaarch.model.loss import TargetLosses
from megaarch.model.transformer import Transformer
from tests.conftest import PRESETS
from tests.evaluation.known_answers import Planted, Uniform


@pytest.fixture
def task(tmp_path):
    """Items i: is it odd? The wording `mute` suits the first half of them."""
    items = [{"i": i, "label": i % 2} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, items)))
    wordings = [
        {"name": "plain", "prompt": "{{ i }} ||| {{ answer_choices[label] }}"},
        {
            "name": "mute",
            "prompt": "number {{ i }} ||| {% if i < 10 %}{{ answer_choices[label] }}{% endif %}",
        },
    ]
    for wording in wordings:
        wording["choices"] = "no ||| it is odd"
    said = {"summary": "odd?", "data": {"test": "test.jsonl"}, "wordings": wordings}
    path = tmp_path / "odd.task.yaml"
    path.write_text(json.dumps(said))
    return path


def scored(task, settings, tokenizer, rule, **more):
    evaluation = Evaluation(tasks=[str(task)], **more)
    planted = Planted(settings, tokenizer, rule)
    [found] = tasks.score(planted, tokenizer, evaluation).values()
    return found, planted


def test_an_item_counts_by_the_share_of_its_wordings_that_are_right(task, tiny, prepared):
    """Right behind `plain`; behind `mute` it always says no."""

    def rule(asked, choice):
        odd = not asked.startswith("number") and int(asked) % 2
        return 0.0 if (choice == "it is odd") == bool(odd) else -1.0

    found, _ = scored(task, tiny("gpt"), prepared.tokenizer, rule)
    wanted = [1.0 if i % 2 == 0 or i >= 10 else 0.5 for i in range(20)]
    assert found.right == wanted and found.accuracy == pytest.approx(np.mean(wanted))
    assert found.by_wording == {"plain": 1.0, "mute": 0.5}
    assert found.items == 20 and found.chance == 0.5
    low, high = found.interval
    assert low < found.accuracy < high


def test_probabilities_are_over_text(task, tiny, prepared):
    """A model of span corruption expects a sentinel, which makes every long choice unlikely."""

    class Expecting(Planted):
        def loglikelihoods(self, pairs):
            text = super().loglikelihoods(pairs).text
            return Scores(text, text - [10.0 * len(answer) for _, answer in pairs])

    planted = Expecting(tiny(), prepared.tokenizer, lambda asked, choice: len(choice))
    [found] = tasks.score(planted, prepared.tokenizer, Evaluation(tasks=[str(task)])).values()
    odd = [i % 2 for i in range(20)]
    assert found.right == odd  # "it is odd" wins, and is right where i is


def test_normalization_is_over_the_bytes_of_a_choice(task, tiny, prepared):
    """Two bytes at -1 each against nine at -0.5: the sum prefers the short one."""
    costs = {"no": -2.0, "it is odd": -4.5}
    found, _ = scored(task, tiny("gpt"), prepared.tokenizer, lambda asked, choice: costs[choice])
    assert found.by_wording["plain"] == 0.5
    assert found.accuracy == pytest.approx(0.5)  # always no: right for the even ones
    assert found.normalized_accuracy == pytest.approx(0.5)  # always odd
    right = Task(task).test[1]["label"] == 1
    assert right and found.right[1] == 0.0


def test_items_and_examples_are_as_many_as_asked_for(task, tiny, prepared):
    found, planted = scored(task, tiny("gpt"), prepared.tokenizer, lambda *pair: 0.0, task_items=3)
    assert found.items == 3
    assert [asked for asked, _ in planted.seen[:4]] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_ranks_choices_in_its_own_form(preset, task, tiny, prepared):
    """A uniform model prefers the choice of fewer tokens."""
    from megaarch.evaluation.scorer import Scorer

    settings = tiny(preset)
    scorer = Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, 4)
    evaluation = Evaluation(tasks=[str(task)], task_items=4)
    [found] = tasks.score(scorer, prepared.tokenizer, evaluation).values()
    assert found.right == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("length", [48, 128])
@pytest.mark.parametrize("objective", [None, "span_corruption", "fill_in_middle"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_long_question_gives_way_at_its_left_end(preset, objective, length, tiny, prepared):
    """To the last token that has room, whatever a form adds: span corruption adds sentinels to the prefix."""
    given = {"model__sequence_length": length} | (
        {"data__objective": objective} if objective else {}
    )
    try:
        settings = tiny(preset, **given)
    except ConfigError:
        pytest.skip(f"{preset} is not trained on {objective}")
    scorer = Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, 4)
    text = " ".join(["one two three"] * 200)
    [(asked, answer)], is_cut = rank_classification.tokens(
        scorer, prepared.tokenizer, Question(text, "yes", ("yes",), 0)
    )
    assert is_cut
    whole = prepared.tokenizer.encode(text)
    assert np.array_equal(asked, whole[-len(asked) :])
    assert np.isfinite(scorer.loglikelihoods([(asked, answer)]).text).all()
    text, positions = longest_example(settings.model, settings.data)
    more = whole[-len(asked) - 1 :].astype(np.int64)
    form = settings, scorer.vocabulary
    assert fits(*form, more[1:], answer, positions) and len(asked) + len(answer) <= text
    assert not fits(*form, more, answer, positions) or len(more) + len(answer) > text


def test_questions_without_input_are_scored_in_any_company(tiny, prepared):
    settings = tiny("t5", data__objective="prefix_lm")
    tokenizer = prepared.tokenizer
    torch.manual_seed(0)
    scorer = Scorer(Transformer(settings.model), settings, tokenizer.vocabulary, 4)
    texts = [("", " opens the door"), ("", " The river"), ("The garden", " opens")]
    pairs = [tuple(tokenizer.encode(text).astype(np.int64) for text in pair) for pair in texts]
    alone, empty, together = (
        np.concatenate([scorer.loglikelihoods(part).text for part in parts])
        for parts in ([[pair] for pair in pairs], [pairs[:2], pairs[2:]], [pairs])
    )
    np.testing.assert_allclose(empty, alone, atol=1e-4)
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_a_finetuned_model_scores_the_end_of_a_choice(preset, tiny, prepared):
    """A choice that begins with another wins where the model ends the other one unlikely."""
    settings = tiny(preset, data__objective="supervised")
    tokenizer, words = prepared.tokenizer, prepared.tokenizer.vocabulary
    short, long = "the stone", "the stone opens"
    follows = len(tokenizer.encode(short))

    class Ends(Uniform):
        """eos is unlikely so early, and all else is as likely as the next."""

        def forward(self, batch, text_tokens):
            nll = torch.full(batch.target_tokens.shape, 1.0)
            ends = torch.nonzero((batch.target_tokens == words.eos) & (batch.target_weights > 0))
            for b, m in ends.tolist():
                before = batch.target_tokens[b, :m].flip(0)
                earlier = (before == words.eos).nonzero()
                length = int(earlier[0]) if len(earlier) else m
                nll[b, m] = 30.0 if length == follows else 0.5
            infinite = nll.masked_fill(batch.target_tokens == words.eos, float("inf"))
            return TargetLosses(nll, nll, infinite)  # eos is no text

    scorer = Scorer(Ends(512), settings, words, rows=4)
    question = Question("which?", long, (short, long), 1)
    encoded, _ = rank_classification.tokens(scorer, tokenizer, question)
    assert all(answer[-1] == words.eos for _, answer in encoded)
    room = scorer.room(max(len(answer) for _, answer in encoded))
    assert room + len(encoded[1][1]) + 1 <= 48 or preset == "t5"
    assert rank_classification._is_right(question, iter(scorer.loglikelihoods(encoded).raw))[0]


def test_a_finetuned_model_ranks_by_probabilities_over_all_tokens(task, tiny, prepared):
    class Raw(Planted):
        def loglikelihoods(self, pairs):
            found = super().loglikelihoods(pairs).text
            return Scores(np.full(len(found), np.inf), found)

    settings = tiny(data__objective="supervised")
    planted = Raw(settings, prepared.tokenizer, lambda asked, choice: len(choice))
    [found] = tasks.score(planted, prepared.tokenizer, Evaluation(tasks=[str(task)])).values()
    assert found.right == [i % 2 for i in range(20)]


def test_a_choice_is_read_behind_its_question(tiny, prepared):
    tokenizer = prepared.tokenizer
    planted = Planted(tiny("gpt"), tokenizer, None)
    pairs, is_cut = rank_classification.tokens(
        planted, tokenizer, Question("a b", "c d", ("c d",), 0)
    )
    assert not is_cut
    assert tokenizer.decode(np.concatenate(pairs[0])) == "a b c d"


def test_another_item_is_another_study(task):
    evaluation = Evaluation(tasks=[str(task)])
    before = tasks.identity(evaluation)
    (task.parent / "test.jsonl").write_text('{"i": 1, "label": 1}\n')
    assert tasks.identity(evaluation) != before


def test_the_commonest_answer_is_told_apart_from_guessing(task, tiny, prepared):
    """Two of three items to train on are odd, and half of those held out."""
    assert scored(task, tiny("gpt"), prepared.tokenizer, lambda *_: 0.0)[0].prior is None
    train = "\n".join(json.dumps({"i": i, "label": int(i % 3 > 0)}) for i in range(30))
    (task.parent / "train.jsonl").write_text(train)
    said = json.loads(task.read_text())
    said["data"]["train"] = "train.jsonl"
    said["wordings"] = said["wordings"][:1]
    task.write_text(json.dumps(said))
    found, _ = scored(task, tiny("gpt"), prepared.tokenizer, lambda *_: 0.0, task_items=7)
    assert found.prior == pytest.approx(3 / 7)  # 1, 3 and 5


@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_a_target_longer_than_a_row_is_cut_as_training_cuts_it(preset, tiny, prepared):
    settings = tiny(preset, data__objective="supervised", model__sequence_length=32)
    scorer = Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, rows=2)
    pairs = [("the stone", " ".join(["river"] * 200)), ("the light", "opens")]
    assert 0 < rank_classification.target_bits(scorer, prepared.tokenizer, pairs) < 20


@pytest.mark.parametrize(
    "limits", [{}, {"data__max_input_length": 9, "data__max_target_length": 6}]
)
@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_pairs_are_cut_as_training_cuts_them(preset, limits, tiny, prepared):
    """Inputs and targets that are both too long, or one of them, or none."""
    settings = tiny(preset, data__objective="supervised", model__sequence_length=24, **limits)
    tokenizer, words = prepared.tokenizer, prepared.tokenizer.vocabulary
    tokens = tokenizer.encode("The river finds the stone near number 4. The garden opens.")
    sizes = [(40, 40), (40, 3), (3, 40), (4, 3), (12, 11), (11, 12), (8, 5)]
    pairs = [tuple(tokenizer.decode(np.resize(tokens, n)) for n in pair) for pair in sizes]
    encoded = [[tokenizer.encode(text) for text in pair] for pair in pairs]
    sequences = [np.append(each, words.eos) for pair in encoded for each in pair]

    class Pairs:
        lengths = np.array(list(map(len, sequences)), dtype=np.int32)

        def get(self, number, start, count):
            return sequences[number][start : start + count]

    rows = PairRows(
        Pairs(), settings.model, settings.data, converter_of(settings.model.architecture), words, 0
    )
    trained = [rows._example(pair) for pair in range(len(sizes))]
    scorer, scored = Scorer(Uniform(512), settings, words, rows=2), []

    def spied(asked):
        scored.extend(each for group in scorer._continuations(asked) for each in group)
        return Scores(np.zeros(len(asked)), np.zeros(len(asked)))

    scorer.loglikelihoods = spied
    rank_classification.target_bits(scorer, tokenizer, pairs)
    assert len(scored) == len(trained)
    for mine, wanted in zip(scored, trained, strict=True):
        assert np.array_equal(mine.target_tokens, wanted.target_tokens[:-1])  # eos is no text
        for one, other in zip(mine.streams, wanted.streams, strict=True):
            assert np.array_equal(one.tokens, other.tokens[: len(one.tokens)])


def test_a_prompt_of_more_spans_than_sentinels_gives_way(tiny, prepared):
    settings = tiny("t5", model__sequence_length=512)
    scorer = Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, rows=2)
    prefix = np.resize(prepared.tokenizer.encode("The river finds the stone"), 500)
    answer = np.array(prefix[:4], dtype=np.int64)
    assert not scorer.holds(prefix, answer)
    kept = prefix[-scorer.room(len(answer)) :]
    assert scorer.holds(kept, answer) and not scorer.holds(prefix[-len(kept) - 1 :], answer)
