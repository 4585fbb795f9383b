"""Segments: two-stream rows of a mixture fill both streams, and every component keeps its share."""

from collections import Counter
from dataclasses import replace

import pytest

from megaarch import config
from megaarch.data.example import generator
from megaarch.data.feature_converters import converter_of
from megaarch.data.objectives.language_modelling import PrefixLM
from megaarch.data.objectives.span_corruption import SequentialDenoising
from megaarch.data.row_lengths import fixed_shape, segmentations
from megaarch.study.describe import made_up_tokens, made_up_vocabulary
from tests.data.mixtures import MIXTURES

SENTINELS = 512


def rows_of(architecture="encoder_decoder", objective="ul2", target_length=None, length=2048):
    settings = config.resolve(
        {
            "model": {
                "architecture": architecture,
                "sequence_length": length,
                "target_length": target_length,
            },
            "data": {"objective": objective, "sentinels": SENTINELS},
        }
    )
    return settings.model, segmentations(settings.model, settings.data)


def filled(model, rows):
    """The share of each stream that is not padding, from what the objectives really make."""
    vocabulary = made_up_vocabulary(model.vocabulary_size, SENTINELS)
    shape = fixed_shape(model, [row.shape for _, row in rows])
    used = [0.0] * len(shape.streams)
    for share, row in rows:
        tokens = made_up_tokens(vocabulary, row.raw)
        for objective in row.objectives:
            example = objective(tokens, vocabulary, generator(0, 0))
            made = converter_of(model.architecture)(example, vocabulary)
            for s, stream in enumerate(made.streams):
                used[s] += share * len(stream.tokens)
    return [n / length for n, length in zip(used, shape.streams, strict=True)]


def test_ul2_fills_both_stacks_of_an_encoder_decoder():
    model, rows = rows_of()
    encoder, decoder = filled(model, rows)
    assert encoder > 0.99
    assert decoder > 0.85


def test_the_lengths_of_the_ul2_paper_keep_whole_rows_for_each_denoiser():
    # Tay et al. 2023: 512 inputs and 512 targets; shared rows would shorten segments for nothing
    _, rows = rows_of(target_length=512, length=512)
    denoisers = [{type(o) for o in row.objectives} for _, row in rows]
    assert len(rows) == 7 and all(len(kinds) == 1 for kinds in denoisers)
    assert max(row.raw for _, row in rows) > 512


@pytest.mark.parametrize("architecture", ("encoder_decoder", "prefix_decoder"))
@pytest.mark.parametrize("objective", ("ul2", "prefix_lm", "span_corruption"))
@pytest.mark.parametrize("target_length", (None, 600))
def test_components_keep_their_shares_of_the_segments(architecture, objective, target_length):
    if architecture == "prefix_decoder" and target_length:
        target_length = None  # it has one stream
    _, rows = rows_of(architecture, objective, target_length)
    assert sum(share for share, _ in rows) == pytest.approx(1)
    segments = Counter()
    for share, row in rows:
        for o in row.objectives:
            segments[repr(o).replace("mirrored=True", "mirrored=False")] += share
    total = sum(segments.values())
    asked = {repr(component): weight for weight, component in MIXTURES[objective]}
    assert {name: n / total for name, n in segments.items()} == pytest.approx(asked)


@pytest.mark.parametrize("objective", (PrefixLM(), SequentialDenoising()))
@pytest.mark.parametrize("raw", (2, 3, 7, 64, 1365))
def test_mirrored_examples_take_exactly_what_a_pair_takes(objective, raw):
    vocabulary = made_up_vocabulary(8192, SENTINELS)
    tokens = made_up_tokens(vocabulary, raw)
    splits = set()
    for seed in range(20):
        one, other = (
            o(tokens, vocabulary, generator(seed, 0))
            for o in (objective, replace(objective, mirrored=True))
        )
        splits.add(len(one.inputs))
        pair = objective.pair(raw)
        assert len(one.inputs) + len(other.inputs) == pair.inputs
        assert len(one.targets) + len(other.targets) == pair.targets
        assert min(len(one.targets), len(other.targets)) > 0
    assert len(splits) > 1 or raw < 4


@pytest.mark.parametrize("length", (16, 65, 333, 2048))
def test_a_row_of_many_segments_never_passes_its_bound(length):
    model, rows = rows_of(length=length)
    vocabulary = made_up_vocabulary(model.vocabulary_size, SENTINELS)
    assert sum(len(row.objectives) for _, row in rows) >= 7
    for share, row in rows:
        assert share > 0
        tokens = made_up_tokens(vocabulary, row.raw)
        for seed in range(5):
            first, *others = (
                converter_of(model.architecture)(
                    objective(tokens, vocabulary, generator(seed, 0)), vocabulary
                ).shape
                for objective in row.objectives
            )
            assert row.shape.fits(sum(others, first))
        assert row.shape.streams[0] <= length
