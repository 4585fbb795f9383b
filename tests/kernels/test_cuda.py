"""The fused kernels on a GPU, against torch in fp64.

python setup.py build_ext --inplace && python -m pytest tests/kernels/test_cuda.py -rs
"""

import numpy as np
import pytest
import torch

from megaarch.attention import Parts, attend, fused_gather, warm
from megaarch.attention.fused_gather import Pieces
from megaarch.attention.gather import Segments
from megaarch.attention.plan import to_device
from megaarch.kernels import bindings
from megaarch.kernels.rms_norm import rms_norm
from tests.attention.cuda import LONG, skip_if_refused
from tests.attention.runs import tensors
from tests.kernels.problems import (
    TOLERANCE,
    draw,
    losses,
    norms,
    off,
    random_segments,
    strided,
    whole_loss,
)

MISSING = bindings.obstacle("cuda") if torch.cuda.is_available() else "torch finds no CUDA"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# one item a thread to eight, packed and not, fewer rows than blocks and more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 8), (3, 5, 7), (700, 33), (2000, 256), (40, 4096), (9, 6144), (5, 16384)], ids=str
)
def test_rms_norm(shape, dtype):
    assert norms(shape, dtype, "cuda") < 2 * TOLERANCE[dtype]


def test_a_width_without_a_kernel_is_named():
    x, weight = draw((1, 40001), (40001,), dtype=torch.float32, device="cuda")
    with pytest.raises(RuntimeError, match="no kernel for this size"):
        rms_norm(x, weight, 1e-6)


def test_the_weights_gradient_has_the_same_bits_each_time():
    x, weight, grad = draw((5000, 768), (768,), (5000, 768), dtype=torch.bfloat16, device="cuda")
    first, *others = (
        torch.autograd.grad(rms_norm(x, weight, 1e-6), weight, grad)[0] for _ in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "known", "columns"),
    [(5, 100, 128), (130, 33, 33), (1, 2, 3), (300, 32100, 32128), (7, 128_000, 128_256)],
)
@pytest.mark.parametrize("first", [0, 60])
def test_cross_entropy(rows, known, columns, first, dtype):
    for biased in (True, False):
        found = losses(rows, known, columns, dtype, "cuda", first, biased)
        assert found < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("count", [300, 0])
def test_whole_loss(count):
    found = whole_loss(count, True, torch.float32, device="cuda")
    wanted = whole_loss(count, False, torch.float32, device="cuda")
    assert off(found, wanted) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 64, 128])  # 2, 4 and 16 bytes a load
def test_rows(size, dtype):
    rng = np.random.default_rng(0)
    x = strided((3, 50, 4, size), dtype, "cuda")
    gathers = []
    for _ in range(2):
        gathers.append(Segments.of(*random_segments(rng, 150, 9), rows=-1))
    pieces = to_device(Pieces.of(gathers, 150), x.device)
    gathers = [to_device(rows, x.device) for rows in gathers]
    taken = [fused_gather.gather(x.flatten(0, 1), s.first, s.starts, s.total) for s in gathers]
    for rows, found in zip(gathers, taken):
        assert torch.equal(found, x.flatten(0, 1)[rows.index()[0]])
    added = fused_gather.add_up(taken, pieces.bounds, pieces.readers, pieces.origin, 150)
    wanted = torch.zeros(150, 4, size, dtype=torch.float64, device="cuda")
    for rows, found in zip(gathers, taken):
        wanted.index_add_(0, rows.index()[0], found.double())
    assert off([added], [wanted]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", LONG)
def test_attention_by_segments(name):
    """torch's variable-length kernel, rows moved either way; nothing waits for the device."""
    shapes = Parts.of(LONG[name], 1000, 1000)
    q, k, v, grad = (x.cuda() for x in tensors(shapes, 4, 2, 64, torch.bfloat16))
    skip_if_refused("torch_varlen", q, k, shapes)
    found = {}
    for fused in (False, True, False, True):
        parts = Parts.of(LONG[name], 1000, 1000)  # whose indices the device has not seen
        warm(parts, "cuda", "torch_varlen", fused)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if fused in found else "default")
        try:
            out = attend(*leaves, parts, kernel="torch_varlen", fused_rows=fused)
            found[fused] = [out, *torch.autograd.grad(out, leaves, grad)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[True][0], found[False][0])
    assert off(found[True], found[False]) < 2e-2
