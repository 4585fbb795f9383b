"""Conditional forms: what is scored, and what can be known when it is."""

import numpy as np
import pytest

from megaarch.attention.mask import Parts
from megaarch.config.catalogue import ARCHITECTURES, OBJECTIVES
from megaarch.config.schema import Data, Model
from megaarch.data.conditional_forms import continuation, middle
from megaarch.data.feature_converters import converter_of
from megaarch.data.row_lengths import components, segmentations, spans_of
from tests.data.toy_vocabulary import TEXT, toy_vocabulary

VOCABULARY = toy_vocabulary()
BEFORE, SCORED, AFTER = np.arange(10, 17), np.arange(100, 105), np.arange(200, 206)
PAIRS = [(o, a.name) for a in ARCHITECTURES.values() for o in a.objectives]
MIDDLE_PAIRS = [(o, a) for o, a in PAIRS if OBJECTIVES[o].middle is not None]
pairs = pytest.mark.parametrize("objective, architecture", PAIRS)
middle_pairs = pytest.mark.parametrize("objective, architecture", MIDDLE_PAIRS)


def known(converted):
    """For each target: the text tokens that its row can know of, through any number of layers."""
    rows = [len(stream.tokens) for stream in converted.streams]
    edges = np.cumsum([0, *rows])
    sees = np.eye(edges[-1], dtype=bool)
    for s, stream in enumerate(converted.streams):
        here = slice(edges[s], edges[s + 1])
        sees[here, here] |= Parts.of([stream.parts], rows[s], rows[s]).dense()[0]
        if stream.cross_parts:
            before = slice(edges[s - 1], edges[s])
            sees[here, before] |= Parts.of([stream.cross_parts], rows[s], rows[s - 1]).dense()[0]
    for _ in range(len(sees).bit_length()):
        sees = (sees.astype(int) @ sees.astype(int)) > 0
    tokens = np.concatenate([stream.tokens for stream in converted.streams])
    last = edges[-2]
    return [
        {int(t) for t in tokens[sees[last + row]] if t < TEXT} for row in converted.target_index
    ]


def scored(examples, architecture):
    """[(token, what its row can know)] of the targets of weight 1, in order; others weigh 0."""
    found = []
    for example in examples:
        converted = converter_of(architecture)(example, VOCABULARY)
        weights = converted.target_weights
        assert set(weights.tolist()) <= {0.0, 1.0}
        for token, weight, knows in zip(
            converted.target_tokens, weights, known(converted), strict=True
        ):
            if weight:
                found.append((int(token), knows))
    return found


@pytest.mark.parametrize("length", [0, 1, 7])
@pairs
def test_continuations(objective, architecture, length):
    prefix = BEFORE[:length]
    examples = continuation(objective, architecture, prefix, SCORED, VOCABULARY)
    found = scored(examples, architecture)
    assert [token for token, _ in found] == SCORED.tolist()
    for j, (token, knows) in enumerate(found):
        assert token not in knows
        if objective == "masked_lm":  # a pseudo-likelihood: it knows all the others
            assert knows == {*prefix.tolist(), *SCORED.tolist()} - {token}
        else:
            assert knows == {*prefix.tolist(), *SCORED[:j].tolist()}


@middle_pairs
@pytest.mark.parametrize("sides", [(7, 6), (0, 6), (7, 0), (1, 1)])
def test_middles(objective, architecture, sides):
    before, after = BEFORE[: sides[0]], AFTER[: sides[1]]
    examples = middle(objective, architecture, before, SCORED, after, VOCABULARY)
    found = scored(examples, architecture)
    assert [token for token, _ in found] == SCORED.tolist()
    for j, (_, knows) in enumerate(found):
        assert knows == {*before.tolist(), *after.tolist(), *SCORED[:j].tolist()}


def test_middles_are_those_of_the_catalogue():
    without = {"full_lm", "prefix_lm", "supervised"}
    assert {objective for objective, _ in MIDDLE_PAIRS} == set(OBJECTIVES) - without
    for objective, architecture in PAIRS:
        if objective in without:
            with pytest.raises(ValueError, match="cannot state a middle"):
                middle(objective, architecture, BEFORE, SCORED, AFTER, VOCABULARY)


