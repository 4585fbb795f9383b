import dataclasses

import pytest
import torch

from megaarch.data.batch import Batch
from megaarch.model import Transformer, initialize
from megaarch.model.dropout import DropoutKeys, dropout

S, D = 64, 48


def mask(row=5, seed=1, step=2, name="layers.0", branch=0, rate=0.3):
    key = DropoutKeys(seed, step, torch.tensor([row])).of(name)
    return dropout(torch.ones(1, S, D), key, rate, branch)[0] != 0


def test_same_key_same_mask_whatever_the_global_random_state():
    torch.manual_seed(0)
    first = mask()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, mask())
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "other",
    [
        {"row": 6},
        {"row": 5 + 2**32},
        {"seed": 2},
        {"step": 3},
        {"name": "layers.1"},
        {"branch": 1},
    ],
)
def test_every_part_of_the_key_gives_an_independent_mask(other):
    a, b = mask().float(), mask(**other).float()
    correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
    assert abs(correlation) < 4 / (S * D) ** 0.5


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate_scale_and_evenness(rate):
    keys = DropoutKeys(3, 4, torch.arange(40)).of("x")
    out = dropout(torch.ones(40, S, D), keys, rate)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    dropped = (out == 0).float()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * deviation / dropped.numel() ** 0.5
    for axis in range(3):  # no row, slot or channel is favoured
        shares = dropped.movedim(axis, 0).flatten(1).mean(1)
        assert (shares - rate).abs().max() < 5 * deviation / (
            dropped[0].numel() * 40 / len(shares)
        ) ** 0.5


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A micro-batch: some rows of a batch, every target slot of weight 1."""
    (s,) = batch.streams
    part = dataclasses.replace(s.parts, table=s.parts.table[rows])
    cut = dataclasses.replace(s, tokens=s.tokens[rows], positions=s.positions[rows], parts=part)
    index = batch.target_index[rows]
    return dataclasses.replace(
        batch,
        streams=(cut,),
        target_index=index,
        target_tokens=batch.target_tokens[rows],
        target_weights=batch.target_weights[rows],
        head_rows=torch.arange(index.numel()),
        head_count=index.numel(),
        sample_index=batch.sample_index[rows],
    )


@pytest.fixture
def model(tiny):
    model = Transformer(tiny(dropout=0.2))
    initialize(model, 0)
    return model


def test_micro_batches_have_the_same_masks(model, make_batch):
    batch = make_batch(rows=4, unused=0)
    model.set_dropout_step(seed=0, step=7)
    whole = model(rows_of(batch, slice(0, 4))).nll
    split = [model(rows_of(batch, rows)).nll for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, torch.cat(split))
    model.set_dropout_step(seed=0, step=8)
    assert (model(rows_of(batch, slice(0, 4))).nll - whole).abs().max() > 1e-2


def test_on_in_training_only(model, make_batch):
    batch = make_batch()
    with pytest.raises(ValueError, match="set_dropout_step"):
        model(batch)
    model.set_dropout_step(0, 0)
    noisy = model(batch).nll
    clean = model.eval()(batch).nll
    assert (noisy - clean).abs().max() > 1e-2
    model.settings = model.settings.model_copy(update={"dropout": 0.0})
    torch.testing.assert_close(model.train()(batch).nll, clean)
