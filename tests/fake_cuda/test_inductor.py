"""torch.compile by account: the kernels that inductor plans are counted, none is launched, and the
Triton code of the layers compiles for Hopper."""

import re

import pytest
import torch

from tests.fake_cuda import device, hopper, host, inductor, record, step

pytestmark = pytest.mark.skipif(device.obstacle() is not None, reason=str(device.obstacle()))
ROWS, WIDTH = 4096, 1024
LAYERS = ("model.layers=1", "model.encoder_layers=1", "model.decoder_layers=1")


def compiled(work, *shapes) -> tuple[inductor.Compiler, list[record.Kernel]]:
    """What `work`, compiled, runs forward and backward on bf16 tensors of these shapes."""
    recorder = record.Recorder()
    with device.pretended(), host.answered(), inductor.stand_in() as compiler:
        given = [
            torch.empty(s, device="cuda:0", dtype=torch.bfloat16).requires_grad_() for s in shapes
        ]
        compiler.recorder = recorder
        function = torch.compile(work)
        with recorder:
            out = function(*given)
            out.backward(torch.empty_like(out))
        assert out.device.type == "cuda" and all(x.grad.shape == x.shape for x in given)
    return compiler, recorder.kernels


def test_elementwise_work_is_one_kernel_each_way():
    compiler, found = compiled(lambda x: torch.relu(x * 3 + 1) * 2, (ROWS, WIDTH))
    assert len(compiler.plans) == 2
    assert [k.phase for k in found] == ["forward", "backward"]
    assert all(k.name.startswith("triton") for k in found)
    x = ROWS * WIDTH * 2
    assert 2 * x <= found[0].bytes <= 3 * x  # in, out, and what the backward pass keeps


def test_products_are_left_to_the_library():
    def work(x, w):
        return torch.nn.functional.silu(x @ w)

    _, found = compiled(work, (ROWS, WIDTH), (WIDTH, WIDTH))
    products = [k for k in found if k.kind == record.PRODUCT]
    assert [k.phase for k in products] == ["forward", "backward", "backward"]
    assert {k.flops for k in products} == {2 * ROWS * WIDTH * WIDTH}
    fused = [k for k in found if k.name.startswith("triton")]
    assert [k.phase for k in fused] == ["forward", "backward"]
    assert len(found) == 5


def test_every_launch_of_the_code_is_counted():
    """Counted a second time in the Python that inductor wrote."""

    def work(x, w, g):
        y = torch.nn.functional.rms_norm(x, (WIDTH,), g)
        return x + torch.relu(y @ w)

    compiler, _ = compiled(work, (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,))
    for plan in compiler.plans:
        assert len(re.findall(r"^\s+\w+\.run\(", plan.code, re.M)) == len(plan.fused)
        assert len(re.findall(r"^\s+extern_kernels\.", plan.code, re.M)) == len(plan.extern)


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("gpt", []),
        ("t5", []),
        ("gpt", ["training.float8=tensorwise"]),
        ("gpt", ["training.float8=rowwise"]),
    ],
)
def test_layers_compile_for_hopper(preset, given, tmp_path):
    """Each Triton kernel of a compiled step, by Triton's own compiler for sm_90."""
    settings = step.benchmark(preset, ["training.compile=true", *_layers(preset), *given])
    sources = {
        source for plan in step.run(settings).plans for source in hopper.sources(plan.code).items()
    }
    assert sources
    with device.pretended(), inductor.stand_in():
        for name, source in sources:
            assert ".target sm_90" in hopper.ptx(name, source, tmp_path)


def _layers(preset: str) -> tuple[str, ...]:
    return LAYERS if preset == "t5" else LAYERS[:1]
