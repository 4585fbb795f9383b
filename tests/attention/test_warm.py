"""The work that the loader leaves to a step on a GPU: copies that run on their own, nothing to plan
and nothing to pin. On rows of every preset; the GPU is a meta device, to which copies can be made."""

import copy
import pickle

import pytest
import torch

from megaarch import config
from megaarch.attention import KERNELS, Parts, RelativeBias, choose, sdpa, varlen, warm
from megaarch.attention.key_intervals import intervals, tensors
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.ingest.prepare import prepare
from tests.attention.cases import prefix
from tests.attention.gpus import GPUS, Machine, on_gpu
from tests.conftest import PRESETS

DEVICE = torch.device("meta")


@pytest.fixture
def pins(monkeypatch):
    """Lists what is copied to pinned memory, which is memory of its own."""
    made, held = [], {}

    def pin_memory(x):
        made.append(x)
        pinned = x.clone()
        held[pinned.data_ptr()] = pinned
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.data_ptr() in held)
    return made


@pytest.fixture
def in_step(monkeypatch, pins):
    """in_step(): from here on nothing may be planned, and `pins` counts anew."""

    def begin():
        pins.clear()
        plan = Parts.plan

        def planned(parts, kernel, build):
            assert kernel in parts._plans, f"{kernel} is planned in the step"
            return plan(parts, kernel, build)

        monkeypatch.setattr(Parts, "plan", planned)

    return begin


def put_on_device(name, parts, dtype, fused_rows=False):
    """Derives what a kernel needs of its plan on the device before its first call."""
    kernel = KERNELS[name]
    if isinstance(kernel, varlen.VarlenKernel):
        varlen.on_device(parts, DEVICE, fused_rows)
    elif name in ("cudnn", "sdpa"):
        plan = kernel.plan(parts)
        for call in sdpa.on_device(plan, DEVICE).calls:
            sdpa.mask(call, dtype, DEVICE)
    else:
        tensors(intervals(parts), DEVICE)
        if name == "flex":
            kernel.mask(parts, DEVICE)


def batch_of(raw, preset, **given):
    """The first micro-batch of a run, as the thread that pins gets it from a worker."""
    mine = copy.deepcopy(raw)
    mine["model"] |= {"preset": preset, "sequence_length": 96}
    mine["data"]["sentinels"] = 64
    settings = config.resolve(config.fill_preset(mine))
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    rows = Rows(settings.model, settings.data, prepared, 0)
    steps = Steps(rows, global_batch_size=4, micro_batch_size=4, device_type="cuda", **given)
    return pickle.loads(pickle.dumps(steps[0][0]))


@pytest.mark.parametrize("half, bias", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_planned_or_pinned_in_a_step(
    preset, half, bias, raw, pins, in_step, monkeypatch
):
    Machine(monkeypatch).has(GPUS["H100"], libraries=False)
    batch = batch_of(raw, preset, half=half, bias=bias).pin_memory()
    assert pins
    in_step()
    dtype = torch.bfloat16 if half else torch.float32
    table = RelativeBias(torch.zeros(32, 2), True)
    for stream in batch.streams:
        for parts, with_bias in ((stream.parts, bias), (stream.cross, False)):
            if parts is not None:
                given = on_gpu(parts, dtype=dtype)
                name, _ = choose("auto", *given, parts, table if with_bias else None)
                assert (name == "sdpa") == (with_bias or not half)
                put_on_device(name, parts, dtype)
    assert not pins


@pytest.mark.parametrize("fused_rows", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "torch_varlen", "sdpa", "flex", "cudnn_flex"])
def test_a_kernel_that_is_asked_for(name, fused_rows, pins, in_step):
    parts = Parts.of([prefix(p, 300) for p in (10, 250, 300)], 300, 300)
    warm(parts, "cuda", name, fused_rows)
    parts.pin_memory()
    assert pins or name == "cudnn"  # whose rows are slices here
    in_step()
    put_on_device(name, parts, torch.bfloat16, fused_rows)
    assert not pins


def test_pinned_plans_are_what_they_were(pins):
    rows = [prefix(p, 300) for p in (10, 250, 300)]
    mine, plain = (warm(Parts.of(rows, 300, 300), "cuda", "sdpa") for _ in range(2))
    mine.pin_memory()
    cpu = torch.device("cpu")
    found, wanted = (sdpa.on_device(sdpa.KERNEL.plan(x), cpu).calls for x in (mine, plain))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(*(sdpa.mask(call, torch.float32, cpu) for call in (a, b)))
        for x, y in ((a.q, b.q), (a.k, b.k), (a.out, b.out), (a.kept, b.kept)):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
