"""What tests of the compiled decode call share: the steps of an answer, compared with the layers one by one."""

import numpy as np
import torch

from megaarch.model import transformer
from tests.inference.models import made, started

STEPS = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def answered(model, settings, chunk=None):
    """The logits of each step of rows of unequal lengths, two of which leave; and the cache."""
    decoding, prefixes = started(model, settings, chunk)
    rng, found = np.random.default_rng(1), []
    with torch.no_grad():
        found.append(decoding.start())
        for step in range(STEPS):
            if step == 2:
                decoding.select([3, 0])
                prefixes = [prefixes[3], prefixes[0]]
            found.append(decoding.step(rng.integers(7, 20, size=len(prefixes))))
    return found, decoding.cache


def compare(found, cache, wanted, other):
    for a, b in zip(found, wanted, strict=True):
        assert b.std() > 0.1
        torch.testing.assert_close(a, b, **CLOSE)
    np.testing.assert_array_equal(cache.lengths, other.lengths)
    for index, layer in cache.layers.items():
        for row, length in enumerate(cache.lengths):
            for mine, theirs in (
                (layer.tensors["keys"], other.layers[index].tensors["keys"]),
                (layer.tensors["values"], other.layers[index].tensors["values"]),
            ):
                torch.testing.assert_close(mine[row, :length], theirs[row, :length], **CLOSE)


def check_steps(preset, options, monkeypatch, chunk=None):
    """Compares the steps with those of the layers one by one."""
    model, settings = made(preset, torch.float32, **options)
    found, cache = answered(model, settings, chunk)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "few_tokens", lambda *_: None)
        compare(found, cache, *answered(model, settings, chunk))
