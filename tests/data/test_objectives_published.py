"""Each corruption against that of published code, which `published.py` writes a second time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megaarch.data.example import generator, largest_raw
from megaarch.data.objectives.blank_infilling import SpanInfilling
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.permutation import PermutationLM
from megaarch.data.objectives.span_corruption import SequentialDenoising, SpanCorruption
from tests.data import published
from tests.data.mixtures import MIXTURES
from tests.data.toy_vocabulary import toy_vocabulary

VOCABULARY = toy_vocabulary()
T5 = [(c.noise_density, c.mean_span_length) for _, c in MIXTURES["ul2"][:-1]]
OTHERS = [(0.05, 1.0), (0.15, 1.0), (0.25, 5.5), (0.3, 2.0), (0.35, 10.0), (0.9, 6.0)]
ROWS = 400


def agree(ours, theirs):
    """Whether the means of each fact over samples [N, facts] agree: within 4 standard errors, which
    chance exceeds in one of 16,000."""
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    difference = abs(ours.mean(axis=0) - theirs.mean(axis=0))
    assert (difference <= 4 * error + 1e-9).all(), (difference / error, error)


def histogram(values, edges):
    return np.histogram(values, edges)[0]


@pytest.mark.parametrize("density, span", T5 + OTHERS)
def test_t5_counts_of_every_length(density, span):
    lengths = torch.arange(2, 5001)
    noise, spans = published.t5_counts(lengths, density, span)
    objective = SpanCorruption(density, span)
    for raw, n, s in zip(lengths.tolist(), noise.tolist(), spans.tolist(), strict=True):
        # t5 does not mask rows that have fewer kept tokens than spans
        assert objective.counts(raw) == (n, min(s, raw - n)), raw


def test_t5_rounds_in_float32():
    assert SpanCorruption().counts(190) == (29, 10)


@pytest.mark.parametrize("density, span", T5)
def test_t5_raw_lengths_fill_the_inputs(density, span):
    objective, equal = SpanCorruption(density, span), 0
    for inputs in [*range(16, 512, 7), 512, 1024, 2048]:
        raw = largest_raw(lambda r, inputs=inputs: objective.lengths(r).inputs <= inputs)
        theirs = published.t5_raw(inputs, density, span)
        if objective.lengths(theirs).inputs <= inputs:
            assert raw == theirs
            equal += 1
        else:  # random_spans_helper plans no span where the mask has one
            assert raw < theirs and objective.counts(theirs)[1] == 1
    assert equal >= 40


@pytest.mark.parametrize("density", [0.25, 0.5, 0.1])
def test_ul2_prefixes_are_those_of_t5s_prefix_mask(density):
    objective = SequentialDenoising(density)
    for raw in range(2, 2000):
        assert objective.shortest_prefix(raw) == published.t5_shortest_prefix(raw, density)
    raw, draws = 22, 4000
    shortest = published.t5_shortest_prefix(raw, density)
    tokens = np.arange(raw)
    prefixes = [
        len(objective(tokens, VOCABULARY, generator(0, k)).inputs) - 2 for k in range(draws)
    ]
    counts = np.bincount(prefixes, minlength=raw)
    p = 1 / (raw - shortest)
    assert counts[:shortest].sum() == 0 and len(counts) == raw
    assert (abs(counts[shortest:] - draws * p) < 4 * np.sqrt(draws * p * (1 - p))).all()


def words_of(raw, rng):
    """Words of 1 to 3 tokens, as toy text without sentence ends: even ids begin a word."""
    words = []
    while sum(map(len, words)) < raw:
        size = int(rng.integers(1, 4))
        words.append([2 * (7 * len(words) % 499 // 5 * 5 + 1)] + [1] * (size - 1))
    return words


@pytest.mark.parametrize("words", ["one token each", "one to three tokens"])
@pytest.mark.parametrize("density, span", [(0.3, 3.0), (0.5, 1.0), (0.2, 8.0)])
def test_bart_masks_as_fairseq_does(words, density, span):
    rng = np.random.default_rng(0)
    text = [[w] for w in published.one_token_words(300).tolist()]
    if words != "one token each":
        text = words_of(300, rng)
    tokens = np.concatenate(text)
    objective = Denoising(density, span)
    bound = objective.lengths(len(tokens)).inputs
    ours, theirs, again = [], [], 0
    for key in range(ROWS):
        ours.append(objective(tokens, VOCABULARY, generator(0, key)).inputs)
        while True:  # what does not fit the row is drawn again
            theirs.append(published.fairseq_infilling(text, density, span, rng))
            if len(theirs[-1]) <= bound:
                break
            theirs.pop()
            again += 1
    assert again < ROWS / 5
    edges = np.linspace(0, bound, 9)
    facts = [
        [
            [
                *published.infilling_facts(inputs, len(tokens)),
                *histogram(np.flatnonzero(np.asarray(inputs) == VOCABULARY.mask), edges),
            ]
            for inputs in side
        ]
        for side in (ours, theirs)
    ]
    agree(*facts)


def test_bart_counts_words_in_float32():
    # ceil(0.3·50) is 15; float32's 0.3 is above 0.3
    tokens, masked = published.one_token_words(50), []
    assert Denoising().budget(50) == 16
    for words in range(1, 3000):
        spans = published.fairseq_spans(words, 0.3, 900.0, np.random.default_rng(words))
        masked.append(sum(spans))
    assert masked == [Denoising().budget(words) for words in range(1, 3000)]
    long = Denoising(mean_span_length=40.0)
    kept = [(long(tokens, VOCABULARY, generator(0, k)).inputs < 1000).sum() for k in range(100)]
    assert min(kept) == 34


def test_glm_places_its_spans_as_the_published_code_does():
    rng, raw = np.random.default_rng(1), 512
    objective = SpanInfilling()
    noise = int(0.15 * raw)
    text = np.resize(published.one_token_words(400), raw)
    edges = np.linspace(0, raw, 9)

    def facts(spans):
        starts, ends = np.array(spans).T
        gaps = starts[1:] - ends[:-1]
        sizes = ends - starts
        return [
            *published.span_facts(spans),
            *histogram(gaps, [1, 2, 3, 5, 9, 17, 33, 1000]),
            *histogram(sizes, [1, 2, 3, 4, 5, 7, 40]),
            *histogram(starts, edges),
            *(sizes[0], sizes[-1], starts[0]),
        ]

    ours, theirs = [], []
    for key in range(2 * ROWS):
        example = objective(text, VOCABULARY, generator(0, key))
        ours.append(facts(published.glm_spans_of(example)))
        while True:  # what does not fit the row is drawn again
            lengths = published.glm_lengths(raw, 0.15, 3.0, rng)
            if len(lengths) <= objective.most_spans(noise):
                break
        theirs.append(facts(published.glm_spans(lengths, raw, rng)))
    agree(ours, theirs)
    gaps, ones, _ = np.sum([row[:3] for row in ours], axis=0)
    assert 0.025 < ones / gaps < 0.035  # 5.9% if all placements were alike


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_xlnet_places_its_spans_as_the_published_code_does(share):
    rng, raw, objective = np.random.default_rng(2), 512, PermutationLM()
    starts = rng.random(raw) < share
    starts[0] = True
    tokens = np.where(starts, 2, 1)
    edges = np.linspace(0, raw, 9)

    def facts(masked):
        places = np.flatnonzero(masked)
        breaks = np.flatnonzero(np.diff(places) > 1)
        runs = np.diff(breaks, prepend=-1, append=len(places) - 1)
        begin = places[np.append(0, breaks + 1)]
        return [
            len(places),
            starts[begin].sum(),
            *histogram(runs, [1, 2, 3, 4, 5, 6, 99]),
            *histogram(places, edges),
        ]

    spans, all_targets = [], []
    for key in range(ROWS):
        ours = objective.spans(starts, generator(0, key))
        theirs = published.xlnet_spans(starts.tolist(), 6, 85, rng)
        spans.append((facts(ours), facts(theirs)))
        example = objective(tokens, VOCABULARY, generator(1, key))
        ours = np.isin(np.arange(raw), example.places)
        theirs = published.xlnet_targets(starts.tolist(), 6, 85, rng)
        all_targets.append((facts(ours), facts(theirs)))
    for pairs in (spans, all_targets):
        agree(*zip(*pairs, strict=True))


def test_mixtures_are_those_of_the_published_recipes():
    shares: dict[str, float] = {}
    for weight, component in MIXTURES["ul2"]:
        shares[component.mode] = shares.get(component.mode, 0) + weight
    assert shares == pytest.approx({"mode_r": 0.8 / 3, "mode_x": 1.6 / 3, "mode_s": 0.2})
    # ds_block_10B.sh and ds_block_large.sh: --bert-prob 0.5 --gap-sentence-prob 0.3
    assert [weight for weight, _ in MIXTURES["blank_infilling"]] == [0.5, 0.3, 0.2]


def test_every_ul2_example_ends_both_sides_in_eos_behind_its_mode():
    for _, component in MIXTURES["ul2"]:
        for key in range(20):
            example = component(np.arange(1, 90), VOCABULARY, generator(0, key))
            assert example.inputs[0] == VOCABULARY.special[component.mode]
            assert example.inputs[-1] == example.targets[-1] == VOCABULARY.eos


def test_the_figures_of_the_docs_are_those_of_the_command():
    page = Path(__file__).parents[2] / "docs" / "objectives.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    table = {row[1].strip(): row[2:4] for row in rows if len(row) == 5}
    for what, *figures in published.figures(rows=300):
        assert [float(cell) for cell in table[what]] == pytest.approx(figures, rel=0.1, abs=0.25)
