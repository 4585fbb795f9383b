"""What every objective promises, and the sequence objectives one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.example import generator, largest_raw
from megaarch.data.objectives.blank_infilling import (
    SentenceInfilling,
    SpanInfilling,
    SuffixInfilling,
)
from megaarch.data.objectives.cloze import MaskedLM
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.language_modelling import FullLM, PrefixLM, supervised
from megaarch.data.objectives.permutation import PermutationLM
from megaarch.data.objectives.span_corruption import SequentialDenoising, SpanCorruption
from tests.data.mixtures import MIXTURES, build
from tests.data.toy_vocabulary import toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
COMPONENTS = [c for mixture in MIXTURES.values() for _, c in mixture] + [
    MaskedLM(whole_word_masking=True),
    MaskedLM(max_predictions=5),
    PrefixLM(mirrored=True),
    SpanCorruption(noise_density=0.9, mean_span_length=1.0),
    Denoising(noise_density=0.5, mean_span_length=10.0),
    SpanInfilling(noise_density=0.5, mean_span_length=12.0),
    SentenceInfilling(noise_density=0.4),
    SuffixInfilling(shortest=0.9),
    SequentialDenoising(noise_density=0.5),
    PermutationLM(alpha=2, longest=9),
]
EXACT = (FullLM, SpanCorruption, PermutationLM)
any_component = st.sampled_from(COMPONENTS)
keys = st.integers(0, 2**32)


@settings(max_examples=300)
@given(any_component, st.integers(2, 260), keys, st.sampled_from([0, 4, 30]))
def test_lengths_bound_every_example(objective, raw, key, eos_every):
    example = objective(toy_text(raw, key, eos_every), VOCABULARY, generator(0, key))
    bound = objective.lengths(raw)
    n, m = len(example.inputs), len(example.targets)
    assert n <= bound.inputs and m <= bound.targets
    if bound.total is not None:
        assert n + m <= bound.total <= bound.inputs + bound.targets
    if isinstance(objective, EXACT):
        assert (n, m) == (bound.inputs, bound.targets)
    assert bound.in_place == (example.places is not None)
    for array in (example.inputs, example.targets):
        assert array.dtype == np.int64 and array.min(initial=0) >= 0
        assert array.max(initial=0) < VOCABULARY.size


@pytest.mark.parametrize("objective", COMPONENTS, ids=str)
def test_lengths_never_fall(objective):
    bounds = [objective.lengths(raw) for raw in range(1, 3000)]
    for field in ("inputs", "targets"):
        assert (np.diff([getattr(b, field) for b in bounds]) >= 0).all()
    if bounds[0].total is not None:
        assert (np.diff([b.total for b in bounds]) >= 0).all()


@settings(max_examples=100)
@given(any_component, st.integers(2, 120), keys)
def test_the_generator_alone_decides(objective, raw, key):
    tokens = toy_text(raw, key)
    kept = tokens.copy()
    first, again = (objective(tokens, VOCABULARY, generator(5, key)) for _ in range(2))
    assert (tokens == kept).all()
    for name, value in vars(first).items():
        other = getattr(again, name)
        assert np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
    # T5 masks the end of a row where one span holds all of the noise.
    one_span = isinstance(objective, SpanCorruption) and objective.counts(200)[1] == 1
    if not isinstance(objective, FullLM) and not one_span:
        others = [objective(toy_text(200, 0), VOCABULARY, generator(5, k)) for k in range(8)]
        assert len({(e.inputs.tobytes(), e.targets.tobytes(), e.prefix) for e in others}) > 1


@pytest.mark.parametrize("objective", COMPONENTS, ids=str)
@pytest.mark.parametrize("raw", [0, 1, 2, 3])
def test_tiny_rows_work_or_say_what_is_wrong(objective, raw):
    for key in range(30):
        try:
            example = objective(toy_text(raw, key), VOCABULARY, generator(0, key))
        except ValueError as error:
            assert raw < 2 and "needs a row of at least" in str(error)
        else:
            assert raw > 0
            bound = objective.lengths(raw)
            assert len(example.inputs) <= bound.inputs and len(example.targets) <= bound.targets


def test_unsigned_tokens_are_taken_as_they_are():
    tokens = toy_text(100, 1)
    for objective in COMPONENTS:
        signed = objective(tokens, VOCABULARY, generator(0, 1))
        unsigned = objective(tokens.astype(np.uint16), VOCABULARY, generator(0, 1))
        assert (signed.inputs == unsigned.inputs).all()
        assert (signed.targets == unsigned.targets).all()


def test_mixtures_and_their_weights():
    weights = {name: [w for w, _ in build(name)] for name in MIXTURES}
    assert all(sum(w) == pytest.approx(1) for w in weights.values())
    assert weights["ul2"] == pytest.approx([0.8 / 6] * 6 + [0.2])
    assert weights["unilm"] == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6])
    assert weights["blank_infilling"] == pytest.approx([0.5, 0.3, 0.2])
    denoisers = [(c.mode, c.mean_span_length, c.noise_density) for _, c in build("ul2")[:6]]
    assert sorted(denoisers) == [
        ("mode_r", 3, 0.15),
        ("mode_r", 8, 0.15),
        ("mode_x", 3, 0.5),
        ("mode_x", 8, 0.5),
        ("mode_x", 64, 0.15),
        ("mode_x", 64, 0.5),
    ]


def test_build_passes_settings_on_and_refuses_what_has_no_meaning():
    ((_, t5),) = build("span_corruption", noise_density=0.5, mean_span_length=5)
    assert (t5.noise_density, t5.mean_span_length) == (0.5, 5)
    ((_, bert),) = build("masked_lm", whole_word_masking=True, max_predictions=7)
    assert bert.whole_word_masking and bert.lengths(512).targets == 7
    short, sentences, suffix = (c for _, c in build("blank_infilling", noise_density=0.2))
    assert short.noise_density == sentences.noise_density == 0.2
    assert not hasattr(suffix, "noise_density")
    for name, setting in (
        ("full_lm", {"noise_density": 0.1}),
        ("ul2", {"noise_density": 0.1}),
        ("unilm", {"whole_word_masking": True}),
        ("unilm", {"max_predictions": 20}),
        ("masked_lm", {"mean_span_length": 3}),
        ("span_corruption", {"noise_density": 1.0}),
        ("span_corruption", {"mean_span_length": 0.5}),
        ("denoising", {"noise_density": 0.8}),
        ("supervised", {}),
        ("no_such", {}),
    ):
        with pytest.raises(ValueError):
            build(name, **setting)


@settings(max_examples=60)
@given(st.integers(2, 90), keys)
def test_prefix_lm_loses_nothing_and_mirrors(raw, key):
    tokens = toy_text(raw, key)
    example = PrefixLM()(tokens, VOCABULARY, generator(0, key))
    mirrored = PrefixLM(mirrored=True)(tokens, VOCABULARY, generator(0, key))
    assert (np.concatenate([example.inputs, example.targets]) == tokens).all()
    assert (np.concatenate([mirrored.inputs, mirrored.targets]) == tokens).all()
    assert len(example.inputs) + len(mirrored.inputs) == raw
    assert min(len(example.inputs), len(example.targets)) >= 1


def test_prefix_lm_splits_uniformly():
    raw, draws = 11, 4000
    tokens = toy_text(raw, 0)
    splits = [len(PrefixLM()(tokens, VOCABULARY, generator(0, k)).inputs) for k in range(draws)]
    counts = np.bincount(splits, minlength=raw + 1)
    assert counts[0] == counts[raw] == 0
    p = 1 / (raw - 1)
    assert (abs(counts[1:raw] - draws * p) < 4.5 * np.sqrt(draws * p * (1 - p))).all()


@pytest.mark.parametrize(
    "inputs, raw, targets", [(512, 568, 114), (1024, 1137, 229), (2048, 2274, 456)]
)
def test_span_corruption_has_t5s_lengths(inputs, raw, targets):
    objective = SpanCorruption()
    assert largest_raw(lambda r: objective.lengths(r).inputs <= inputs) == raw
    assert objective.lengths(raw).inputs == inputs
    assert objective.lengths(raw).targets == targets


def spans_of(tokens, first_special):
    """[(sentinel, text after it)] of T5 targets or inputs, without the last token."""
    marks = np.flatnonzero(tokens[:-1] >= first_special)
    ends = np.append(marks[1:], len(tokens) - 1)
    return [(tokens[a], tokens[a + 1 : b]) for a, b in zip(marks, ends, strict=True)]


T5 = [c for mixture in ("span_corruption", "ul2") for _, c in MIXTURES[mixture]][:-1]


@settings(max_examples=150)
@given(st.sampled_from(T5), st.integers(2, 300), keys)
def test_span_corruption_loses_nothing(objective, raw, key):
    tokens = toy_text(raw, key)
    example = objective(tokens, VOCABULARY, generator(0, key))
    inputs, targets = example.inputs, example.targets
    assert inputs[-1] == targets[-1] == VOCABULARY.eos
    if objective.mode:
        assert inputs[0] == VOCABULARY.special[objective.mode]
        inputs = inputs[1:]
    assert inputs[0] < VOCABULARY.mask  # a row starts with text
    first = VOCABULARY.size - VOCABULARY.sentinels
    noise = spans_of(targets, first)
    assert [mark for mark, _ in noise] == [VOCABULARY.size - 1 - k for k in range(len(noise))]
    assert all(len(text) for _, text in noise)
    filled = []
    where = dict(noise)
    for token in inputs[:-1]:
        filled.extend(where[token] if token >= first else [token])
    assert filled == tokens.tolist()
    assert all(len(text) for _, text in spans_of(inputs, first)[:-1])  # spans do not touch


def test_span_corruption_segments_uniformly():
    # raw 12 with density 1/3 and mean 2: 4 noise tokens in 2 spans; 3 and 7 ways, all alike.
    objective = SpanCorruption(noise_density=1 / 3, mean_span_length=2.0)
    assert objective.counts(12) == (4, 2)
    draws, seen = 4200, {}
    for key in range(draws):
        example = objective(np.arange(12), VOCABULARY, generator(0, key))
        (_, a), (_, b) = spans_of(example.targets, VOCABULARY.size - VOCABULARY.sentinels)
        seen[a[0], len(a), b[0]] = seen.get((a[0], len(a), b[0]), 0) + 1
    assert len(seen) == 21
    p = 1 / 21
    assert all(
        abs(count - draws * p) < 4.5 * np.sqrt(draws * p * (1 - p)) for count in seen.values()
    )


def test_span_corruption_asks_for_sentinels_it_lacks():
    with pytest.raises(ValueError, match="sentinel 27 asked for"):
        SpanCorruption()(toy_text(568, 0), toy_vocabulary(sentinels=10), generator(0, 0))


@settings(max_examples=60)
@given(st.integers(2, 120), keys)
def test_ul2_sequential_denoising_loses_nothing(raw, key):
    tokens = toy_text(raw, key)
    example = SequentialDenoising()(tokens, VOCABULARY, generator(0, key))
    mode, *prefix, end = example.inputs.tolist()
    *suffix, eos = example.targets.tolist()
    assert (mode, end, eos) == (VOCABULARY.mode_s, VOCABULARY.eos, VOCABULARY.eos)
    assert prefix + suffix == tokens.tolist()
    assert prefix and 1 <= len(suffix) <= raw - max(round((raw - 1) / 2), 1)


def test_supervised_pairs_end_their_targets():
    example = supervised(np.array([1, 2]), np.array([3], dtype=np.uint16), VOCABULARY)
    assert example.inputs.tolist() == [1, 2]
    assert example.targets.tolist() == [3, VOCABULARY.eos]
