"""The model of lm-evaluation-harness over runs trained here, in the form of each objective."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install '.[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402

from megaarch.data.conditional_forms import ADDED  # noqa: E402
from megaarch.data.objectives.span_corruption import Spans  # noqa: E402
from megaarch.errors import UserError  # noqa: E402
from megaarch.evaluation.scorer import Scorer  # noqa: E402
from megaarch.inference.generate import longest, room  # noqa: E402
from megaarch.lm_eval.model import GeneratorLM, MegaarchLM, _options  # noqa: E402
from tests.conftest import PRESETS  # noqa: E402

CONTEXTS = ("The river finds the stone near", "", "The garden")
CONTINUATIONS = (" number 17.", "The winter keeps the light", " opens")


def requests(kind, *arguments):
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def wanted(lm, pairs):
    """Log-likelihoods of tokens as the yardsticks score them, over the tokenizer's own ids."""
    generator = lm.generator
    scorer = Scorer(generator.model, generator.settings, generator.vocabulary, rows=2)
    scorer.text_tokens = torch.arange(len(scorer.text_tokens)) < generator.tokenizer.base_size
    return scorer.loglikelihoods(
        [tuple(np.array(side, dtype=np.int64) for side in p) for p in pairs]
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_loglikelihoods_are_those_of_the_conditional_form(preset, runs):
    lm = MegaarchLM(run=runs(preset), batch_size=2)
    assert lm.form.name == "objective"
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    encode = lm.generator.tokenizer.encode
    tokens = []
    for before, after in pairs:
        context = encode(before)
        tokens.append((context, encode(before + after)[len(context) :]))
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in found], wanted(lm, tokens).text, atol=1e-3)


def test_an_encoder_that_has_nothing_to_read_is_scored_in_any_batch(runs):
    lm = MegaarchLM(run=runs("t5", "data.objective=prefix_lm"), batch_size=3)
    encode = lm.generator.tokenizer.encode
    pairs = (("", " opens the door"), ("The garden", " opens"), ("", " The river"))
    groups = [[lm.form.converted(*(encode(x).tolist() for x in pair))[0]] for pair in pairs]
    assert [len(one.streams[0].tokens) for [one] in groups][::2] == [0, 0]
    alone = [lm.scorer([group])[0].loglikelihood for group in groups]
    together = [score.loglikelihood for score in lm.scorer(groups)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "bert"])
def test_what_is_generated_is_greedy_and_nothing_else_is(preset, runs):
    lm = MegaarchLM(run=runs(preset))
    given = requests(
        "generate_until", *[(c, {"max_gen_toks": 3, "until": []}) for c in CONTEXTS[::2]]
    )
    for request, text in zip(given, lm.generate_until(given, disable_tqdm=True), strict=True):
        context = lm.tok_encode(request.args[0])
        prompt, _ = lm.form.prompt(context, 3)
        with torch.no_grad():
            logits = next(iter(_first_logits(lm, prompt)))
        ranked = logits.masked_fill(~lm.generator.allowed(prompt), -math.inf).argsort(
            descending=True
        )
        best, second = (int(i) for i in ranked[:2])
        if best in lm.form.ends:
            assert text == ""
            continue
        scores = lm._scores([(context, [best]), (context, [second])])
        assert [score.is_greedy for score in scores] == [True, False]
        assert text.startswith(lm.generator.tokenizer.decode([best])) or not text


def _first_logits(lm, prompt):
    from megaarch.inference.decode import Decoding

    return Decoding(lm.generator.model, lm.generator.layout, [prompt]).start()


