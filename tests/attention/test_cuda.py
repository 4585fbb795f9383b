"""All kernels on a GPU: adversarial masks, shards of heads, against the dense fp64 reference.

    python -m pytest tests/attention/test_cuda.py -rs

says why each kernel that did not run could not.
"""

import pytest
import torch

from megaarch.attention import KERNELS, Parts, RelativeBias, attend, choose, warm
from tests.attention.cases import CASES, prefix
from tests.attention.cuda import LONG, skip_if_refused
from tests.attention.runs import tensors, unread

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA")
# A kernel that crashes costs the run a process a case: what is least proven comes last.
UNPROVEN = ("cudnn_ragged", "cudnn_flex", "flash4", "flex_flash")
FAST = [*(name for name in KERNELS if name not in ("reference", "cpu", *UNPROVEN)), *UNPROVEN]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of a norm


def run(kernel, parts, q, k, v, grad, **options):
    """[out, dq, dk, dv] on the GPU."""
    leaves = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, parts, kernel=kernel, **options)
    assert out.shape == q.shape and out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.cuda())]


def assert_close(kernel, parts, q, k, v, grad, **options):
    """Against the reference on the same inputs, or skipped with the kernel's own reason."""
    skip_if_refused(kernel, q, k, parts)
    wide = (x.double() for x in (q, k, v, grad))
    expected = run("reference", parts, *wide, **options)
    found = run(kernel, parts, q, k, v, grad, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), expected, found):
        assert torch.isfinite(b).all(), f"{kernel}: {name} is not finite"
        error = (b.double() - a).norm() / a.norm().clamp(min=1e-6)
        assert error < TOLERANCE[q.dtype], f"{kernel}: {name} is off by {error:.2g} of its norm"
    queries, keys = (x.cuda() for x in unread(parts))
    for x, rows in zip(found, (queries, queries, keys, keys)):
        assert (x[rows] == 0).all()


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("name", CASES)
def test_short_masks(kernel, name):
    parts = Parts.of(*CASES[name])
    assert_close(kernel, parts, *tensors(parts, 4, 2, 64, torch.bfloat16))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("name", LONG)
def test_long_masks(kernel, name, size):
    rows = LONG[name]
    parts = Parts.of(rows, 1000, 1000)
    assert_close(kernel, parts, *tensors(parts, 4, 4, size, torch.bfloat16))


# tp or cp of 2 leaves each rank half of the heads: 8 query heads with 2, 1 and 8 key heads
@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (8, 1), (1, 1)])
@pytest.mark.parametrize("kernel", FAST)
def test_shards_of_heads(kernel, heads):
    parts = Parts.of(LONG["prefix of each row"], 1000, 1000)
    whole = tensors(parts, 2 * heads[0], 2 * heads[1], 64, torch.bfloat16)
    q, k, v, grad = (x[:, :, n:] for x, n in zip(whole, (heads[0], heads[1], heads[1], heads[0])))
    assert_close(kernel, parts, q, k, v, grad)


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fp32_and_masks_of_one_row(kernel, dtype):
    parts = Parts.of([prefix(70, 200)], 200, 200)
    assert_close(kernel, parts, *tensors(parts, 4, 2, 64, dtype))


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_relative_bias_and_the_gradient_of_its_table(kernel):
    parts = Parts.of([prefix(p, 200) for p in (0, 33, 200)], 200, 200)
    q, k, v, grad = tensors(parts, 4, 4, 64, torch.bfloat16)
    positions = torch.arange(200).expand(3, -1)[..., None].cuda()
    bias = RelativeBias(torch.zeros(32, 4).cuda(), True, 64)
    skip_if_refused(kernel, q, k, parts, bias)
    found = {}
    for name in ("reference", kernel):
        table = torch.linspace(-1, 1, 32).repeat(4, 1).t().contiguous().cuda().requires_grad_()
        leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
        out = attend(
            *leaves,
            parts,
            kernel=name,
            bias=RelativeBias(table, True, 64),
            query_positions=positions,
            key_positions=positions,
        )
        found[name] = [out, *torch.autograd.grad(out, [*leaves, table], grad.cuda())]
    for a, b in zip(found["reference"], found[kernel]):
        error = (b.double() - a.double()).norm() / a.double().norm()
        assert error < 2e-2


@pytest.mark.parametrize("kernel", FAST)
def test_garbage_in_padding_rows_reaches_nothing(kernel):
    parts = Parts.of([prefix(p, n) for p, n in ((0, 9), (3, 140), (9, 9))], 150, 150)
    clean = tensors(parts, 4, 2, 64, torch.bfloat16)
    queries, keys = unread(parts)
    dirty = [x.clone() for x in clean]
    for x, rows in zip(dirty, (queries, keys, keys, queries)):
        x[rows] = float("nan")
    assert_close(kernel, parts, *clean)
    for a, b in zip(run(kernel, parts, *clean), run(kernel, parts, *dirty)):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LONG)
def test_a_step_never_waits_for_the_device(name):
    """With the plan made ahead, `auto` neither copies to the host nor blocks."""
    parts = Parts.of(LONG[name], 1000, 1000)
    q, k, v, grad = (x.cuda() for x in tensors(parts, 4, 4, 64, torch.bfloat16))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    attend(q, k, v, Parts.of(LONG[name], 1000, 1000)).backward(grad)  # compiles and allocates
    warm(parts, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, parts).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LONG)
def test_deterministic_runs_repeat_their_bits(name):
    parts = Parts.of(LONG[name], 1000, 1000)
    given = tensors(parts, 4, 2, 64, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run("auto", parts, *given) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_what_auto_takes_runs():
    for rows in LONG.values():
        parts = Parts.of(rows, 1000, 1000)
        q, k, *_ = (x.cuda() for x in tensors(parts, 4, 4, 64, torch.bfloat16))
        name, reason = choose("auto", q, k, parts)
        assert name != "reference" and "fastest" in reason
