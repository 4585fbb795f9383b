"""Yardsticks against models whose answers are known: one that knows the text, one that does not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaarch.config.catalogue import OBJECTIVES
from megaarch.config.catalogue import PRESETS as PRESET_TABLE
from megaarch.config.schema import Evaluation
from megaarch.data.conditional_forms import middle
from megaarch.evaluation import yardsticks
from megaarch.evaluation.items import Item, cut, split, unfaithful
from megaarch.evaluation.scorer import Scorer
from megaarch.model.transformer import TargetLosses
from megaarch.training.trainer import Trainer
from tests.conftest import PRESETS
from tests.evaluation.known_answers import Uniform

pytestmark = pytest.mark.slow

EVALUATION = Evaluation(
    prefix_tokens=12,
    continuation_tokens=6,
    documents=8,
    choices=8,
    middles=4,
    curve_documents=4,
    by_length=8,
    batch_rows=4,
)


class IgnoresPrefix(Uniform):
    """A token costs by what it is, whatever stands before it."""

    def forward(self, batch, text_tokens):
        nll = 3 + torch.sin(batch.target_tokens)
        return TargetLosses(nll, nll, nll)


@pytest.fixture(scope="module")
def items(prepared):
    return cut(prepared.heldout, prepared.tokenizer, EVALUATION)


def test_items_are_cut_at_words_and_their_bytes_are_the_texts(prepared, items):
    texts = prepared.heldout
    decode = prepared.tokenizer.decode
    for item in items:
        span = decode(item.span)
        assert item.span_bytes == len(span.encode())
        assert decode(item.left)[-8:] + span in texts[item.document]
        assert span + decode(item.right)[:5] in texts[item.document]
        assert prepared.tokenizer.vocabulary.word_start[item.span[0]]
        assert len(item.left) == 12 and 6 <= len(item.span) <= 12
    firsts = {item.document for item in items[:3]}
    assert len(firsts) == min(3, len({i.document for i in items}))  # rounds over documents


def test_what_chooses_a_rate_does_not_judge_the_model(prepared, items):
    parts = split(prepared.heldout, prepared.tokenizer, EVALUATION)
    validation, test = ({item.document for item in parts[name]} for name in ("validation", "test"))
    assert validation and test and not validation & test
    assert validation | test == {item.document for item in items}


def test_a_tokenizer_that_alters_text_is_told(prepared):
    documents, tokenizer = prepared.heldout, prepared.tokenizer
    assert unfaithful(documents, tokenizer) is None

    class Lowercasing:
        description = "uncased"
        encode = staticmethod(lambda text: tokenizer.encode(text.lower()))
        decode = staticmethod(tokenizer.decode)

    said = unfaithful(["all small.\n", "So: Not all."], Lowercasing)
    assert "(uncased)" in said and "'So: Not al' came back as 'so: not al'" in said
    Lowercasing.encode = staticmethod(lambda text: tokenizer.encode(text.strip()))
    assert "'od at all.\\n' came back as 'od at all.'" in unfaithful(
        ["good at all.\n"], Lowercasing
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_uniform_model_costs_log2_of_the_text_tokens(preset, tiny, prepared, items):
    settings = tiny(preset)
    vocabulary = prepared.tokenizer.vocabulary
    scorer = Scorer(Uniform(512), settings, vocabulary, 4)
    held = yardsticks.evaluate(scorer, items, EVALUATION).as_json()
    chosen = items[:8]
    tokens, size = sum(len(i.span) for i in chosen), sum(i.span_bytes for i in chosen)
    bits = math.log2(int(vocabulary.text.sum())) * tokens / size
    assert held["continuation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert held["continuation_bits_per_byte_raw"] == pytest.approx(9 * tokens / size, rel=1e-5)
    low, high = held["continuation_interval"]
    assert low <= bits <= high
    assert held["items"]["continuation"] == 8 and held["items"]["choice"] == 8
    assert (held["middle_bits_per_byte"] is not None) == (preset not in ("gpt", "prefix_lm"))
    if costs := held.get("paired_middle"):
        assert len(costs["amounts"]) == held["items"]["middle"] == 4
        total = sum(costs["amounts"]) / sum(costs["sizes"])
        assert held["middle_bits_per_byte"] == pytest.approx(total, rel=1e-4)
    assert held["comparable"] == (preset != "bert")


@pytest.mark.parametrize(
    "preset", [p.name for p in PRESET_TABLE.values() if OBJECTIVES[p.objective].middle]
)
def test_who_is_told_the_length_of_a_middle(preset, prepared, items):
    """Whether what is read to score a middle's first token changes with the middle's length."""
    entry, vocabulary = PRESET_TABLE[preset], prepared.tokenizer.vocabulary
    read = set()
    for length in (1, 2, 3):
        task = items[0].left, items[0].span[:length], items[0].right
        example, *_ = middle(entry.objective, entry.architecture, *task, vocabulary)
        read.add(len(example.inputs))
    told = OBJECTIVES[entry.objective].gap_length
    assert (len(read) == 3) is told
    assert (len(read) == 1) is not told


def test_the_choice_finds_the_continuation_that_its_prefix_makes_likelier():
    """Scores with a bias for one continuation: raw scores would choose it everywhere."""
    items = [Item(d, np.array([d]), np.array([d]), np.array([0]), 1) for d in range(8)]

    class Biased:
        def loglikelihoods(self, pairs):
            scores = [
                (5.0 if span[0] % 4 == 0 else 0.0) + (1.0 if left[0] == span[0] else 0.0)
                for left, span in pairs
            ]
            return type("S", (), {"text": np.array(scores), "raw": np.array(scores)})

    groups = yardsticks._groups(items)
    assert yardsticks._choice(Biased(), groups)["choice_accuracy"] == 1.0 and len(groups) == 8


def test_loglikelihood_is_the_sum_of_a_trained_models_losses(tiny, prepared, items):
    """GPT's conditional, by hand: rows [bos] + tokens, probabilities over text tokens."""
    settings = tiny("gpt", training__steps=4)
    trainer = Trainer(settings, prepared)
    trainer.run()
    vocabulary = prepared.tokenizer.vocabulary
    scorer = Scorer(trainer.model, settings, vocabulary, 4)
    item = items[0]
    batch = trainer.steps.batch(range(1))
    tokens = np.concatenate([[vocabulary.bos], item.left, item.span])
    length = batch.streams[0].tokens.shape[1]
    row = torch.zeros(1, length, dtype=torch.int64)
    row[0, : len(tokens)] = torch.from_numpy(tokens)
    from dataclasses import replace

    stream = replace(batch.streams[0], tokens=row)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model.logits(replace(batch, streams=(stream,)))[0].double()
    logits[:, ~torch.from_numpy(vocabulary.text)] = -torch.inf
    expected = 0.0
    for j, token in enumerate(item.span):
        expected += float(logits[len(item.left) + j].log_softmax(-1)[token])
    [found] = scorer.loglikelihoods([(item.left, item.span)]).text
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_how_items_share_rows_changes_no_score(preset, tiny, prepared, items):
    settings = tiny(preset, training__steps=3)
    trainer = Trainer(settings, prepared)
    trainer.run()
    pairs = [(item.left, item.span) for item in items[:5]]
    together = Scorer(trainer.model, settings, prepared.tokenizer.vocabulary, 32)
    apart = Scorer(trainer.model, settings, prepared.tokenizer.vocabulary, 1)
    one_by_one = [apart.loglikelihoods([pair]).text[0] for pair in pairs]
    assert together.loglikelihoods(pairs).text == pytest.approx(one_by_one, rel=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_scores_by_length_are_those_of_each_length_alone(preset, tiny, prepared, items):
    trainer = Trainer(tiny(preset, training__steps=3), prepared)
    trainer.run()
    scorer = Scorer(trainer.model, trainer.settings, prepared.tokenizer.vocabulary, 8)
    pairs = [(item.left, item.following[: 12 - 5 * (k == 3)]) for k, item in enumerate(items[:5])]
    lengths = (1, 2, 4, 8, 12)
    found = scorer.by_length(pairs, lengths)
    for k, length in enumerate(lengths):
        long = [i for i, (_, span) in enumerate(pairs) if len(span) >= length]
        assert len(long) == (5 if length < 8 else 4)
        alone = scorer.loglikelihoods([(pairs[i][0], pairs[i][1][:length]) for i in long]).text
        assert found[long, k] == pytest.approx(alone, rel=1e-4)
        assert np.isnan(np.delete(found[:, k], long)).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_that_ignores_its_prefix_is_marked(preset, tiny, prepared, items):
    scorer = Scorer(IgnoresPrefix(512), tiny(preset), prepared.tokenizer.vocabulary, 8)
    held = yardsticks.evaluate(scorer, items, EVALUATION)
    assert list(held.continuation) == ["1", "2", "4", "8"]
    for found in held.continuation.values():
        assert found.prefix_gain == pytest.approx(0, abs=0.005)
        assert found.prefix_gain_interval == pytest.approx([0, 0], abs=0.005)
        assert found.items == len(found.paired_gain.amounts) == len(found.paired.amounts) == 8
    assert held.prefix_gain == pytest.approx(0, abs=0.005) and held.reads_prefix is False


def test_a_prefix_gain_is_what_the_wrong_prefix_costs_more(prepared, tiny, items):
    """A model to which each token costs more by one bit where the row holds a wrong prefix."""
    lefts = {item.left.tobytes(): item.document for item in items[:8]}

    class Reads(Scorer):
        def by_length(self, pairs, lengths):
            owners = {i.following[:8].tobytes(): i.document for i in items[:8]}
            wrong = [lefts[left.tobytes()] != owners[span.tobytes()] for left, span in pairs]
            return -math.log(2) * np.outer(2 + np.array(wrong), lengths)

    scorer = Reads(Uniform(512), tiny("gpt"), prepared.tokenizer.vocabulary, 8)
    held = yardsticks.evaluate(scorer, items, EVALUATION)
    for length, found in held.continuation.items():
        size = sum(item.length_bytes[int(length)] for item in items[:8])
        assert found.bits_per_byte == pytest.approx(2 * 8 * int(length) / size)
        assert found.prefix_gain == pytest.approx(8 * int(length) / size)
        assert found.paired_gain.amounts == [int(length)] * 8
        low, high = found.prefix_gain_interval
        assert low <= found.prefix_gain <= high
    assert held.prefix_gain == held.continuation["8"].prefix_gain and held.reads_prefix is True


@given(st.lists(st.integers(0, 5), max_size=30))
def test_wrong_prefixes_are_of_other_documents(documents):
    nothing = np.array([])
    made = [Item(d, np.array([d, k]), nothing, nothing, 1) for k, d in enumerate(documents)]
    found = yardsticks.wrong_prefixes(made)
    for document, prefix in zip(documents, found, strict=True):
        assert prefix is None or prefix[0] != document
    most = max(map(documents.count, documents), default=0)
    if 2 * most <= len(documents):  # each prefix stands for itself once
        assert sorted(int(prefix[1]) for prefix in found) == list(range(len(documents)))


def test_bytes_by_length_are_those_of_the_original_text(prepared):
    """The sun is spelt in bytes: no number of tokens that ends within it has a size."""
    tokenizer, vocabulary = prepared.tokenizer, prepared.tokenizer.vocabulary
    text = " the river\u2600 opens a garden near the\u2600\u2600 stone by" * 8
    tokens = tokenizer.encode(text)
    evaluation = Evaluation(prefix_tokens=6, continuation_tokens=5, lengths=tuple(range(1, 30)))
    halves = 0
    for item in cut([text], tokenizer, evaluation):
        window = np.concatenate([item.left, item.following])
        [start] = [
            i for i in range(len(tokens)) if np.array_equal(tokens[i : i + len(window)], window)
        ][:1]
        for length in range(1, len(item.following) + 1):
            before, after = (
                b"".join(spelling(tokenizer, t) for t in tokens[start : start + len(item.left) + n])
                for n in (0, length)
            )
            try:
                after.decode()
            except UnicodeDecodeError:
                halves += 1
                assert length not in item.length_bytes
            else:
                assert item.length_bytes[length] == len(after) - len(before)
        assert max(item.length_bytes) <= len(item.following)
    assert halves and vocabulary.text[tokens].all()


def spelling(tokenizer, token):
    """The bytes of a SentencePiece token."""
    name = tokenizer._backend.model.id_to_piece(int(token))
    return (
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else tokenizer.pieces[token].encode()
    )


def test_lengths_that_no_row_holds_are_left_out(tiny, prepared):
    evaluation = Evaluation(**EVALUATION.model_dump() | {"continuation_tokens": 12})
    long = cut(prepared.heldout, prepared.tokenizer, evaluation)
    vocabulary = prepared.tokenizer.vocabulary
    wanted = {"gpt": ["1", "2", "4", "8", "16"], "xlnet": ["1", "2", "4", "8"]}
    for preset, lengths in wanted.items():  # a target takes two tokens of XLNet's row, of 40 here
        settings = tiny(preset, model__sequence_length=40)
        scorer = Scorer(Uniform(512), settings, vocabulary, 8)
        found = yardsticks._by_length(scorer, long[:8], evaluation.lengths)
        assert list(found["continuation"]) == lengths
    assert not yardsticks._by_length(scorer, [], evaluation.lengths)


def test_lengths_that_no_decoder_holds_are_left_out_and_t5_is_asked_in_pieces(tiny, prepared):
    evaluation = Evaluation(**EVALUATION.model_dump() | {"continuation_tokens": 12})
    long = cut(prepared.heldout, prepared.tokenizer, evaluation)
    for objective, lengths in {"prefix_lm": "1 2 4 8", "span_corruption": "1 2 4 8 16"}.items():
        given = {"model__sequence_length": 40, "model__target_length": 12}
        settings = tiny("t5", data__objective=objective, **given)
        scorer = Scorer(Uniform(512), settings, prepared.tokenizer.vocabulary, 8)
        found = yardsticks._by_length(scorer, long[:8], evaluation.lengths)
        assert list(found["continuation"]) == lengths.split()
        assert found["prefix_gain"] == found["continuation"][lengths.split()[-1]].prefix_gain


def test_unigram_bits_are_those_of_the_smoothed_counts():
    items = [Item(0, np.array([0]), np.array([0, 1]), np.array([0]), 3)]
    text = np.array([True, True, False])
    nats = yardsticks.unigram_nats(np.array([2.0, 0.0, 9.0]), items, text)
    wanted = -(math.log2(3 / 4) + math.log2(1 / 4))
    assert yardsticks.bits(nats, np.array([3])) == pytest.approx(wanted / 3)
    kept = yardsticks.paired(items, nats).as_json()
    assert kept["documents"] == [0] and kept["sizes"] == [3]
    assert kept["amounts"] == pytest.approx([wanted], abs=1e-4)