def test_rolling_sums_windows_that_cover_each_token_once(runs):
    lm = MegaarchLM(run=runs("gpt"), batch_size=3)
    text = "The river finds the stone near number 4. " * 12
    tokens = lm.generator.tokenizer.encode(text)
    length = lm.max_length
    assert len(tokens) > 2 * length
    pairs, done = [(tokens[:0], tokens[:length])], length
    while done < len(tokens):  # a window of `length` inputs, of which the last ones are new
        end = min(done + length, len(tokens))
        pairs.append((tokens[end - length - 1 : done], tokens[done:end]))
        done = end
    [found] = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    assert found == pytest.approx(wanted(lm, pairs).text.sum(), abs=1e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_rolling_window_has_room_in_every_form(preset, runs):
    """UL2's decoder holds 20 tokens, and the text of a row of 48 is 23: a window is one that the decoder holds."""
    lm = MegaarchLM(run=runs(preset), batch_size=3)
    text = "The river finds the stone near number 4. " * 6
    [found] = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    windows = lm._windows(text)
    sizes = [len(continuation) for _, continuation in windows]
    assert sum(sizes) == len(lm.tok_encode(text)) and found < 0
    assert max(sizes) == lm.form.window == (20 if preset == "ul2" else lm.max_length)
    with pytest.raises(UserError, match="has no room"):
        lm.form.converted([], [windows[0][1][0]] * (lm.form.window + 1))


def test_a_long_context_gives_way_at_its_left_end(runs):
    lm = MegaarchLM(run=runs("t5"))
    context = lm.tok_encode("The river finds the stone near number 4. " * 12)
    after = lm.tok_encode(" The river")
    room = lm.max_length + 1 - len(after)
    cut, whole = lm._scores([(context[-room:], after), (context, after)])
    assert cut == whole
    given = requests("generate_until", (" ".join(["The river"] * 90), {"max_gen_toks": 4}))
    assert lm.generate_until(given, disable_tqdm=True) != []


@pytest.mark.parametrize("preset, share", [("gpt", 1), ("xlnet", 0.9), ("ul2", 0.8)])
def test_a_context_is_no_longer_than_the_text_of_a_training_row(preset, share, runs, caplog):
    """XLNet's rows of 48 hold 41 tokens of text, and each of the two segments in one of UL2's some 30."""
    lm = MegaarchLM(run=runs(preset))
    row = lm.generator.settings.model.sequence_length
    assert lm.max_length + ADDED <= share * row
    long = "The river finds the stone near number 4. " * 12
    given = requests("loglikelihood", (long, " The river"), ("The garden", " opens"))
    with caplog.at_level("WARNING", logger="megaarch"):
        lm.loglikelihood(given, disable_tqdm=True)
    assert "1 of 2 contexts are longer than there is room for" in caplog.text
    made = lm.form.converted(lm.tok_encode(long), lm.tok_encode(" The river"))
    assert max(max(each.positions) for each in made) <= share * row
    assert GeneratorLM(lm.generator, text=20).max_length == 20 - ADDED  # as a study's cells have


def test_results_that_a_cache_holds_are_not_computed_again(runs, tmp_path, monkeypatch):
    """A run that is cut off after some batches goes on behind them."""
    lm = MegaarchLM(run=runs("gpt"), batch_size=1)
    pairs = [("The river", f" number {n}.") for n in range(9)]
    given = requests("loglikelihood", *pairs)
    straight = lm.loglikelihood(given, disable_tqdm=True)
    score, asked = lm._scores, []

    def broken(pairs):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(pairs))
        return score(pairs)

    monkeypatch.setattr(lm, "_scores", broken)
    caching = CachingLM(lm, str(tmp_path / "cache.db"))
    with pytest.raises(KeyboardInterrupt):
        caching.loglikelihood(given)
    monkeypatch.setattr(lm, "_scores", lambda pairs: asked.append(len(pairs)) or score(pairs))
    again = CachingLM(lm, str(tmp_path / "cache.db")).loglikelihood(given)
    assert sum(asked) == len(pairs) and len(asked) > 1
    np.testing.assert_allclose([v for v, _ in again], [v for v, _ in straight], atol=1e-4)


