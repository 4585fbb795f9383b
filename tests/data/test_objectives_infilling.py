"""Denoising (BART) and blank infilling (GLM)."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.example import generator
from megaarch.data.objectives.blank_infilling import (
    SentenceInfilling,
    SpanInfilling,
    SuffixInfilling,
)
from megaarch.data.objectives.denoising import Denoising
from tests.data.toy_vocabulary import toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
MASK = VOCABULARY.mask
keys = st.integers(0, 2**32)
GLM = {
    SpanInfilling(): VOCABULARY.mask,
    SentenceInfilling(): VOCABULARY.sentence_mask,
    SuffixInfilling(): VOCABULARY.suffix_mask,
}


def distinct_words(raw, seed):
    """Even ids without a multiple of ten: `raw` different one-token words and no sentence end."""
    ids = np.array([i for i in range(0, 1000, 2) if i % 10])
    return np.random.default_rng(seed).permutation(ids)[:raw]


@settings(max_examples=100)
@given(st.integers(1, 300), keys, st.sampled_from([(0.3, 3.0), (0.5, 1.0), (0.15, 12.0)]))
def test_bart_keeps_the_order_masks_no_more_than_the_budget_and_targets_the_original(
    raw, key, settings
):
    tokens = distinct_words(raw, key)
    objective = Denoising(*settings)
    example = objective(tokens, VOCABULARY, generator(0, key))
    assert (example.targets == tokens).all()
    kept = example.inputs[example.inputs != MASK]
    removed = np.flatnonzero(~np.isin(tokens, kept))
    assert 1 <= len(removed) <= objective.budget(raw)
    assert (kept == tokens[np.isin(tokens, kept)]).all()  # one sentence: the order stays
    # each run of removed words has a mask where it was
    at = {token: i for i, token in enumerate(example.inputs.tolist())}
    for run in np.split(removed, np.flatnonzero(np.diff(removed) > 1) + 1):
        before = at[tokens[run[0] - 1]] if run[0] else -1
        after = at[tokens[run[-1] + 1]] if run[-1] < raw - 1 else len(example.inputs)
        assert after - before > 1
        assert (example.inputs[before + 1 : after] == MASK).all()


def test_bart_permutes_whole_sentences():
    sentences = [
        [1, 3, 10],
        [11, 13, 15, 20],
        [21, 30, 40],
        [31, 33],
    ]  # a run of ends stays together
    tokens = np.concatenate(sentences)
    orders = Counter()
    for key in range(2400):
        inputs = Denoising(noise_density=1e-9)(tokens, VOCABULARY, generator(0, key)).inputs
        kept = [t for t in inputs.tolist() if t != MASK]
        order = tuple(dict.fromkeys(i for t in kept for i, s in enumerate(sentences) if t in s))
        original = [t for i in order for t in sentences[i] if t in kept]
        assert kept == original
        if len(order) == 4:
            orders[order] += 1
    assert len(orders) == 24  # words of a sentence are masked now and then: 4 remain often enough
    count, p = sum(orders.values()), 1 / 24
    assert all(abs(n - count * p) < 4.5 * math.sqrt(count * p) for n in orders.values())


def test_bart_never_splits_a_word():
    for key in range(60):
        tokens = toy_text(120, key)
        tokens = tokens[tokens % 10 != 0]
        begins = tokens % 2 == 0
        begins[0] = True
        word = np.cumsum(begins)
        inputs = Denoising()(tokens, VOCABULARY, generator(0, key)).inputs
        rest, masked = [t for t in inputs.tolist() if t != MASK], 0
        for w in range(1, word[-1] + 1):
            this = tokens[word == w].tolist()
            if rest[: len(this)] == this:
                rest = rest[len(this) :]
            else:
                masked += 1
        assert rest == []
        # Equal neighbouring words could be told apart either way, never more than the budget.
        assert 0 < masked <= Denoising().budget(word[-1])


@pytest.mark.parametrize("text", ["one giant word", "giant word and small ones", "all specials"])
def test_bart_stays_within_its_bound_on_strange_text(text):
    tokens = np.full(200, 1)
    if text == "giant word and small ones":
        tokens[150:] = 2
    if text == "all specials":
        tokens[:] = VOCABULARY.eos
    bound = Denoising().lengths(200).inputs
    for key in range(100):
        assert len(Denoising()(tokens, VOCABULARY, generator(0, key)).inputs) <= bound


@pytest.mark.parametrize("objective", [Denoising(), SpanInfilling()], ids=str)
def test_bounds_are_tight(objective):
    rows = [objective(distinct_words(380, k), VOCABULARY, generator(0, k)) for k in range(200)]
    bound = objective.lengths(380)
    used = np.mean([len(e.inputs) for e in rows])
    if bound.total is not None:
        bound, used = bound.total, np.mean([len(e.inputs) + len(e.targets) for e in rows])
    else:
        bound = bound.inputs
    assert used <= bound < 1.05 * used


@settings(max_examples=200)
@given(st.sampled_from(list(GLM)), st.integers(2, 250), keys)
def test_glm_loses_nothing_and_places_its_spans(objective, raw, key):
    tokens = toy_text(raw, key)
    example = objective(tokens, VOCABULARY, generator(0, key))
    n, m = len(example.inputs), len(example.targets)
    assert example.input_positions.tolist() == [[i, 0] for i in range(n)]
    assert example.feed[0] == VOCABULARY.sop
    ended = not isinstance(objective, SuffixInfilling)  # a suffix has no eop: the text goes on
    targets = example.targets if ended else np.append(example.targets, VOCABULARY.eop)
    assert targets[-1] == VOCABULARY.eop
    masks = set(np.flatnonzero(example.inputs == GLM[objective]).tolist())
    spans, at = {}, 0
    while at < m:
        end = at + targets[at:].tolist().index(VOCABULARY.eop)
        (mask,) = set(example.feed_positions[at : end + ended, 0].tolist())
        steps = example.feed_positions[at : end + ended, 1].tolist()
        assert steps == list(range(1, end - at + 1 + ended))
        spans[mask] = targets[at:end].tolist()
        fed = [VOCABULARY.sop, *spans[mask]]
        assert example.feed[at : end + ended].tolist() == fed[: len(steps)]
        at = end + 1
    assert set(spans) == masks  # each mask one span
    filled = [t for i, x in enumerate(example.inputs.tolist()) for t in spans.get(i, [x])]
    assert filled == tokens.tolist()


def test_glm_short_spans_follow_the_restricted_poisson():
    raw, lengths, shares = 500, Counter(), []
    for key in range(400):
        example = SpanInfilling()(toy_text(raw, key), VOCABULARY, generator(0, key))
        ends = np.flatnonzero(example.targets == VOCABULARY.eop)
        drawn = np.diff(ends, prepend=-1) - 1
        lengths.update(drawn.tolist())
        shares.append(drawn.sum())
        assert 75 <= drawn.sum() <= 75 + 7  # floor(0.15·500), and the last span's surplus
        masks = np.flatnonzero(example.inputs == MASK)
        assert (np.diff(masks) > 1).all()
    # Overshoot of a renewal process: (E[l²]/E[l] - 1) / 2 tokens.
    mean = 3 / (1 - math.exp(-3))
    overshoot = (12 / 3 - 1) / 2
    assert abs(np.mean(shares) - 75 - overshoot) < 4.5 * np.std(shares) / 20 + 0.05
    count = sum(lengths.values())
    assert abs(count / 400 - (75 + overshoot) / mean) < 4.5 * 2.6 / 20
    for k in range(1, 8):
        p = math.exp(-3) * 3**k / math.factorial(k) / (1 - math.exp(-3))
        # The last of 25 spans is length-biased.
        assert abs(lengths[k] / count - p) < 4.5 * math.sqrt(p * (1 - p) / count) + 0.015


def test_glm_shuffles_its_spans():
    first = Counter()
    for key in range(300):
        example = SpanInfilling()(toy_text(300, key), VOCABULARY, generator(0, key))
        masks = np.flatnonzero(example.inputs == MASK).tolist()
        first[masks.index(example.feed_positions[0, 0]) < len(masks) // 2] += 1
    assert 100 < first[True] < 200


def test_glm_sentences_are_whole():
    for key in range(100):
        tokens = toy_text(200, key)
        ends = (tokens % 10 == 0) & ~np.append(tokens[1:] % 10 == 0, False)
        starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1, [200]])
        sentences = {tuple(tokens[a:b]) for a, b in itertools.pairwise(starts)}
        example = SentenceInfilling()(tokens, VOCABULARY, generator(0, key))
        text = example.targets.tolist()
        masked = 0
        while text:
            end = text.index(VOCABULARY.eop)
            assert tuple(text[:end]) in sentences
            masked += end
            text = text[end + 1 :]
        assert masked >= 30
    # Without an end of sentence: one span of 15%. With nothing but ends and words: still bounded.
    example = SentenceInfilling()(distinct_words(100, 0), VOCABULARY, generator(0, 0))
    assert len(example.targets) == 16
    short = np.tile([1, 10], 200)
    example = SentenceInfilling()(short, VOCABULARY, generator(0, 0))
    assert len(example.inputs) + len(example.targets) <= SentenceInfilling().lengths(400).total
    assert (len(example.targets) - 1) % 2 == 0 and len(example.targets) == 61


def test_glm_suffix_is_uniform_from_a_quarter_to_all_but_one():
    raw, draws = 9, 3000
    lengths = Counter(
        len(SuffixInfilling()(toy_text(raw, 0), VOCABULARY, generator(0, k)).targets)
        for k in range(draws)
    )
    assert set(lengths) == {2, 3, 4, 5, 6, 7, 8}
    p = 1 / 7
    assert all(abs(n - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p)) for n in lengths.values())
    half = SuffixInfilling(shortest=0.5)
    targets = [len(half(toy_text(raw, 0), VOCABULARY, generator(0, k)).targets) for k in range(200)]
    assert set(targets) == {4, 5, 6, 7, 8}


def test_barts_last_resort_stays_within_its_bound(monkeypatch):
    """Three giant words so far apart that one run of 45% of the words holds only one of them."""
    giant, small = [2] + [1] * 59, [2] * 20
    tokens = np.array(giant + small + giant + small + giant)
    objective = Denoising(noise_density=0.45, mean_span_length=10.0)
    monkeypatch.setattr("megaarch.data.objectives.denoising.DRAWS", 0)
    inputs = objective(tokens, VOCABULARY, generator(0, 0)).inputs
    words = 3 + 40
    assert (inputs == MASK).sum() == 1
    assert len(inputs) == 220 - (60 + math.ceil(0.45 * words) - 1) + 1
    assert len(inputs) <= objective.lengths(220).inputs
