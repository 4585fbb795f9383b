import numpy as np
import pytest
import torch

from megaarch.attention import mask
from megaarch.attention.mask import Parts
from megaarch.config import schema
from megaarch.data.batch import Batch, Counts, Stream


def tiny(**options) -> schema.Model:
    return schema.Model(
        **{
            "layers": 2,
            "hidden_size": 16,
            "heads": 4,
            "feed_forward_size": 24,
            "sequence_length": 12,
        }
        | {"vocabulary_size": 150, "initial_deviation": 0.3}
        | options
    )


def stream(rng, rows, length, part, axes=1, cross=None):
    positions = torch.arange(length)[None, :, None].repeat(rows, 1, axes)
    positions[..., 1:] //= 2
    return Stream(
        torch.from_numpy(rng.integers(0, 150, (rows, length))),
        positions,
        Parts.of([[part(0, length, 0, length)]] * rows, length, length),
        cross,
    )


def make_batch(rows=3, lengths=(12,), targets=7, unused=2, axes=1, seed=0) -> Batch:
    """Random tokens; the last `unused` target slots of every row have weight 0."""
    rng = np.random.default_rng(seed)
    if len(lengths) == 1:
        streams = (stream(rng, rows, lengths[0], mask.causal, axes),)
    else:
        n, m = lengths
        cross = Parts.of([[mask.full(0, m, 0, n)]] * rows, m, n)
        streams = (
            stream(rng, rows, n, mask.full, axes),
            stream(rng, rows, m, mask.causal, axes, cross),
        )
    index = [rng.choice(lengths[-1], targets, replace=False) for _ in range(rows)]
    weights = torch.ones(rows, targets)
    weights[:, targets - unused :] = 0
    used = weights.flatten().nonzero()[:, 0]
    spare = (weights.flatten() == 0).nonzero()[:, 0]
    padding = spare[torch.arange(-len(used) % 128) % len(spare)] if unused else spare
    return Batch(
        streams,
        torch.from_numpy(np.stack(index)),
        torch.from_numpy(rng.integers(0, 150, (rows, targets))),
        weights,
        torch.cat((used, padding)),
        len(used),
        torch.arange(rows) + 10,
        Counts(rows, (0,), (0,), (0,), len(used), (0,)),
    )


@pytest.fixture(name="tiny")
def tiny_fixture():
    return tiny


@pytest.fixture(name="make_batch")
def make_batch_fixture():
    return make_batch