def test_one_token_choices_share_a_row(runs, monkeypatch):
    lm = MegaarchLM(run=runs("prefix_lm"))
    context = lm.tok_encode("The river finds")
    ran = []
    logits = lm.scorer._logits
    monkeypatch.setattr(lm.scorer, "_logits", lambda rows: ran.append(len(rows)) or logits(rows))
    together = lm._scores([(context, [token]) for token in range(300, 306)])
    assert ran == [1]
    alone = [lm._scores([(context, [token])])[0] for token in range(300, 306)]
    np.testing.assert_allclose(
        [s.loglikelihood for s in together], [s.loglikelihood for s in alone], atol=1e-5
    )


def test_a_checkpoint_of_a_run_is_scored(runs):
    run = Path(runs("gpt"))
    pairs = requests("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    found = [
        MegaarchLM(run=str(given)).loglikelihood(pairs, disable_tqdm=True)
        for given in (run, run / "checkpoints" / "step-00000001")
    ]
    assert found[0] == found[1]


def test_a_run_is_scored_in_the_precision_that_is_asked_for_and_the_record_says_which(runs):
    """bf16 has weights and products of 16 bits; unasked it is that of training."""
    pairs = requests("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    values = {}
    for asked, used in ((None, "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        lm = MegaarchLM(run=runs("gpt"), precision=asked)
        assert lm.get_model_info()["model_precision"] == used
        kinds = {weight.dtype for weight in lm.generator.model.parameters()}
        assert kinds == {torch.bfloat16 if used == "bf16" else torch.float32}
        values[asked] = [value for value, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
    assert values[None] == values["fp32"] != values["bf16"]
    np.testing.assert_allclose(values["bf16"], values["fp32"], rtol=0.02)
    trained = runs("gpt", "training.precision=bf16")
    assert MegaarchLM(run=trained).get_model_info()["model_precision"] == "bf16"
    assert MegaarchLM(run=trained, precision="fp32").scorer is not None


def test_bert_is_flagged_and_does_not_generate(runs, caplog, monkeypatch):
    """Converted or not: `lm_eval --model hf` runs no encoder."""
    monkeypatch.setattr("megaarch.lm_eval.model.converted_from_elsewhere", lambda run: True)
    lm = MegaarchLM(run=runs("bert"))
    assert lm.form.name == "objective"
    assert "A pseudo-likelihood" in caplog.text
    with pytest.raises(UserError, match="cannot generate"):
        lm.generate_until(requests("generate_until", ("The river", {})), disable_tqdm=True)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"form": "x"}, "form=x: is not one of objective, hf"),
        ({"colour": 3}, "not colour"),
        ({"precision": "fp8"}, "precision=fp8: is not one of fp32, bf16"),
        ({"tensor_parallel": 2}, "1 started processes do not divide"),
        ({"max_length": 9}, "max_length: 9 leaves no room"),
        ({"max_length": 4096}, "max_length: 4096 is more than the 48 positions"),
        *(
            ({name: value}, f"{name}={value}: is not a whole number from 1")
            for name in ("batch_size", "max_length", "tensor_parallel")
            for value in ("0", "-1", "1.5", "x")
        ),
        ({"form": "hf"}, "finds no tokenizer"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(given, told, runs):
    with pytest.raises(UserError, match=told) as caught:
        MegaarchLM(run=runs("gpt"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_a_continuation_that_no_row_holds_is_refused(preset, runs):
    lm = MegaarchLM(run=runs(preset))
    given = requests("loglikelihood", ("The river", " stone" * 200))
    with pytest.raises(
        UserError, match="a continuation of .* tokens has no room in the model's row of 48"
    ):
        lm.loglikelihood(given, disable_tqdm=True)


def test_an_empty_context_is_named_before_anything_is_generated(runs, monkeypatch):
    lm = MegaarchLM(run=runs("gpt"))
    monkeypatch.setattr(lm, "_answers", lambda *given: pytest.fail("it was answered"))
    given = requests("generate_until", ("The river", {"until": []}), ("", {"until": []}))
    given[1].metadata = ("colours", 7, 1)
    given[1].__post_init__()
    with pytest.raises(UserError, match="item 7 of the task colours has an empty context"):
        lm.generate_until(given, disable_tqdm=True)
    given = requests("loglikelihood", ("The river", " opens"), ("The river", ""))
    given[1].metadata = ("colours", 8, 1)
    given[1].__post_init__()
    with pytest.raises(UserError, match="item 8 of the task colours has an empty continuation"):
        lm.loglikelihood(given, disable_tqdm=True)


@pytest.mark.parametrize(
    "heat, drawn", [({"temperature": 0}, 0.0), ({"temperature": 0.5}, 0.5), ({}, 1.0)]
)
def test_a_temperature_of_zero_is_greedy(heat, drawn):
    given = {"until": [], "do_sample": True} | heat
    assert _options(given, 1).sampling.heat == drawn
    assert _options(given | {"do_sample": False}, 1).sampling.heat == 0


@pytest.mark.parametrize(
    "given, told", [({"num_beams": 4}, "num_beams"), ({"top_p": 7.0}, "top_p")]
)
def test_unknown_options_of_generation_are_refused(given, told, runs):
    lm = MegaarchLM(run=runs("gpt"))
    request = requests("generate_until", ("The river", {"until": ["."]} | given))
    with pytest.raises(UserError, match=told):
        lm.generate_until(request, disable_tqdm=True)


@pytest.mark.parametrize("objective", ["span_corruption", "denoising"])
@pytest.mark.parametrize("positions", ["rope", "learned", "relative"])
def test_a_form_that_grows_with_its_context_stays_within_the_row(objective, positions, runs):
    """One adds sentinels, the other all of the context once more."""
    given = (f"data.objective={objective}", f"model.position_encoding={positions}")
    lm = MegaarchLM(run=runs("gpt", *given))
    row = lm.generator.settings.model.sequence_length
    context = np.resize(lm.generator.tokenizer.encode(CONTEXTS[0]), 3 * row).tolist()
    for few in (1, 5, 12):
        continuation = context[:few]
        [made] = lm.form.converted(context, continuation)
        assert max(made.positions) <= row, few
        assert made.target_tokens[made.target_weights > 0][:few].tolist() == continuation
        assert lm.scorer([[made]])
        prompt, kept = lm.form.prompt(context, few)
        assert len(kept) > 1 and longest(prompt) <= row
        assert room(prompt, lm.generator.settings.model) >= few
    short = context[:4]
    whole = lm.form.converted(short, context[:2])[0]
    assert max(whole.positions) < row and lm.form.prompt(short, 2)[1].tolist() == short


def test_a_decoder_reads_no_more_than_that_of_a_training_row(runs):
    lm = MegaarchLM(run=runs("t5"))
    decoder = 12  # of the longest example: 8 tokens in 3 spans, and eos
    context = np.resize(lm.tok_encode(CONTEXTS[0]), 20).tolist()
    made = lm.form.converted(context, context)
    assert len(made) > 1 and max(each.positions[1] for each in made) == decoder
    scored = [each.target_tokens[each.target_weights > 0] for each in made]
    assert np.concatenate(scored).tolist() == context
    pairs = [(context, context), (context, context[:2])]
    assert lm.scorer([lm.form.converted(*pair) for pair in pairs])
    short = MegaarchLM(run=runs("t5", "data.objective=prefix_lm", "model.target_length=16"))
    with pytest.raises(UserError, match="has no room"):
        short.form.converted([], context[:17])


def test_a_t5_whose_context_has_more_spans_than_sentinels_reads_its_end(runs):
    lm = MegaarchLM(run=runs("t5", "model.sequence_length=512", "data.mean_span_length=8"))
    context = np.resize(lm.generator.tokenizer.encode(CONTEXTS[0]), 600).tolist()
    lm.form.spans = Spans()  # those of longer spans are fewer than its sentinels
    [made] = lm.form.converted(context, context[:3])
    assert 100 < len(made.streams[0].tokens) < 512
    assert len(lm.form.prompt(context, 3)[1]) > 100
