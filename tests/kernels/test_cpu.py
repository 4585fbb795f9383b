"""The kernels that a CPU runs in place of torch, unasked: each equals torch's operations, forward and
gradients, in fp64 and within the rounding of narrower dtypes; and where it does not serve, torch runs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from megaarch.kernels import bindings
from megaarch.kernels.cross_entropy import less_target
from megaarch.kernels.gated_activation import Gated
from megaarch.kernels.qkv_rope import Heads
from megaarch.model.layers import ACTIVATIONS
from megaarch.model.loss import cross_entropy
from megaarch.model.positions import heads, rotary_tables
from tests.kernels.problems import REASON, TOLERANCE, draw, off

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def with_gradients(function, leaves, seed=3):
    """The results, and the leaves' gradients for upstream gradients that the results' shapes fix."""
    found = function(*leaves)
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in found]
    return [*found, *torch.autograd.grad(found, leaves, upstream)]


def wide(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 2), (2, 5, 3, 6, 12), (3, 70, 2, 3, 64)], ids=str)
@pytest.mark.parametrize("axes", [1, 2])
def test_heads_equal_torchs_split_and_rotation(shape, axes, dtype, monkeypatch):
    if shape[-1] % (2 * axes):
        shape = (*shape[:-1], 2 * axes)
    (qkv,) = draw(shape, dtype=dtype)
    positions = torch.arange(shape[0] * shape[1] * axes).view(*shape[:2], axes) % 97
    tables = rotary_tables(positions, shape[-1], 10000.0, torch.float64)
    found = with_gradients(lambda x: Heads.apply(x, *tables, axes), [qkv])
    monkeypatch.setattr(bindings, "obstacle", lambda _: "torch, for comparison")
    wanted = with_gradients(lambda x: heads(x, tables, axes), wide([qkv]))
    assert all(x.dtype == dtype for x in found)
    assert off(found, wanted) < TOLERANCE[dtype]


def test_heads_take_gradients_as_attention_leaves_them():
    """Transposed, and a slice: last axis contiguous; and one that is not."""
    (qkv,) = draw((2, 5, 2, 4, 8))
    tables = rotary_tables(torch.arange(10).view(2, 5, 1), 8, 10000.0, torch.float64)
    q, k, v = Heads.apply(qkv, *tables, 1)
    grads = [torch.randn(2, x.shape[2], 5, 8, dtype=torch.float64).transpose(1, 2) for x in (q, k)]
    grads.append(torch.randn(2, 5, 8, 2, dtype=torch.float64).transpose(2, 3))
    plain = [g.contiguous() for g in grads]
    found, wanted = (
        torch.autograd.grad((q, k, v), qkv, given, retain_graph=True) for given in (grads, plain)
    )
    assert torch.equal(*found, *wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 2), (40, 700, 2), (0, 4, 2)], ids=str)
def test_gated_equals_torch(shape, name, dtype):
    (x,) = draw(shape, dtype=dtype)
    x = (4 * x).detach().requires_grad_()
    found = with_gradients(lambda x: [Gated.apply(x, name)], [x])
    wanted = with_gradients(lambda x: [ACTIVATIONS[name](x[..., 0]) * x[..., 1]], wide([x]))
    assert off(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gates_at_the_ends_of_fp32(name):
    x = torch.tensor([-3e38, -200.0, -89, -88, 0, 88, 89, 200, 3e38, float("nan")])
    x = torch.stack((x, torch.ones_like(x)), -1).requires_grad_()
    found = with_gradients(lambda x: [Gated.apply(x, name)], [x])
    wanted = with_gradients(lambda x: [ACTIVATIONS[name](x[..., 0]) * x[..., 1]], [x])
    same = {"rtol": 1e-6, "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(found[0][:-3], wanted[0][:-3], **same)
    if name == "swiglu":
        torch.testing.assert_close(found, wanted, **same)
    assert found[0][-1].isnan() and found[1][-1].isnan().all()


@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 60.0]),
    hidden=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_softmax_less_its_target(rows, columns, dtype, spread, hidden, seed):
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, columns, generator=g, dtype=torch.float64)
    logits = logits.to(dtype)
    target = torch.randint(0, columns, (rows,), generator=g)
    if hidden and columns > 3:  # ids that pad the vocabulary
        logits[:, -1] = float("-inf")
        target %= columns - 1
    whole = logits.double().clone()
    wanted = whole.softmax(-1) - F.one_hot(target, columns)
    partition, at_target = less_target(logits, target)
    close = 1e-14 if dtype == torch.float64 else 1e-6
    rounded = 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(logits.double(), wanted, rtol=rounded, atol=close)
    torch.testing.assert_close(partition.double(), whole.logsumexp(-1), rtol=close, atol=close)
    assert torch.equal(at_target.double(), whole.gather(1, target[:, None])[:, 0])
    if hidden and columns > 3:
        assert not logits[:, -1].any()


def test_softmax_of_what_is_not_a_number_is_not_a_number():
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(3, 50)
        logits[1, 20] = bad
        partition, _ = less_target(logits, torch.zeros(3, dtype=torch.int64))
        assert not partition[1].isfinite() or logits[1].isnan().any()
        assert logits[1].isnan().any() and logits[::2].isfinite().all()


@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_of_the_vocabulary_is_an_error(target):
    with pytest.raises(RuntimeError, match="softmax_less_target on cpu: an index is out of range"):
        less_target(torch.zeros(2, 9), torch.tensor([0, target]))


@pytest.mark.parametrize("name", ["nll", "log_partition", "both"])
def test_losses_and_gradients_are_torchs(name, monkeypatch):
    """Whichever of the two losses are differentiated, twice from one forward pass."""
    leaves = draw((70, 16), (128, 16), (128,), dtype=torch.float64)
    target = torch.arange(70) * 7 % 100
    weights = torch.linspace(0, 1, 70, dtype=torch.float64)

    def run():
        found = cross_entropy(*leaves, target, vocabulary_size=100, chunk_rows=32)
        used = found[:2] if name == "both" else [getattr(found, name)]
        total = sum((loss.square() * weights).sum() for loss in used)
        once = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        return [*found[:2], *once]

    found = run()
    monkeypatch.setattr(bindings, "obstacle", lambda _: "torch, for comparison")
    assert off(found, run()) < 1e-13


def test_they_serve_plain_tensors_of_their_dtypes_alone():
    x = torch.zeros(3)
    assert bindings.serves(x, torch.nn.Parameter(x.double()), x.bfloat16())
    assert not bindings.serves(x, x.half()) and not bindings.serves(x.to("meta"))
    with FakeTensorMode():
        assert not bindings.serves(torch.zeros(3))

    class Own(torch.Tensor):
        pass

    assert not bindings.serves(x.as_subclass(Own))


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    shapes = (2, 300, 2, 4, 32), (600, 200, 2), (256, 1000)
    qkv, pair, logits = (x.detach().float() for x in draw(*shapes))
    tables = rotary_tables(torch.arange(600).view(2, 300, 1), 32, 1e4, torch.float32)

    def run():
        copy = logits.clone()
        leaves = [qkv.clone().requires_grad_(), pair.clone().requires_grad_()]
        found = with_gradients(
            lambda x, y: [*Heads.apply(x, *tables, 1), Gated.apply(y, "swiglu")], leaves
        )
        return [*found, *less_target(copy, torch.arange(256)), copy]

    try:
        torch.set_num_threads(1)
        wanted = run()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
