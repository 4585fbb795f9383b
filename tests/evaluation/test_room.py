"""Prompts are as long as training rows hold, the same for every cell, and lose whole examples first."""

import json

import numpy as np
import pytest

from megaarch.config.schema import Evaluation
from megaarch.data.example import generator
from megaarch.data.feature_converters import converted_continuation, converter_of
from megaarch.data.row_lengths import segmentations
from megaarch.errors import UserError
from megaarch.evaluation import exact_match, rank_classification, tasks
from megaarch.evaluation.heldout_scores import Heldout, TaskScore, shortened_prompts
from megaarch.evaluation.scorer import Room, Scorer, fitted, form_marks, row_limit
from megaarch.ingest.tasks.template import Question, with_shots
from megaarch.training.trainer import Trainer
from tests.conftest import PRESETS
from tests.evaluation.known_answers import Planted, Uniform

WORDS = "The river finds the stone near number 4."
CHOICES = ("yes", "the light opens", "no")


def asked(scorer, tokenizer, question):
    """The prompt that each choice has, which is one."""
    pairs, is_cut = rank_classification.tokens(scorer, tokenizer, question)
    first = pairs[0][0]
    assert all(np.array_equal(first, prompt) for prompt, _ in pairs)
    return first, is_cut


def scorer_of(settings, prepared, room=None):
    return Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, 4, room)


def reach(made):
    """Positions of each stream on the first axis, which counts text; GLM's second one counts within an
    answer."""
    return [int(s.positions[:, 0].max(initial=-1)) + 1 for s in made.streams]


def question_of(shots, words=WORDS):
    examples = [Question(f"Example {n}: {WORDS}", "yes") for n in range(shots)]
    return with_shots(Question(words, "yes", CHOICES, 0), examples)


@pytest.mark.parametrize("words_of_answer", [1, 9, 17])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_stream_is_fed_positions_that_training_rows_lack(
    preset, words_of_answer, tiny, prepared
):
    """Rows are drawn as training draws them. GLM's longest are rare, so a twentieth more is allowed."""
    settings = tiny(preset, model__sequence_length=128, data__sentinels=64)
    words, convert = prepared.tokenizer.vocabulary, converter_of(settings.model.architecture)
    rng, trained, raws = np.random.default_rng(0), [], []
    for _, row in segmentations(settings.model, settings.data):
        raws.append(row.raw)
        for n in range(100):
            text = rng.choice(np.flatnonzero(words.text), row.raw)
            for objective in row.objectives:
                made = convert(objective(text, words, generator(0, n)), words)
                trained.append(reach(made))
    scorer, said = scorer_of(settings, prepared), "yes " * words_of_answer
    [(prompt, answer)], _ = rank_classification.tokens(
        scorer, prepared.tokenizer, Question(WORDS * 40, said, (said,), 0)
    )
    [examples] = scorer._continuations([(prompt, answer)])
    fed = [reach(example) for example in examples]
    assert (np.max(fed, axis=0) <= 1.05 * np.max(trained, axis=0)).all()
    assert len(prompt) + len(answer) <= max(raws)


def test_every_cell_is_asked_the_same(tiny, prepared):
    """One has rows of 128, one an encoder's of 48, one an objective of less text a row."""
    cells = [
        tiny("gpt", model__sequence_length=128),
        tiny("t5", model__sequence_length=48),
        tiny("xlnet", model__sequence_length=64),
        tiny("prefix_lm", data__objective="supervised", model__sequence_length=128),
    ]
    words = prepared.tokenizer.vocabulary
    room = Room([(settings, words) for settings in cells])
    question = Question(WORDS * 30, "yes", CHOICES, 0)
    found = []
    for settings in cells[:3]:
        prompt, is_cut = asked(scorer_of(settings, prepared, room), prepared.tokenizer, question)
        assert is_cut
        found.append(prompt)
    assert all(np.array_equal(found[0], each) for each in found)
    alone = [len(asked(scorer_of(s, prepared), prepared.tokenizer, question)[0]) for s in cells[:3]]
    assert len(found[0]) == min(alone) < max(alone)
    assert all(room(n) <= Room([(s, words)])(n) for s in cells for n in (1, 9))


def test_an_encoder_needs_no_place_for_what_its_decoder_reads(tiny, prepared):
    """Finetuned on pairs: the continuation stands in the decoder, so the encoder's row is the prompt's."""
    words = prepared.tokenizer.vocabulary
    one = Room([(tiny("t5", data__objective="supervised", model__sequence_length=48), words)])
    assert one(1) == one(20) == 47  # and eos
    limited = tiny("t5", data__objective="supervised", data__max_input_length=30)
    assert Room([(limited, words)])(1) == 29
    decoder = Room([(tiny("gpt", data__objective="supervised", model__sequence_length=48), words)])
    assert decoder(20) == decoder(1) - 19


