"""The recorder against what a few operators are known to launch, move and compute."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.fake_cuda import device, host, rates, record

pytestmark = pytest.mark.skipif(device.obstacle() is not None, reason=str(device.obstacle()))
GPU = {"device": "cuda:0"}
HALF = {"device": "cuda:0", "dtype": torch.bfloat16}


def run(work) -> record.Recorder:
    """What `work(recorder)` records."""
    recorder = record.Recorder()
    with device.pretended(), host.answered(), recorder:
        work(recorder)
    return recorder


def kernels(make, work) -> list[record.Kernel]:
    """What `work(*make())` launches; making the operands is left out."""
    made: list[record.Kernel] = []

    def both(recorder):
        operands = make()
        before = len(recorder.kernels)
        work(*operands)
        made.extend(recorder.kernels[before:])

    run(both)
    return made


def pair():
    return torch.empty(64, 32, **GPU), torch.empty(64, 32, **GPU)


N = 64 * 32 * 4  # bytes of one of them


@pytest.mark.parametrize(
    ("work", "bytes"),
    [
        (lambda a, b: a + b, [3 * N]),
        (lambda a, b: a * a, [2 * N]),  # one operand, read once
        (lambda a, b: a + b[:1], [2 * N + 32 * 4]),
        (lambda a, b: a + b[:1].expand(64, 32), [2 * N + 32 * 4]),  # a stride of zero
        (lambda a, b: a.add_(b), [3 * N]),  # read, read, written
        (lambda a, b: a.copy_(b), [2 * N]),
        (lambda a, b: a.zero_(), [N]),
        (lambda a, b: a.t().reshape(-1), [2 * N]),  # a copy
        (lambda a, b: a.view(-1)[::2].unflatten(0, (2, -1)).transpose(0, 1), []),
        (lambda a, b: torch.empty_like(a), []),
        (lambda a, b: torch.zeros(64, 32, **GPU), [N]),
        (lambda a, b: a.to(torch.bfloat16), [N + N // 2]),
        (lambda a, b: torch.stack((a, b)), [4 * N]),
        (lambda a, b: torch._foreach_mul_([a, b], 2.0), [4 * N]),
    ],
)
def test_bytes(work, bytes):
    assert [k.bytes for k in kernels(pair, work)] == bytes


def test_a_composite_counts_as_the_kernels_it_is_made_of():
    found = kernels(pair, lambda a, b: a.masked_fill(b > 0, 1.0))
    assert [k.name for k in found] == ["aten::gt", "aten::copy_", "aten::masked_fill_"]


def test_rows_that_are_gathered_are_read_once_each():
    def make():
        return torch.empty(4096, 32, **GPU), torch.empty(64, dtype=torch.int64, **GPU)

    (taken,) = kernels(make, lambda table, rows: table.index_select(0, rows))
    assert taken.bytes == 2 * N + 64 * 8
    (added,) = kernels(
        make, lambda table, rows: table.index_add_(0, rows, torch.empty(64, 32, **GPU))
    )
    assert added.bytes == 3 * N


def test_products():
    def make():
        return torch.empty(64, 32, **HALF), torch.empty(32, 16, **HALF)

    (found,) = kernels(make, torch.matmul)
    assert found.kind == record.PRODUCT
    assert found.flops == 2 * 64 * 32 * 16
    assert found.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert found.seconds == rates.LAUNCH  # so small


def test_a_large_product_takes_its_rate():
    def make():
        return torch.empty(8192, 8192, **HALF), torch.empty(8192, 8192, **HALF)

    (found,) = kernels(make, torch.matmul)
    assert found.seconds == 2 * 8192**3 / rates.PRODUCTS["bfloat16"]


def test_a_float8_product_takes_float8s_rate():
    """Whatever its scales, which are fp32, and its result are."""

    def make():
        eight = {"device": "cuda:0", "dtype": torch.float8_e4m3fn}
        a, b = torch.empty(8192, 8192, **eight), torch.empty(8192, 8192, **eight).t()
        return a, b, torch.ones((), **GPU), torch.ones((), **GPU)

    (found,) = kernels(make, lambda *given: torch._scaled_mm(*given, out_dtype=torch.bfloat16))
    assert found.kind == record.PRODUCT
    assert found.seconds == found.flops / rates.PRODUCTS["float8_e4m3fn"]


def test_lists_are_walked_by_few_kernels():
    def make():
        return [[torch.empty(65536, **GPU) for _ in range(1000)]]

    (found,) = kernels(make, lambda xs: torch._foreach_mul_(xs, 2.0))
    assert found.launches == -(-1000 // 110)  # ATen's multi_tensor_apply: 110 tensors a launch


def qkv():
    return [torch.empty(2, 4, 256, 64, **HALF).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_what_is_seen(causal):
    def work(q, k, v):
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    seen = int(np.tril(np.ones((256, 256))).sum()) if causal else 256 * 256
    found = [k for k in kernels(qkv, work) if k.kind == record.ATTENTION]
    assert [(k.phase, k.launches) for k in found] == [("forward", 1), ("backward", 3)]
    one = 4 * 2 * 4 * 64 * seen
    assert [k.flops for k in found] == [one, 2.5 * one]
    assert all("cudnn" in k.name for k in found)


def test_a_dense_mask_goes_to_the_memory_efficient_kernel():
    def work(q, k, v):
        mask = torch.zeros(1, 1, 256, 256, **HALF)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    (found,) = [k for k in kernels(qkv, work) if k.kind == record.ATTENTION]
    assert "efficient" in found.name and found.flops == 4 * 2 * 4 * 64 * 256 * 256


def test_packed_attention_counts_its_segments():
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = np.array([0, 100, 130], np.int32), np.array([0, 120, 160], np.int32)

    def work(q, k, v):
        starts = [torch.from_numpy(x).pin_memory().cuda(non_blocking=True) for x in (queries, keys)]
        out = varlen_attn(q, k, v, *starts, 100, 120, window_size=(-1, 0))
        out.sum().backward()

    def make():
        lengths = 130, 160, 160
        return [torch.empty(n, 4, 64, **HALF).requires_grad_() for n in lengths]

    seen = sum(
        np.tril(np.ones((q, k)), k=k - q).sum() for q, k in zip(np.diff(queries), np.diff(keys))
    )
    found = [k for k in kernels(make, work) if k.kind == record.ATTENTION]
    assert [k.flops for k in found] == [4 * 4 * 64 * seen, 2.5 * 4 * 4 * 64 * seen]


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 0),
        (lambda x: torch.ones(8).cuda(), 1),
        (lambda x: torch.ones(8).to("cuda", non_blocking=True), 1),  # pageable memory
        (lambda x: torch.ones(8).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda x: torch.ones(8).pin_memory().cuda(), 1),
        (lambda x: x * 2 + x.sum(), 0),
        (lambda x: torch.equal(x, x), 1),
    ],
)
def test_waits(work, waits):
    assert sum(run(lambda _: work(torch.empty(8, **GPU))).waits.values()) == waits


def test_mixed_devices_are_an_error():
    with pytest.raises(RuntimeError, match="device"):
        run(lambda _: torch.empty(8, **GPU) + torch.empty(8))


def test_phases_and_muted_blocks():
    def work(recorder):
        x = torch.empty(8, 8, **GPU).requires_grad_()
        y = (x * x).sum()
        y.backward()
        with record.phase(recorder, "clip"):
            x.grad.norm()
        with recorder.muted():
            x.exp()
            with recorder.muted(False):
                x.exp()

    found = run(work).kernels
    order = list(dict.fromkeys(k.phase for k in found))
    assert order == ["forward", "backward", "clip"]
    assert "aten::exp" not in {k.name for k in found}


def test_an_opaque_operator_is_opened():
    """What stands behind `megaarch::attend` is counted, not the operator."""
    from tests.fake_cuda import operators

    @torch.library.custom_op("megaarch_account::doubled_twice", mutates_args=())
    def doubled_twice(x: torch.Tensor) -> torch.Tensor:
        return (x * 2) * 2

    doubled_twice.register_fake(torch.empty_like)
    opaque = kernels(pair, lambda a, b: doubled_twice(a))
    operators.OPENED.add("megaarch_account::doubled_twice")
    opened = kernels(pair, lambda a, b: doubled_twice(a))
    assert [k.name for k in opaque] == ["megaarch_account::doubled_twice"]
    assert [k.name for k in opened] == ["aten::mul", "aten::mul"]