def test_pairs_that_cannot_be_trained_are_refused():
    refused = [(o, a) for o in OBJECTIVES for a in ARCHITECTURES if (o, a) not in PAIRS]
    assert refused
    for objective, architecture in [*refused, ("full_lm", "no_such")]:
        with pytest.raises(ValueError, match="cannot run the objective"):
            continuation(objective, architecture, BEFORE, SCORED, VOCABULARY)


@pairs
def test_nothing_to_score_is_refused(objective, architecture):
    with pytest.raises(ValueError, match="no token to score"):
        continuation(objective, architecture, BEFORE, SCORED[:0], VOCABULARY)


def rows(examples):
    return [(e.inputs.tolist(), e.targets.tolist()) for e in examples]


def test_the_forms_are_those_of_training():
    """Written out, token by token, for a prefix 1 2, a continuation 3 4 and a following 5."""
    v = VOCABULARY
    p, c, a = np.array([1, 2]), np.array([3, 4]), np.array([5])

    def after(objective, architecture):
        return rows(continuation(objective, architecture, p, c, v))

    def between(objective, architecture):
        return rows(middle(objective, architecture, p, c, a, v))

    first, second, third = (v.size - k for k in (1, 2, 3))
    assert after("full_lm", "causal_decoder") == [([1, 2], [3, 4])]
    assert after("prefix_lm", "prefix_decoder") == [([1, 2], [3, 4])]
    for architecture in ("causal_decoder", "prefix_decoder", "encoder_decoder"):
        assert after("supervised", architecture) == [([1, 2, v.eos], [3, 4])]
    assert after("span_corruption", "encoder_decoder") == [([1, 2, first, v.eos], [first, 3, 4])]
    assert between("span_corruption", "prefix_decoder") == [
        ([1, 2, first, 5, second, v.eos], [first, 3, 4])
    ]
    for architecture in ("causal_decoder", "prefix_decoder"):
        assert after("fill_in_middle", architecture) == [([1, 2], [3, 4])]
        assert between("fill_in_middle", architecture) == [
            ([first, 1, 2, second, 5, third], [3, 4])
        ]
    assert after("ul2", "encoder_decoder") == [([v.mode_s, 1, 2, v.eos], [3, 4])]
    assert between("ul2", "encoder_decoder") == [
        ([v.mode_r, 1, 2, first, 5, second, v.eos], [first, 3, 4])
    ]
    assert after("denoising", "encoder_decoder") == [([1, 2, v.mask], [1, 2, 3, 4])]
    assert between("denoising", "encoder_decoder") == [([1, 2, v.mask, 5], [1, 2, 3, 4])]
    assert after("blank_infilling", "prefix_decoder") == [([1, 2, v.suffix_mask], [3, 4])]
    assert between("blank_infilling", "prefix_decoder") == [([1, 2, v.mask, 5], [3, 4])]
    assert after("permutation_lm", "two_stream") == [([1, 2, 3, 4], [3, 4])]
    assert after("unilm", "prefix_decoder") == [([1, 2, v.mask], [3]), ([1, 2, 3, v.mask], [4])]
    assert (
        between("unilm", "prefix_decoder")
        == between("masked_lm", "encoder")
        == [([1, 2, v.mask, v.mask, 5], [3]), ([1, 2, 3, v.mask, 5], [4])]
    )
    assert after("masked_lm", "encoder") == [([1, 2, v.mask, 4], [3]), ([1, 2, 3, v.mask], [4])]


