import numpy as np
import pytest
import torch

from megaarch.errors import UserError
from megaarch.probes import position
from megaarch.probes.catalogue import Options
from megaarch.probes.probed_model import Rows
from tests.conftest import PRESETS

NONE = {"model__position_encoding": "none"}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(position, "STEPS", 60)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_probe_of_each_preset(preset, subject, monkeypatch):
    monkeypatch.setattr(position, "STEPS", 3)
    found = position.measure(subject(preset), Options(rows=4, length=16))
    streams = {"bert": {"encoder"}, "t5": {"encoder", "decoder"}}
    for name in ("bart", "ul2"):
        streams[name] = streams["t5"]
    assert found.streams.keys() == streams.get(preset, {"decoder"})
    for stream in found.streams.values():
        assert len(stream.layers) == 3
        assert 2 <= stream.places <= 20
        assert all(each.distance.interval for each in stream.layers)


def test_chance_is_the_mean_distance_of_two_places():
    """(n^2 - 1) / (3n), of n places in a row; with a gap it is counted out."""
    states = position.States(
        torch.zeros(1, 20, 3), np.tile(np.arange(10), 2), np.repeat([0, 1], 10)
    )
    found = position._stream(states, np.array([0, 1]), np.array([False, True]), 0)
    assert (found.places, found.chance) == (10, pytest.approx(99 / 30))
    guess = found.layers[0]
    assert guess.of_chance.value == pytest.approx(1), "every place once, and one answer to all"


def test_turns_are_circles_of_the_same_text():
    rows = Rows(np.arange(12).reshape(2, 6), np.array([4, 9]))
    made = position.turned(rows, 5, np.random.default_rng(0))
    assert made.documents.tolist() == [4, 9] * 5
    for tokens, document in zip(made.tokens, made.documents, strict=True):
        start = {4: 0, 9: 6}[document]
        assert ((np.diff(tokens) % 6) == 1).all()
        assert sorted(tokens) == list(range(start, start + 6))
    assert len({tuple(tokens) for tokens in made.tokens}) > 6


def test_masks_at_fixed_places_are_shown(subject):
    subject = subject("bert")
    rows = subject.rows(12, 3)
    batch = subject.batch(rows.tokens, 6)
    assert (batch.streams[0].tokens[:, -1] == subject.vocabulary.mask).all()
    shown = position.unmasked(batch, subject.vocabulary.mask)
    assert (shown.streams[0].tokens.numpy() == rows.tokens).all()
    decoder = subject.batch(rows.tokens, 6)
    assert (decoder.streams[0].tokens[:, :-1].numpy() == rows.tokens[:, :-1]).all()


def permuted(batch, order):
    stream = batch.streams[0]
    return position.replace(
        batch, streams=(position.replace(stream, tokens=stream.tokens[:, order]),)
    )


@pytest.mark.parametrize(("preset", "blind"), [("bert", True), ("gpt", False)])
def test_permuting_the_inputs_permutes_the_outputs_of_a_bidirectional_stack_alone(
    preset, blind, subject
):
    subject = subject(preset, **NONE)
    batch = position.unmasked(
        subject.batch(subject.rows(20, 4).tokens, 10), subject.vocabulary.mask
    )
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    straight, turned = subject.model.hidden(batch), subject.model.hidden(permuted(batch, order))
    difference = float((turned - straight[:, order]).abs().max())
    assert difference < 1e-12 if blind else difference > 1e-2


def test_a_bidirectional_stack_with_positions_is_not_blind(subject):
    subject = subject("bert")
    batch = position.unmasked(
        subject.batch(subject.rows(20, 4).tokens, 10), subject.vocabulary.mask
    )
    order = torch.arange(19, -1, -1)
    straight, turned = subject.model.hidden(batch), subject.model.hidden(permuted(batch, order))
    assert float((turned - straight[:, order]).abs().max()) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_a_causal_stack_tells_places_and_a_bidirectional_one_does_not(seed, subject, quick):
    """At three seeds, without positions and without training: attention to all that came before thins out as a
    row goes on."""
    options = Options(rows=48, length=24, seed=seed)
    causal = position.measure(subject("gpt", **NONE), options).streams["decoder"].layers
    blind = position.measure(subject("bert", **NONE), options).streams["encoder"].layers
    assert causal[2].of_chance.ends[1] < 0.9
    for layer in (*blind, causal[0]):
        low, high = layer.of_chance.ends
        error = (high - low) / (2 * 1.96)
        assert abs(layer.of_chance.value - 1) < 3 * error + 1e-9


def test_one_document_is_refused(subject):
    subject = subject("gpt")
    alone = type(subject)(
        subject.name, subject.model, subject.settings, subject.tokenizer, subject.documents[:1]
    )
    with pytest.raises(UserError, match="some documents and tests on others"):
        position.measure(alone, Options(rows=4, length=16))


def test_places_that_are_written_in_the_states_are_read(subject):
    """A planted stream: the state is the place's one-hot vector, then noise."""
    rows, places = 20, 12
    place = np.tile(np.arange(places), rows)
    noise = torch.randn(rows * places, places, generator=torch.Generator().manual_seed(0))
    of_layers = torch.stack([torch.eye(places)[place], noise])
    states = position.States(of_layers, place, np.repeat(np.arange(rows), places))
    found = position._stream(states, np.arange(rows) // 2, np.arange(rows) % 4 < 2, 0)
    told, blind = found.layers
    assert told.distance.value < 0.05
    assert 0.85 < blind.of_chance.value < 1.15


def test_rows_longer_than_learned_positions_are_told(subject):
    given = {"model__position_encoding": "learned", "model__sequence_length": 16}
    short = subject("bert", **given)
    limit = short.settings.model.position_rows
    with pytest.raises(UserError, match=f"the model knows {limit}: lower --length"):
        short.batch(short.rows(limit + 4, 2).tokens, 4)
