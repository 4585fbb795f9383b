"""The masks whose throughput is compared: equal to a dense mask, and of the areas that rates divide by."""

import pytest
import torch

from megaarch.attention import attend
from megaarch.probes import mask_speed
from megaarch.probes.catalogue import Options

N = 32
VISIBLE = {  # written from the definition: prefix tokens see each other, the rest what is before
    "causal": lambda q, k: k <= q,
    "prefix of a quarter": lambda q, k: (k <= q) | (k < N // 4),
    "prefix of a half": lambda q, k: (k <= q) | (k < N // 2),
    "prefix of three quarters": lambda q, k: (k <= q) | (k < 3 * N // 4),
    "bidirectional": lambda q, k: k >= 0,
}


@pytest.mark.parametrize("name", VISIBLE)
def test_every_implementation_computes_the_same_mask(name):
    parts = mask_speed.masks(N)[name]
    seen = [[VISIBLE[name](q, k) for k in range(N)] for q in range(N)]
    assert parts.dense()[0].tolist() == seen
    assert parts.area() == mask_speed.ROWS * sum(map(sum, seen))
    shape = (mask_speed.ROWS, N, mask_speed.HEADS, mask_speed.HEAD_SIZE)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = mask_speed.dense((q, k, v), parts).transpose(1, 2)
    torch.testing.assert_close(out, attend(q, k, v, parts), rtol=1e-4, atol=1e-5)


def test_ratios_are_to_causal_of_the_same_implementation():
    found = mask_speed.measure(Options(length=64))
    assert {name in found.ours for name in found.of_kernels} == {True, False}
    for ratios in found.of_kernels.values():
        assert set(ratios) == set(VISIBLE) - {"causal"}
    assert set(found.least(ours=True)) == set(found.ours)
    for name, ratio in (found.least(True) | found.least(False)).items():
        assert ratio == min(e.value for e in found.of_kernels[name].values())