def test_examples_are_dropped_whole_the_oldest_first(tiny, prepared):
    tokenizer = prepared.tokenizer
    lengths = [len(tokenizer.encode(question_of(n).input)) for n in range(6)]
    scorer = scorer_of(tiny("gpt", model__sequence_length=lengths[3] + 10), prepared)
    assert lengths[3] < scorer.room(6) < lengths[4]
    question = question_of(5)
    prompt, is_cut = asked(scorer, tokenizer, question)
    assert is_cut and len(prompt) > lengths[2]
    whole = tokenizer.decode(prompt).strip()
    assert whole.startswith("Example 2:") and question.input.endswith(whole)
    prompt, is_cut = asked(scorer, tokenizer, question_of(3))
    assert not is_cut and tokenizer.decode(prompt).strip() == question_of(3).input
    # a question that is too long by itself gives way at its left end
    prompt, is_cut = asked(scorer, tokenizer, question_of(5, WORDS * 40))
    assert is_cut and "Example" not in tokenizer.decode(prompt)
    assert (WORDS * 40).endswith(tokenizer.decode(prompt).strip())


def test_the_share_of_shortened_prompts_is_kept_and_said(tmp_path, tiny, prepared):
    """Three of the four questions are longer than the row; behind one example all are."""
    items = [{"text": WORDS * n, "label": n % 2} for n in (1, 30, 31, 32)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    wording = {"name": "plain", "prompt": "{{ text }} ||| {{ answer_choices[label] }}"}
    said = {
        "summary": "which?",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "wordings": [wording | {"choices": "no ||| yes"}],
    }
    path = tmp_path / "which.task.yaml"
    path.write_text(json.dumps(said))
    scorer = Planted(tiny("gpt"), prepared.tokenizer, lambda *pair: 0.0)

    def score(**more):
        evaluation = Evaluation(tasks=[str(path)], **more)
        return tasks.score(scorer, prepared.tokenizer, evaluation)

    assert score(task_items=1)["which"].shortened == 0.0
    assert shortened_prompts([score(task_items=1)]) is None
    found = score(shots=[0, 1])
    assert found["which"].shortened == 0.75
    assert found["which"].by_shots["1"].shortened >= 0.75
    told = shortened_prompts([score(task_items=1), found])
    assert "75.0% with 0 examples" in told and "with 1 examples" in told
    assert "75.0%." in shortened_prompts([score()])
    # a record of an earlier version counts none
    old = Heldout.model_validate(
        {"continuation_bits_per_byte": 2.0, "tasks": {"a": {"accuracy": 0.5}}}
    )
    assert old.tasks["a"].shortened is None and shortened_prompts([old.tasks]) is None
    assert "shortened" not in TaskScore(accuracy=None).as_json()


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "bert"])
def test_an_answer_of_the_longest_target_can_be_generated(preset, tiny, prepared):
    """Behind a question that fills the room, with as many learned positions as rows have."""
    rows = {"model__sequence_length": 64} | (
        {"model__target_length": 64} if preset == "bart" else {}
    )
    settings = tiny(preset, model__position_encoding="learned", data__sentinels=32, **rows)
    question = Question(WORDS * 20, "the stone opens")
    scorer = Scorer(
        Trainer(settings, prepared).engine, settings, prepared.tokenizer.vocabulary, rows=2
    )
    evaluation = Evaluation(tasks=["x"])
    [(hit, is_cut)] = exact_match.right(scorer, prepared.tokenizer, [question], evaluation)
    assert is_cut and hit in (True, False)
    assert fitted(prepared.tokenizer, question, 5)[1]


def test_rows_of_pairs_hold_items_in_both_streams(tiny, prepared):
    """Short questions with long answers: as many items share a row as its decoder holds."""
    words = prepared.tokenizer.vocabulary
    lengths = {"model__sequence_length": 256, "model__target_length": 64}
    settings = tiny("t5", data__objective="supervised", **lengths)
    prompt = np.full(3, words.text.argmax())

    def rows_of(answer):
        made = converted_continuation(
            "supervised", "encoder_decoder", prompt, prompt.repeat(answer)[:answer], words
        )
        return row_limit(settings, made).streams

    assert rows_of(20) == (3 * 4, 3 * 20) and rows_of(1) == (64 * 4, 64)
    with pytest.raises(
        UserError, match=r"row of 65 tokens in the decoder.* raise model.target_length"
    ):
        rows_of(65)
    room = Room([(settings, words)])
    assert room(64) == 255 and room(65) == 1  # of an answer that has none


def test_only_a_cell_whose_decoder_was_fed_more_than_it_holds_is_another(tiny, prepared):
    def marks(preset, row, **given):
        settings = tiny(preset, model__sequence_length=row, data__sentinels=64)
        return form_marks(settings, prepared, Evaluation(**given), None)

    assert marks("t5", 128) == {"decoder": 29}
    assert marks("t5", 512) == marks("bart", 128) == marks("gpt", 128) == {}
    assert marks("t5", 512, continuation_tokens=60) == {"decoder": 114}
    settings = tiny("t5", model__sequence_length=256)
    room = Room([(settings, prepared.tokenizer.vocabulary)])
    few = Evaluation(continuation_tokens=8)
    assert form_marks(settings, prepared, few, room) == {}
    asked = few.model_copy(update={"tasks": ["configs/tasks"]})
    assert form_marks(settings, prepared, asked, room) == {"decoder": 58}
    noise = {"data__objective": "span_corruption", "data__mean_span_length": 8.0}
    assert form_marks(tiny("gpt", **noise), prepared, few, None) == {"spans": [8, 53]}
    pairs = tiny("gpt", data__objective="supervised")
    assert form_marks(pairs, prepared, few, None) == {}
    assert form_marks(pairs, prepared, asked, None) == {"tasks.choices": "end in eos"}
    assert not {"decoder", "spans", "tasks.choices"} & set(Evaluation.model_fields)
