import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    [{"row": 6}, {"row": 5 + 2**32}, {"seed": 2}, {"step": 3}, {"name": "layers.1"}, {"branch": 1}],
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


def deviations(rate, rows, slots, channels):
    """[B, S, D] float64 of mean 0 and variance 1 if the mask is as random as it should be."""
    keys = DropoutKeys(3, 4, torch.arange(rows)).of("x")
    dropped = dropout(torch.ones(rows, slots, channels), keys, rate) == 0
    return (dropped.double() - rate) / (rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_no_two_rows_slots_or_channels_go_together(axis, rate):
    z = deviations(rate, *torch.Size((64, 64, 64)))
    z = z.movedim(axis, 0).flatten(1)
    correlation = (z @ z.T / z.shape[1]).fill_diagonal_(0)
    pairs = len(z) * (len(z) - 1)
    assert correlation.abs().max() < 6 / z.shape[1] ** 0.5
    spread = (correlation.square().sum() / pairs * z.shape[1]).item()
    assert abs(spread - 1) < 6 * (2 * 2 / pairs) ** 0.5  # of chi-square, each pair counted twice


def test_corners_of_a_rectangle_are_independent():
    """A mask made of a slot's hash and a channel's shows in products of four, not of two."""
    z = deviations(0.5, 8, 256, 256)
    for slots in (1, 2, 3, 64):
        for channels in (1, 2, 3, 64):
            left, right = z[..., channels:], z[..., :-channels]
            four = left[:, slots:] * left[:, :-slots] * right[:, slots:] * right[:, :-slots]
            assert abs(four.sum()) < 5 * four.numel() ** 0.5, (slots, channels)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, of tensors with at least `size` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes, self.types = size, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            for x in tree_leaves((args, out)):
                if isinstance(x, torch.Tensor) and x.numel() >= self.size:
                    self.bytes += x.nbytes
                    self.types.add(x.dtype)
        return out


def test_a_mask_takes_few_passes_and_none_in_64_bits():
    x = torch.ones(4, S, D, dtype=torch.bfloat16)
    keys = DropoutKeys(0, 0, torch.arange(4)).of("x")
    with Traffic(x.numel()) as traffic:
        dropout(x, keys, 0.1)
    assert torch.int64 not in traffic.types
    mask = (2 * 4 + 3 * 4) + (4 + 1)  # two factors, their product in place, the comparison
    assert traffic.bytes <= x.numel() * (mask + 2 * 2 + (2 + 1 + 2))  # scaled, masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_as_one_graph_it_is_the_same(dtype):
    compiled = torch.compile(dropout, fullgraph=True)
    keys = DropoutKeys(1, 2, torch.tensor([0, 7, 2**40])).of("layers.0")
    found = []
    for function in (dropout, compiled):
        x = torch.linspace(-3, 3, 3 * 19 * 37, dtype=dtype).view(3, 19, 37).requires_grad_()
        out = function(x, keys, 0.3, 2, 5)
        out.sum().backward()
        found.append((out.detach(), x.grad))
    for eager, other in zip(*found):
        assert torch.equal(eager, other)
    assert 0.2 < (found[0][0] == 0).float().mean() < 0.4


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
