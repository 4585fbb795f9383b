"""Masked LM (BERT), UniLM and permutation LM (XLNet): targets at places of the row."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.example import generator
from megaarch.data.objectives.cloze import MaskedLM, UniLM
from megaarch.data.objectives.permutation import PermutationLM
from tests.data.mixtures import MIXTURES
from tests.data.toy_vocabulary import TEXT, toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
MASK = VOCABULARY.mask
keys = st.integers(0, 2**32)
CLOZE = [MaskedLM(), MaskedLM(whole_word_masking=True)] + [c for _, c in MIXTURES["unilm"]]
DIRECTIONS = ("bidirectional", "seq2seq", "left_to_right", "right_to_left")


@settings(max_examples=200)
@given(st.sampled_from(CLOZE), st.integers(2, 250), keys, st.sampled_from([0, 5]))
def test_cloze_targets_are_the_original_at_their_places(objective, raw, key, eos_every):
    tokens = toy_text(raw, key, eos_every)
    example = objective(tokens, VOCABULARY, generator(0, key))
    places = example.places
    assert (np.diff(places) > 0).all()
    assert (example.targets == tokens[places]).all()
    assert (tokens[places] < TEXT).all()  # no special is chosen
    untouched = np.delete(np.arange(raw), places)
    assert (example.inputs[untouched] == tokens[untouched]).all()
    changed = example.inputs[places]
    assert ((changed == MASK) | (changed < TEXT)).all()
    wanted = min(max(1, round(0.15 * raw)), int((tokens < TEXT).sum()))
    if getattr(objective, "whole_word_masking", False):
        assert len(places) <= wanted
    else:
        assert len(places) == wanted


@pytest.mark.parametrize("objective", CLOZE, ids=str)
def test_cloze_corrupts_80_10_10(objective):
    outcome, swapped, chosen = Counter(), Counter(), np.zeros(200)
    for key in range(500):
        tokens = toy_text(200, key)
        example = objective(tokens, VOCABULARY, generator(0, key))
        fed, kept = example.inputs[example.places], example.targets
        outcome.update(np.where(fed == MASK, "mask", np.where(fed == kept, "kept", "random")))
        swapped.update((fed[(fed != MASK) & (fed != kept)] // 100).tolist())
        chosen[example.places] += 1
    count = sum(outcome.values())
    same = 0.1 / TEXT  # a random token can be the one that was there
    for name, p in (("mask", 0.8), ("random", 0.1 - same), ("kept", 0.1 + same)):
        assert abs(outcome[name] - count * p) < 4.5 * math.sqrt(count * p * (1 - p))
    assert set(swapped) == set(range(10))  # random tokens come from all the text
    quarters = chosen.reshape(4, 50).sum(axis=1)  # places are chosen all over the row
    assert (abs(quarters - count / 4) < 4.5 * math.sqrt(count * 3 / 16)).all()


def test_bert_counts():
    assert MaskedLM().lengths(512).targets == 77
    assert MaskedLM(max_predictions=20).lengths(512).targets == 20
    assert MaskedLM().lengths(30).targets == 4  # round(4.5), halves to even
    assert (
        len(MaskedLM(max_predictions=20)(toy_text(512, 0), VOCABULARY, generator(0, 0)).places)
        == 20
    )
    only_specials = np.full(8, VOCABULARY.eos)
    assert len(MaskedLM()(only_specials, VOCABULARY, generator(0, 0)).places) == 0


def test_whole_words_are_masked_whole():
    partly = 0
    for key in range(100):
        tokens = toy_text(200, key, eos_every=20)
        special = tokens >= TEXT
        begins = (tokens % 2 == 0) | special
        begins[0] = True
        begins[1:] |= special[:-1]
        word = np.cumsum(begins)
        places = MaskedLM(whole_word_masking=True)(tokens, VOCABULARY, generator(0, key)).places
        assert set(np.flatnonzero(np.isin(word, word[places]))) == set(places.tolist())
        single = MaskedLM()(tokens, VOCABULARY, generator(0, key)).places
        partly += set(np.flatnonzero(np.isin(word, word[single]))) != set(single.tolist())
    assert partly > 90


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_unilm_directions(direction):
    splits = []
    for key in range(600):
        example = UniLM(direction)(toy_text(20, key), VOCABULARY, generator(0, key))
        assert example.reverse == (direction == "right_to_left")
        splits.append(example.prefix)
    if direction == "seq2seq":
        assert set(splits) == set(range(1, 20))
        assert abs(np.mean(splits) - 10) < 4.5 * math.sqrt((19**2 - 1) / 12 / 600)
    else:
        assert set(splits) == {None if direction == "bidirectional" else 0}


def test_unilm_ngrams():
    # Three targets in a long row: the first n-gram hardly ever touches the others, so the runs
    # tell the sizes drawn. Trimmed to three: 1+1+1, 1+1+2→1, 1+2, 2+1, 3 (or 1+... cut).
    objective, draws, raw = UniLM("bidirectional", noise_density=0.003), 4000, 1000
    runs = Counter()
    tokens = toy_text(raw, 0)
    for key in range(draws):
        places = objective(tokens, VOCABULARY, generator(0, key)).places
        assert len(places) == 3
        breaks = np.flatnonzero(np.diff(places) > 1)
        runs[tuple(sorted(np.diff(breaks, prepend=-1, append=2).tolist()))] += 1
    # First 1 (.8): then 1 (.8) leaves one; else 2 are left and a bigram or trigram fills them.
    # First 2 (.1): one is left. First 3 (.1).
    expected = {(1, 1, 1): 0.8 * 0.8, (1, 2): 0.8 * 0.2 + 0.1, (3,): 0.1}
    for key, p in expected.items():
        # Chance neighbours: about 3 pairs with 2 sides of 1000 places each.
        assert abs(runs[key] - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p)) + draws * 0.006


@settings(max_examples=150)
@given(st.integers(1, 300), keys)
def test_xlnet_targets(raw, key):
    tokens = toy_text(raw, key)
    example = PermutationLM()(tokens, VOCABULARY, generator(0, key))
    assert example.permuted and (example.inputs == tokens).all()
    assert len(set(example.places.tolist())) == len(example.places) == max(1, round(raw / 6))
    assert (example.targets == tokens[example.places]).all()


def test_xlnet_order_is_uniform():
    draws, descents = 400, 0
    for key in range(draws):
        places = PermutationLM()(toy_text(600, 0), VOCABULARY, generator(0, key)).places
        descents += int((np.diff(places) < 0).sum())
    pairs = draws * 99
    assert abs(descents - pairs / 2) < 4.5 * math.sqrt(draws * 101 / 12)


def test_xlnet_spans_lie_in_windows_of_their_length_and_alpha_times_it():
    # Of 13 one-token words two are targets. A first span of 1 lies in places 0 to 5 and the next one
    # in the 6 places from 7 on, where its last token is not the row's last: 7 to 11. If it should
    # have begun at 12, one target is drawn from the rest. A span of 2 begins at 0 to 11 - 1.
    draws, single = 6000, 60 / 137
    objective, starts = PermutationLM(), np.ones(13, dtype=bool)
    pairs = Counter()
    for key in range(draws):
        pairs[tuple(np.flatnonzero(objective.spans(starts, generator(0, key))).tolist())] += 1
    expected = Counter()
    for first in range(6):
        for ahead in range(6):
            second = 7 + ahead
            expected[(first, second) if second < 12 else (first,)] += single / 36
    for ahead in range(12):
        begin = ahead
        expected[(begin, begin + 1) if begin + 2 < 13 else ()] += (1 - single) / 12
    assert set(pairs) == set(expected)
    for taken, p in expected.items():
        assert abs(pairs[taken] - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p)), taken


def test_xlnet_spans_begin_at_words():
    tokens = toy_text(400, 5)
    begins = np.append(True, tokens[1:] % 2 == 0)
    for key in range(100):
        taken = PermutationLM().spans(begins, generator(0, key))
        first = taken & ~np.append(False, taken[:-1])
        assert begins[first].all() and taken.sum() <= 67