@pytest.mark.parametrize("after", [0, 6])
@pytest.mark.parametrize("before", [0, 1, 19, 20, 21, 40, 41, 64])
def test_spans_are_scored_in_rows_as_training_holds_them(before, after):
    """T5: kept text and sentinels in turn, from text to a sentinel and eos; the targets name each
    sentinel and its span. Filled in, they give the text; 15% of what stands before is in spans of 3."""
    v, text = VOCABULARY, np.arange(before + 5 + after)
    pieces = np.split(text, [before, before + 5])
    (example,) = middle("span_corruption", "encoder_decoder", *pieces, v)
    sentinels = v.size - 1 - np.arange(5)
    spans = np.split(example.targets, np.flatnonzero(np.isin(example.targets, sentinels)))[1:]
    names = [int(span[0]) for span in spans]
    assert names == sentinels[: len(spans)].tolist()
    assert [len(span) - 1 for span in spans[:-1]] == [3] * (max(before - 1, 0) // 20)
    assert example.weights.tolist() == [0.0] * (len(example.targets) - 5) + [1.0] * 5
    *inputs, last = example.inputs.tolist()
    assert last == v.eos and inputs[-1] == sentinels[len(spans) - (not after)]
    kept = np.diff([i for i, t in enumerate([v.size - 1, *inputs]) if t in sentinels])
    assert before == 0 or kept.min() > 1
    filled = [x for t in inputs for x in (spans[names.index(t)][1:] if t in names else [t])]
    assert filled[: len(text)] == text.tolist() and len(filled) == len(text) + (after > 0)


def test_glm_positions_are_those_of_training():
    (example,) = middle("blank_infilling", "prefix_decoder", BEFORE, SCORED, AFTER, VOCABULARY)
    assert example.feed.tolist() == [VOCABULARY.sop, *SCORED[:-1].tolist()]
    assert example.input_positions.tolist() == [[i, 0] for i in range(14)]
    assert example.feed_positions.tolist() == [[7, k] for k in range(1, 6)]


def test_an_encoder_decoder_of_spans_is_asked_for_no_more_than_its_decoder_holds():
    """A longer continuation comes in pieces, each of which knows those before it; a middle its end too."""
    model, data = (
        Model(architecture="encoder_decoder", sequence_length=128),
        Data(objective="span_corruption"),
    )
    spans = spans_of(data, model)
    [row] = [row for _, row in segmentations(model, data)]
    assert spans.targets == row.shape.streams[1] == 29
    prefix, scored_tokens, end = np.arange(48), np.arange(100, 140), np.arange(200, 210)
    for before, after in ((prefix, end[:0]), (prefix[:0], end[:0]), (prefix[:24], end)):
        form = "span_corruption", "encoder_decoder"
        examples = middle(*form, before, scored_tokens, after, VOCABULARY, spans)
        assert len(examples) > 1 and max(len(e.targets) for e in examples) == 29
        found = scored(examples, "encoder_decoder")
        assert [token for token, _ in found] == scored_tokens.tolist()
        for j, (_, knows) in enumerate(found):
            assert knows == {*before, *scored_tokens[:j], *after}
        # one that fits, and one of a single stack, is asked for at once
        [_] = middle(*form, before, scored_tokens[:16], after, VOCABULARY, spans)
    assert spans_of(data, Model(architecture="causal_decoder")).targets is None


@pytest.mark.parametrize(
    "density, mean", [(None, None), (None, 20.0), (0.5, 3.0), (0.3, 1.2), (0.9, 5.0)]
)
def test_spans_that_are_given_are_those_of_the_run_noise(density, mean):
    """A scored row names no sentinel that training rows lack, and has about their share of noise."""
    data = Data(objective="span_corruption", noise_density=density, mean_span_length=mean)
    [(_, noise)] = components(data)
    raw = 141
    given = spans_of(data)
    [example] = continuation(
        "span_corruption", "causal_decoder", np.arange(raw - 5), SCORED, VOCABULARY, given
    )
    sentinels = [token for token in example.inputs if token > VOCABULARY.size - 1 - 140]
    named, trained = len(sentinels), noise.counts(raw)
    assert sentinels == [VOCABULARY.sentinel(k) for k in range(named)]
    assert named <= trained[1] + 1 and named >= 0.7 * trained[1]
    masked = raw - (len(example.inputs) - named - 1)
    assert masked == pytest.approx(trained[0], abs=max(given.period, 0.1 * trained[0]))
