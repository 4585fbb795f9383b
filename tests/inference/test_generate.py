"""`megaarch generate` and `megaarch.generate`: each way in, and each bad input in one sentence."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import megaarch
import megaarch.errors
from megaarch.checkpoint.record import read_record
from megaarch.checkpoint.retention import complete
from megaarch.cli import generate
from megaarch.cli.main import main
from megaarch.errors import UserError
from megaarch.inference.dialogue import Dialogue
from megaarch.inference.generate import Generator, Options, room
from megaarch.inference.sampling import Sampler, Sampling, draw
from megaarch.inference.text_stream import TextStream
from megaarch.ingest.trained_tokenizer import tokenizer_of
from megaarch.model.transformer import Transformer
from tests.conftest import PRESETS, WORDS

pytestmark = pytest.mark.slow

PROMPT = "The river finds the stone near"


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "bert"])
def test_every_preset_but_bert_continues_a_prompt(preset, runs, capsys):
    arguments = ["generate", runs(preset), "--prompt", PROMPT, "--max-tokens", "6", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == PROMPT and found["finish"] in ("length", "end")
    assert found["tokens"] == 6 or found["finish"] == "end"


def test_streamed_text_is_the_python_functions(runs, capsys):
    assert main(["generate", runs("gpt"), "--prompt", PROMPT, "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == megaarch.generate(runs("gpt"), PROMPT, max_tokens=8) + "\n"


def test_a_prompts_text_does_not_depend_on_its_batch(runs, tmp_path, capsys):
    prompts = ["The", PROMPT, "The garden opens", PROMPT, "Winter"]
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "id": n}) + "\n" for n, p in enumerate(prompts))
    )
    sampled = ["--top-k", "50", "--top-p", "0.9", "--seed", "3", "--max-tokens", "9"]
    shown = []
    for size in ("1", "2", "5"):
        assert (
            main(["generate", runs("gpt"), "--input", str(path), *sampled, "--batch-size", size])
            == 0
        )
        shown.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert shown[0] == shown[1] == shown[2]
    assert [found["id"] for found in shown[0]] == [0, 1, 2, 3, 4]
    texts = [found["text"] for found in shown[0]]
    assert texts[1] != texts[3]  # the same prompt again draws anew
    assert main(["generate", runs("gpt"), "--prompt", PROMPT, *sampled, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == texts[1]


def test_a_stop_string_ends_an_answer_and_does_not_belong_to_it(runs):
    generator = Generator.of_run(runs("gpt"))
    whole = megaarch.generate(generator, PROMPT, max_tokens=24, temperature=1.0)
    stop = whole[7:9]
    cut = megaarch.generate(generator, PROMPT, max_tokens=24, temperature=1.0, stop=stop)
    assert cut == whole[: whole.index(stop)]


def dialogue(runs, preset, turn_blocks=False, **options):
    generator = Generator.of_run(runs(preset))
    return Dialogue(generator, Options(max_tokens=3, **options), turn_blocks)


@pytest.mark.parametrize("preset", ["gpt", "prefix_lm", "t5", "glm"])
def test_a_dialogue_answers_as_its_whole_text_would(preset, runs):
    talk = dialogue(runs, preset)
    talk.say("The river\n")
    caches = [talk.decoding.cache]
    before = np.array([*talk.history, *talk.generator.tokenizer.encode("The stone\n")])
    answer = talk.say("The stone\n")
    caches.append(talk.decoding.cache)
    again = dialogue(runs, preset)
    again.turns = [before[:-1].tolist()]  # the last token as its turn: nothing is cached
    again.generator.tokenizer.encode = lambda text: before[-1:]
    assert again.say("-").tokens == answer.tokens
    assert (caches[0] is caches[1]) == (preset == "gpt")


@pytest.mark.parametrize(
    ("preset", "turn_blocks"),
    [
        *((preset, False) for preset in ("gpt", "prefix_lm", "bart", "glm", "xlnet", "unilm")),
        ("prefix_lm", True),
    ],
)
def test_a_dialogues_oldest_turns_leave_it_where_the_positions_end(
    preset, turn_blocks, runs, caplog
):
    """What is left is answered as if the rest had never been there."""
    talk = dialogue(runs, preset, turn_blocks)
    texts = [f"The {word} opens the garden near\n" for word in WORDS[:12]]
    left = 0
    for text in texts:
        caplog.clear()
        before, cache = talk.turns[:], talk.decoding and talk.decoding.cache
        answer = talk.say(text)
        assert answer.finish in ("length", "end")  # there was room for all of it
        gone = len(before) + 1 - len(talk.turns)
        assert talk.turns[:-1] == before[gone:]
        assert bool(caplog.messages) == (gone > 0 and not left)  # it is said once
        if gone:
            assert talk.decoding.cache is not cache
            again = dialogue(runs, preset, turn_blocks)
            again.turns = before[gone:]
            assert again.say(text).tokens == answer.tokens
            # one turn more would have left too little room
            again.turns = before[gone - 1 :]
            tokens = np.array([*again.history, *talk.generator.tokenizer.encode(text)])
            made = talk.generator.unbounded(tokens)
            assert room(made, talk.generator.settings.model) < 3
        left += gone
    assert left and len(talk.turns) > 1


def test_an_answer_has_room_for_half_of_the_positions_at_most(runs):
    talk = dialogue(runs, "gpt")
    talk.options = Options(max_tokens=1000)
    for word in WORDS[:4]:
        answer = talk.say(f"The {word} opens\n")
        assert answer.finish == "end" or len(answer.tokens) >= 24


def test_a_turn_that_has_no_room_by_itself_is_no_part_of_the_dialogue(runs, capsys, monkeypatch):
    lines = iter(["The river", "The river " * 60, "The stone"])
    monkeypatch.setattr(generate, "ask", lambda: next(lines, None))
    assert main(["generate", runs("gpt"), "--chat", "--max-tokens", "4", "--json"]) == 0
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert [x["prompt"] for x in found] == ["The river", "The stone"]
    (line,) = shown.err.splitlines()
    assert line.startswith("megaarch: the turn takes ") and line.endswith("knows 48: shorten it")


def test_turn_blocks_keep_a_prefix_decoders_cache(runs):
    talk = dialogue(runs, "prefix_lm", turn_blocks=True)
    talk.say("The river\n")
    cache = talk.decoding.cache
    talk.say("The stone\n")
    assert talk.decoding.cache is cache


@pytest.mark.parametrize("preset, turn_blocks", [("gpt", False), ("prefix_lm", True)])
def test_an_answer_that_the_model_ended_stays_in_the_cache_once(
    preset, turn_blocks, runs, monkeypatch
):
    """Its last token has run when the model ends it; one that its length ended has not."""
    talk = dialogue(runs, preset, turn_blocks)
    [end, *_] = talk.generator.prompt_of(talk.generator.tokenizer.encode("The river")).form.ends
    drawn = iter([5, 6, end, 7, 8, 9, end])
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: np.array([next(drawn)]))
    assert talk.say("The river\n").finish == "end"
    cache = talk.decoding.cache
    assert cache.lengths[0] == len(talk.kept) and talk.kept[-2:] == [5, 6]
    assert talk.say("The stone\n").finish == "length"
    assert talk.decoding.cache is cache
    assert cache.lengths[0] == len(talk.kept) and talk.kept[-2:] == [7, 8]
    assert talk.say("The garden\n").finish == "end" and talk.decoding.cache is cache
    # every token of the dialogue stands in it once, behind the start token
    assert cache.lengths[0] == 1 + len(talk.history)


@pytest.mark.parametrize("words", [5, 36])
def test_a_sentinel_ends_t5s_answer_whatever_the_number_of_its_prompts_spans(words, runs):
    generator = Generator.of_run(runs("t5"))
    made = generator.prompt_of(np.arange(40, 40 + words))
    last = int(made.stream.tokens[-1])  # the sentinel whose span the answer is
    sentinels = [generator.vocabulary.sentinel(k) for k in range(generator.vocabulary.sentinels)]
    assert last in sentinels and sentinels[sentinels.index(last) + 1] in made.form.ends


def test_chat_reads_lines_until_its_input_ends(runs, capsys, monkeypatch):
    lines = iter(["The river", "", "The stone"])

    def ask():
        return next(lines, None)

    monkeypatch.setattr(generate, "ask", ask)
    assert main(["generate", runs("gpt"), "--chat", "--max-tokens", "4", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["prompt"] for x in found] == ["The river", "The stone"]


@pytest.mark.parametrize(
    ("preset", "more", "sentence"),
    [
        ("bert", [], "it has no left-to-right conditional"),
        *(
            (preset, ["--turn-blocks"], "turn blocks serve a prefix decoder")
            for preset in ("gpt", "t5", "glm", "xlnet", "unilm")
        ),
    ],
)
def test_what_cannot_be_a_dialogue_is_refused_before_its_first_turn(
    preset, more, sentence, runs, capsys, monkeypatch
):
    monkeypatch.setattr(generate, "ask", lambda: pytest.fail("a turn was asked for"))
    assert main(["generate", runs(preset), "--chat", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_ctrl_c_ends_an_answer_and_the_dialogue_goes_on(runs, capsys, monkeypatch):
    lines, forward, calls = iter(["The river", "The stone"]), Transformer.forward, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *given)

    monkeypatch.setattr(generate, "ask", lambda: next(lines, None))
    monkeypatch.setattr(Transformer, "forward", interrupted)
    assert main(["generate", runs("gpt"), "--chat", "--max-tokens", "4"]) == 0
    assert len(calls) == 3 + 4
    shown = capsys.readouterr()
    assert shown.out.count("\n") >= 2 and "Traceback" not in shown.err


def test_ctrl_c_says_how_many_prompts_were_answered(runs, tmp_path, capsys, monkeypatch):
    forward, calls = Transformer.forward, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2 * 4 + 1:  # in the third batch
            assert len(capsys.readouterr().out.splitlines()) == 2  # the second
            raise KeyboardInterrupt
        if len(calls) == 4 + 1:
            assert len(capsys.readouterr().out.splitlines()) == 2
        return forward(self, *given)

    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps({"prompt": PROMPT}) + "\n") * 5)
    monkeypatch.setattr(Transformer, "forward", interrupted)
    given = ["--input", str(path), "--max-tokens", "4", "--batch-size", "2"]
    assert main(["generate", runs("gpt"), *given]) == 130
    assert capsys.readouterr().err.endswith("megaarch: interrupted; 4 of 5 prompts were answered\n")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "The river " * 60], "and the model knows 48: shorten it"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens: 0 is not a whole number from 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: -1.0 is not a number from 1e-6"),
        (["--prompt", "a", "--top-p", "0"], "top_p: 0.0 is not a number above 0"),
        (["--prompt", "a", "--top-k", "0"], "top_k: 0 is not a number from 1"),
        (["--prompt", "a", "--turn-blocks"], "give --chat"),
        (["--prompt", "a", "--tokenizer", "/gone"], "tokenizer file /gone does not exist"),
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["--prompt", "a", "--set", "parallel.pipeline_parallel=2"], "parallel.pipeline_parallel"),
    ],
)
def test_a_mistake_is_one_sentence(given, sentence, runs, capsys):
    assert main(["generate", runs("gpt"), *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("megaarch:") == 1


def test_a_line_that_would_lose_a_value_to_its_answer_is_refused(runs, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "The river", "id": 1}\n{"prompt": "The river", "text": "finds"}\n')
    assert main(["generate", runs("gpt"), "--input", str(path)]) == 2
    assert f"{path}, line 2: has a key 'text'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_tokens": 2.5}, "max_tokens: 2.5 is not a whole number"),
        ({"stop": ["a", 3]}, "stop: 3 is not a text"),
        ({"stop": ""}, "stop: '' is not a text"),
        ({"batch_size": "8"}, "batch_size: 8 is not a whole number"),
        ({"max_tokens": True}, "max_tokens: True is not a whole number"),
    ],
)
def test_from_python_a_mistake_is_one_sentence_too(given, sentence, runs):
    with pytest.raises(UserError, match=sentence):
        megaarch.generate(runs("gpt"), PROMPT, **given)
    assert megaarch.generate(runs("gpt"), PROMPT, max_tokens=np.int64(2), stop=None)


@pytest.mark.parametrize("heat", [1e-50, 1e-7, 1e7, 1e39, float("inf"), float("nan")])
def test_a_temperature_that_a_float_cannot_divide_by_is_refused(heat):
    with pytest.raises(UserError, match="is not a number from 1e-6 to 1e6, or 0"):
        Sampling(heat)


@pytest.mark.parametrize("heat", [1e-6, 1e6])
def test_what_is_not_allowed_is_never_drawn(heat):
    logits = torch.tensor([[3e3, -3e3, 5.0, -torch.inf]]).repeat(64, 1)
    found = draw(logits, torch.linspace(0, 0.999, 64), Sampling(heat))
    assert found.max() < 3 and (heat > 1 or found.max() == 0)


def test_a_t5_dialogue_goes_on_when_its_sentinels_end(runs):
    generator = Generator.of_run(runs("t5"))
    talk = Dialogue(generator, Options(max_tokens=3))
    generator.vocabulary = dataclasses.replace(generator.vocabulary, sentinels=3)
    for word in WORDS[:8]:
        assert talk.say(f"The {word} opens the garden near\n").finish in ("length", "end")
    assert 0 < len(talk.turns) < 8
    with pytest.raises(UserError, match="masks in more spans than the 3 sentinels"):
        talk.say("The river " * 60)
    generator.vocabulary = dataclasses.replace(generator.vocabulary, sentinels=0)
    with pytest.raises(UserError, match="masked by sentinels, and this one knows none"):
        Dialogue(generator, Options(max_tokens=3)).say("The river opens the garden near\n")


def test_what_no_terminal_can_show_is_escaped(runs, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('\ufeff{"prompt": "The river", "x": "\\ud800"}\n{"prompt": "The stone"}\n')
    assert main(["generate", runs("gpt"), "--input", str(path), "--max-tokens", "2"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["prompt"] for x in found] == ["The river", "The stone"] and found[0]["x"] == "\ud800"


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_turn_that_is_no_utf8_is_refused_alone(encoding, runs):
    command = [sys.executable, "-m", "megaarch", "generate", runs("gpt"), "--chat"]
    done = subprocess.run(
        [*command, "--max-tokens", "2"],
        input=b"The river\n\xff\xfe\nThe stone\n",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert b"is half a surrogate pair, or a byte that is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr and done.stdout.count(b"\n") >= 2


def test_a_model_that_cannot_generate_is_no_fault_of_a_prompt(runs, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert main(["generate", runs("bert"), "--input", str(path)]) == 2
    error = capsys.readouterr().err
    assert "a model of masked_lm cannot generate" in error and "prompt 1" not in error


def test_a_tokenizer_is_found_from_any_folder(runs, tmp_path, monkeypatch):
    """The path in a run's record is one from where the run was started."""
    generator, run = Generator.of_run(runs("gpt")), Path(runs("gpt"))
    saved = read_record(complete(run / "checkpoints")[-1])
    (tmp_path / "data").mkdir()
    shutil.copy(saved.tokenizer.path, tmp_path / "data" / "t.model")
    told = saved.tokenizer.model_copy(update={"path": "data/t.model"})
    moved = saved.model_copy(update={"tokenizer": told})
    monkeypatch.chdir("/")
    found = tokenizer_of(moved, generator.settings, None, tmp_path / "runs" / "s" / "cells" / "a")
    assert found.fingerprint == generator.tokenizer.fingerprint
    with pytest.raises(UserError, match="data/t.model does not exist"):
        tokenizer_of(moved, generator.settings, None, tmp_path.parent / "a")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}', 'line 1: is not an object with a text "prompt"'),
        ("", "has no prompts"),
    ],
)
def test_a_bad_line_is_named(line, sentence, runs, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(line)
    assert main(["generate", runs("gpt"), "--input", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def test_no_run_bert_and_a_tokenizer_that_is_gone(runs, tmp_path, capsys, prepared):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err
    assert main(["generate", runs("bert"), "--prompt", "a"]) == 2
    assert "no left-to-right conditional" in capsys.readouterr().err
    folder = tmp_path / "run"
    shutil.copytree(runs("gpt"), folder)
    path = prepared.tokenizer.path
    shutil.move(path, tmp_path / "kept")
    try:
        assert main(["generate", str(folder), "--prompt", "a"]) == 2
        assert "--tokenizer" in capsys.readouterr().err
    finally:
        shutil.move(tmp_path / "kept", path)


def test_text_comes_in_whole_characters(prepared):
    tokenizer = prepared.tokenizer
    text = "The 漢字 🙂🙂 Über"
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > len(text)  # some are spelt in bytes
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert "".join(TextStream(tokenizer).push(token) for token in ids[:6]) in text


@pytest.mark.parametrize("lead", ["", "漢"])
def test_an_answer_never_ends_in_half_a_character(lead, prepared):
    """Neither in bytes that are none: a model may write any number of them."""
    tokenizer = prepared.tokenizer
    han = tokenizer.encode("漢字").tolist()[-6:]  # six bytes
    assert tokenizer.decode(han) == "漢字"
    for broken in (han[:1], han[:2], han[1:3] * 3, han[:2] * 3, [*han[1:3] * 2, *han[:2]]):
        stream = TextStream(tokenizer)
        ids = [*tokenizer.encode(lead).tolist(), *broken]
        assert "".join([*map(stream.push, ids), stream.finish()]) == lead
        rest = tokenizer.encode("a").tolist()[-1]  # what comes behind them shows where they stood
        assert "".join(map(stream.push, [rest])).strip("\ufffd") == "a"


def test_greedy_is_a_temperature_of_none_and_seeds_differ(runs):
    generator = Generator.of_run(runs("gpt"))
    greedy = megaarch.generate(generator, PROMPT, max_tokens=8)
    assert greedy == megaarch.generate(generator, PROMPT, max_tokens=8, temperature=0.5, top_k=1)
    drawn = {
        megaarch.generate(generator, PROMPT, max_tokens=8, temperature=1.0, seed=s)
        for s in range(3)
    }
    assert len(drawn) == 3
    assert Sampling(top_k=4).heat == 1 and Sampling().heat == 0
