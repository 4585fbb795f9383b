"""The converters' parts against dense masks written here from each paper's definition.

An oracle says for two tokens of an example, named by what they are (a place of the text, the
start token, the query of a target), whether the first may see the second. Positions tell which
row holds which token; nothing else of the converter's layout is used.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.attention.mask import Parts
from megaarch.config.catalogue import ARCHITECTURES, PRESETS
from megaarch.data.example import Example, Lengths, generator
from megaarch.data.feature_converters import converter_of
from megaarch.data.objectives.language_modelling import supervised
from tests.data.mixtures import MIXTURES, build
from tests.data.toy_vocabulary import toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
keys = st.integers(0, 2**32)
PAIRS = [
    (architecture.name, component)
    for architecture in ARCHITECTURES.values()
    for objective in architecture.objectives
    if objective in MIXTURES
    for _, component in build(objective)
]


def dense(stream):
    rows = len(stream.tokens)
    return Parts.of([stream.parts], rows, rows).dense()[0]


def dense_cross(decoder, encoder):
    return Parts.of([decoder.cross_parts], len(decoder.tokens), len(encoder.tokens)).dense()[0]


def matrix(names, sees):
    return np.array([[sees(q, k) for k in names] for q in names], dtype=bool).reshape(
        len(names), len(names)
    )


def check_rows(stream, tokens, positions=None):
    """Rows are fed these tokens, at 0, 1, 2, ... unless told otherwise."""
    assert stream.tokens.tolist() == list(tokens)
    assert stream.tokens.dtype == stream.positions.dtype == np.int64
    wanted = [[i] for i in range(len(tokens))] if positions is None else positions
    assert stream.positions.tolist() == wanted


def check_decoder(converted, example, bidirectional):
    """GPT, prefix LM: start token, then the text; all of it but the last token is fed."""
    (stream,) = converted.streams
    n = len(example.inputs)
    text = [VOCABULARY.bos, *example.inputs.tolist(), *example.targets.tolist()]
    check_rows(stream, text[:-1])

    def sees(q, k):  # rows hold the start token (0) and the text's tokens 1, 2, ...
        condition = n if n else -1  # without inputs there is no prefix
        return k <= q or (bidirectional and q <= condition and k <= condition)

    assert (dense(stream) == matrix(range(len(text) - 1), sees)).all()
    # Token t of the text is read off at the row that is fed the token before it.
    first = 0 if example.predict_inputs and not bidirectional else n
    assert [text[row + 1] for row in converted.target_index] == text[first + 1 :]
    assert converted.target_index.tolist() == list(range(first, len(text) - 1))


def check_glm(converted, example):
    """Du et al. 2022, 2.1: A sees A, never B; B sees A and what is before it in B."""
    (stream,) = converted.streams
    names = [("A", i) for i in range(len(example.inputs))]
    names += [("B", i) for i in range(len(example.feed))]
    check_rows(
        stream,
        [*example.inputs, *example.feed],
        [*example.input_positions.tolist(), *example.feed_positions.tolist()],
    )

    def sees(q, k):
        return k[0] == "A" or (q[0] == "B" and k[1] <= q[1])

    assert (dense(stream) == matrix(names, sees)).all()
    assert [names[row] for row in converted.target_index] == names[len(example.inputs) :]


def check_encoder_decoder(converted, example):
    encoder, decoder = converted.streams
    check_rows(encoder, example.inputs)
    check_rows(decoder, [VOCABULARY.bos, *example.targets[:-1]])
    assert dense(encoder).all() and dense_cross(decoder, encoder).all()
    m = len(example.targets)
    assert (dense(decoder) == matrix(range(m), lambda q, k: k <= q)).all()
    assert converted.target_index.tolist() == list(range(m))


def check_cloze(converted, example):
    """BERT, and UniLM (Dong et al. 2019, figure 1), on the text's own places."""
    (stream,) = converted.streams
    n = len(example.inputs)
    places = stream.positions[:, 0].tolist()
    assert sorted(places) == list(range(n))
    assert stream.tokens.tolist() == example.inputs[places].tolist()

    def sees(q, k):
        if example.prefix is None:
            return True
        if example.reverse:
            return k >= q
        return k < example.prefix or k <= q

    assert (dense(stream) == matrix(places, sees)).all()
    assert [places[row] for row in converted.target_index] == example.places.tolist()


