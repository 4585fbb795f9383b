"""Fill in the middle, against the published transformation written a second time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaarch.config.catalogue import OBJECTIVES
from megaarch.data.example import generator
from megaarch.data.feature_converters import CAUSAL_DECODER, PREFIX_DECODER
from megaarch.data.objectives.fill_in_middle import FillInMiddle
from megaarch.data.objectives.language_modelling import FullLM, PrefixLM
from tests.data.mixtures import build
from tests.data.toy_vocabulary import toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
PRE, SUF, MID = (VOCABULARY.size - 1 - k for k in range(3))
EOT = VOCABULARY.eos
ORDERS = st.sampled_from(["psm", "spm"])
texts = st.tuples(st.integers(1, 90), st.integers(0, 2**32))


def published(prefix, middle, suffix, order):
    """Bavarian et al. 2022, section 3 (PSM) and appendix D (SPM, the second form), token by token."""
    if order == "psm":
        return [PRE, *prefix, SUF, *suffix, MID, *middle, EOT]
    return [PRE, SUF, *suffix, MID, *prefix, *middle, EOT]


def pieces(example, order):
    """(prefix, middle, suffix) as the sentinels say."""
    *middle, last = example.targets.tolist()
    assert last == EOT
    inputs = example.inputs.tolist()
    s, m = inputs.index(SUF), inputs.index(MID)
    assert inputs[0] == PRE
    return (inputs[1:s] if order == "psm" else inputs[m + 1 :]), middle, inputs[s + 1 : m]


@given(ORDERS, texts)
def test_the_three_pieces_give_the_text_back_in_the_published_order(order, text):
    tokens = toy_text(*text)
    example = FillInMiddle(order)(tokens, VOCABULARY, generator(0, text[1]))
    prefix, middle, suffix = pieces(example, order)
    assert [*prefix, *middle, *suffix] == tokens.tolist()
    row = [*example.inputs.tolist(), *example.targets.tolist()]
    assert row == published(prefix, middle, suffix, order)


@given(ORDERS, texts)
def test_what_each_decoder_predicts_and_sees(order, text):
    """A causal decoder predicts every token once from those before it; a prefix decoder the middle
    alone, from both sides at once."""
    tokens = toy_text(*text)
    example = FillInMiddle(order)(tokens, VOCABULARY, generator(0, text[1]))
    row = published(*pieces(example, order), order)
    n, m = len(example.inputs), len(example.targets)

    causal = CAUSAL_DECODER(example, VOCABULARY)
    assert causal.streams[0].tokens.tolist() == [VOCABULARY.bos, *row[:-1]]
    assert causal.target_tokens.tolist() == row and (causal.target_weights == 1).all()
    assert causal.target_index.tolist() == list(range(n + m))
    [(_, *part)] = causal.streams[0].parts
    assert part == [0, n + m, 0, n + m]

    both = PREFIX_DECODER(example, VOCABULARY)
    assert both.streams[0].tokens.tolist() == [VOCABULARY.bos, *row[:-1]]
    assert both.target_tokens.tolist() == row[n:] and (both.target_weights == 1).all()
    assert both.target_index.tolist() == list(range(n, n + m))
    assert both.streams[0].parts[0][1:] == (0, n + 1, 0, n + 1)

    bound = FillInMiddle(order).lengths(len(tokens))
    for converter, converted in ((CAUSAL_DECODER, causal), (PREFIX_DECODER, both)):
        assert converter.shape(bound).fits(converted.shape)
    assert CAUSAL_DECODER.shape(bound).targets == n + m


def test_cuts_are_uniform():
    """Over 2 cuts in 9 places each: every pair of places as often as independent draws have it."""
    raw, draws = 8, 9000
    counts = np.zeros((raw + 1, raw + 1))
    for key in range(draws):
        tokens = np.arange(raw)
        prefix, middle, _ = pieces(
            FillInMiddle("spm")(tokens, VOCABULARY, generator(3, key)), "spm"
        )
        counts[len(prefix), len(prefix) + len(middle)] += 1
    wanted = np.triu(np.full_like(counts, 2.0), 1) + np.eye(raw + 1)
    wanted *= draws / (raw + 1) ** 2
    at = wanted > 0
    assert not counts[~at].any()
    chi2 = ((counts - wanted)[at] ** 2 / wanted[at]).sum()
    assert chi2 < 44 + 5 * np.sqrt(2 * 44)


def test_left_to_right_rows_are_full_lm_of_a_causal_decoder_and_prefix_lm_of_a_prefix_decoder():
    tokens = toy_text(30, 1)
    (_, objective), *_ = build("fill_in_middle")
    example = objective(tokens, VOCABULARY, generator(0, 7))
    for converter, other in ((CAUSAL_DECODER, FullLM()), (PREFIX_DECODER, PrefixLM())):
        found = converter(example, VOCABULARY)
        wanted = converter(other(tokens, VOCABULARY, generator(0, 7)), VOCABULARY)
        assert found.streams[0].tokens.tolist() == wanted.streams[0].tokens.tolist()
        assert found.streams[0].parts == wanted.streams[0].parts
        assert found.target_index.tolist() == wanted.target_index.tolist()
        assert found.target_tokens.tolist() == wanted.target_tokens.tolist()
        assert converter.shape(objective.lengths(30)) == converter.shape(other.lengths(30))


def test_the_rate_is_a_setting():
    assert [(w, getattr(c, "order", None)) for w, c in build("fill_in_middle")] == [
        (0.5, None),
        (0.25, "psm"),
        (0.25, "spm"),
    ]
    assert [w for w, _ in build("fill_in_middle", fim_rate=0.9)] == pytest.approx([0.1, 0.45, 0.45])
    assert [c.order for _, c in build("fill_in_middle", fim_rate=1.0)] == ["psm", "spm"]
    with pytest.raises(ValueError, match="needs a fim_rate above 0 and at most 1"):
        build("fill_in_middle", fim_rate=0.0)
    with pytest.raises(ValueError, match="full_lm has no fim_rate"):
        OBJECTIVES["full_lm"].components(fim_rate=0.5)