def check_two_stream(converted, example):
    """Yang et al. 2019, 2.3: a factorization order z, content sees z_<=t, query sees z_<t.

    Context comes first in z, as one step that sees itself whole.
    """
    (stream,) = converted.streams
    n, z = len(example.inputs), example.places.tolist()
    step = {place: z.index(place) if place in z else -1 for place in range(n)}
    places = stream.positions[:, 0].tolist()
    names = [("content", place) for place in places[:n]] + [
        ("query", place) for place in places[n:]
    ]
    assert sorted(places[:n]) == list(range(n)) and sorted(places[n:]) == sorted(z)
    assert stream.tokens[:n].tolist() == example.inputs[places[:n]].tolist()
    assert set(stream.tokens[n:].tolist()) <= {VOCABULARY.query}

    def sees(q, k):
        if k[0] == "query":
            return False
        return step[k[1]] <= step[q[1]] if q[0] == "content" else step[k[1]] < step[q[1]]

    assert (dense(stream) == matrix(names, sees)).all()
    assert [names[row] for row in converted.target_index] == [("query", place) for place in z]


def check(architecture, converted, example):
    if architecture == "encoder_decoder":
        check_encoder_decoder(converted, example)
    elif architecture == "two_stream":
        check_two_stream(converted, example)
    elif example.places is not None:
        check_cloze(converted, example)
    elif example.feed is not None:
        check_glm(converted, example)
    else:
        check_decoder(converted, example, architecture == "prefix_decoder")
    predicted = example.targets.tolist()
    if example.predict_inputs and architecture == "causal_decoder":
        predicted = [*example.inputs.tolist(), *predicted]
    assert converted.target_tokens.tolist() == predicted
    assert converted.target_weights.dtype == np.float32


def test_every_preset_is_covered():
    covered = {(architecture, component.name) for architecture, component in PAIRS}
    assert {(p.architecture, p.objective) for p in PRESETS.values()} <= covered
    assert all(converter_of(name).name == name for name in ARCHITECTURES)


@settings(max_examples=300)
@given(st.sampled_from(PAIRS), st.integers(2, 40), keys)
def test_parts_equal_the_papers_masks(pair, raw, key):
    architecture, objective = pair
    example = objective(toy_text(raw, key), VOCABULARY, generator(0, key))
    converted = converter_of(architecture)(example, VOCABULARY)
    check(architecture, converted, example)
    assert (converted.target_weights == 1).all()
    assert converter_of(architecture).shape(objective.lengths(raw)).fits(converted.shape)


@pytest.mark.parametrize("architecture", ["causal_decoder", "prefix_decoder", "encoder_decoder"])
@pytest.mark.parametrize("n, m", [(0, 1), (0, 5), (1, 1), (1, 4), (6, 1), (6, 3)])
def test_sequences_at_their_edges(architecture, n, m):
    example = Example(toy_text(n, 1), toy_text(m, 2))
    converted = converter_of(architecture)(example, VOCABULARY)
    check(architecture, converted, example)
    if architecture == "prefix_decoder" and (n, m) == (6, 1):
        assert converted.streams[0].parts == [(1, 0, 7, 0, 7)]  # all of it is prefix
    if architecture == "encoder_decoder" and n == 0:
        assert converted.streams[1].cross_parts == []


@pytest.mark.parametrize(
    "prefix, reverse", [(None, False), (0, False), (0, True), (3, False), (7, 0)]
)
@pytest.mark.parametrize("places", [[0], [6], [1, 2, 5], list(range(7)), []])
def test_cloze_at_its_edges(prefix, reverse, places):
    text = toy_text(7, 4)
    places = np.array(places, dtype=np.int64)
    example = Example(text, text[places], places=places, prefix=prefix, reverse=bool(reverse))
    check("prefix_decoder", converter_of("prefix_decoder")(example, VOCABULARY), example)
    if prefix is None:
        check("encoder", converter_of("encoder")(example, VOCABULARY), example)


@pytest.mark.parametrize("places", [[0], [3], [2, 0], [3, 0, 2, 1]])
def test_permutations_at_their_edges(places):
    text = toy_text(4, 4)
    places = np.array(places)
    example = Example(text, text[places], places=places, permuted=True)
    check("two_stream", converter_of("two_stream")(example, VOCABULARY), example)
    alone = Example(text[:1], text[:1], places=np.array([0]), permuted=True)
    converted = converter_of("two_stream")(alone, VOCABULARY)
    assert dense(converted.streams[0]).tolist() == [[True, False], [False, False]]


def test_the_picture_in_the_docstring():
    a, b, c, d, e = text = np.arange(5)
    example = Example(text, np.array([d, b]), places=np.array([3, 1]), permuted=True)
    converted = converter_of("two_stream")(example, VOCABULARY)
    (stream,) = converted.streams
    assert stream.tokens[:5].tolist() == [a, c, e, d, b]
    assert stream.positions[:, 0].tolist() == [0, 2, 4, 3, 1, 3, 1]
    assert stream.parts == [(1, 0, 3, 0, 3), (2, 3, 5, 0, 5), (2, 5, 7, 0, 4)]


def test_wang_et_al_row_lengths():
    """626 tokens of prefix LM, and 568 of span corruption: 512 and 114."""
    (_, prefix_lm), (_, t5) = build("prefix_lm")[0], build("span_corruption")[0]
    decoder, encoder_decoder = converter_of("prefix_decoder"), converter_of("encoder_decoder")
    assert decoder.shape(prefix_lm.lengths(626)).streams == (626,)
    assert decoder.shape(t5.lengths(568)).streams == (626,)
    assert encoder_decoder.shape(t5.lengths(568)).streams == (512, 114)
    assert encoder_decoder.shape(t5.lengths(568)).cross_parts == 1
    assert converter_of("two_stream").shape(Lengths(512, 85, in_place=True)).streams == (597,)


def test_weights_reach_the_targets():
    example = Example(toy_text(3, 0), toy_text(2, 1), weights=np.array([0.0, 1.0]))
    for name in ("causal_decoder", "prefix_decoder", "encoder_decoder"):
        assert converter_of(name)(example, VOCABULARY).target_weights.tolist() == [0, 1]


def test_supervised_pairs_convert():
    example = supervised(toy_text(5, 0), toy_text(2, 1), VOCABULARY)
    for name in ("causal_decoder", "prefix_decoder", "encoder_decoder"):
        check(name, converter_of(name)(example, VOCABULARY), example)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_foreign_examples_are_refused(architecture):
    text = toy_text(6, 0)
    places = np.array([1, 4])
    examples = {
        "sequence": Example(text, text),
        "cloze": Example(text, text[places], places=places),
        "permutation": Example(text, text[places], places=places, permuted=True),
    }
    takes = {
        "causal_decoder": {"sequence"},
        "prefix_decoder": {"sequence", "cloze"},
        "encoder_decoder": {"sequence"},
        "encoder": {"cloze"},
        "two_stream": {"permutation"},
    }[architecture]
    for family in set(examples) - takes:
        with pytest.raises(ValueError, match=f"{architecture} takes .* {family} example"):
            converter_of(architecture)(examples[family], VOCABULARY)


def test_directions_that_make_no_sense_are_refused():
    text, places = toy_text(6, 0), np.array([1])
    with pytest.raises(ValueError, match="without a direction"):
        converter_of("encoder")(Example(text, text[places], places=places, prefix=0), VOCABULARY)
    both = Example(text, text[places], places=places, prefix=2, reverse=True)
    with pytest.raises(ValueError, match="its prefix must be 0"):
        converter_of("prefix_decoder")(both, VOCABULARY)
