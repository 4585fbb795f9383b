"""Compiled training over real batches: each kind of layer is one graph, compiled in the first step and
never again, whatever masks and lengths later batches bring; so are the head and the loss."""

import pytest
import torch
from torch._dynamo.utils import counters

from megaarch.config import catalogue
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import NativeEngine
from megaarch.parallel import compile

pytestmark = pytest.mark.slow

STEPS, SETTLED = 20, 3
FEW = 8  # steps of many layers, which are to share a graph: what batches do to it one of each kind shows
BESIDE_LAYERS = 2  # the head, and a chunk of the loss


@pytest.fixture
def graphs(tiny, prepared, monkeypatch):
    """graphs(preset, **options): after each step, how many graphs the compiler was given so far; what runs is
    torch's own operations, as on CUDA."""
    monkeypatch.setattr("megaarch.kernels.bindings.obstacle", lambda device_type: "not here")
    torch._dynamo.reset()
    counters.clear()
    given = []

    def compiler(graph, inputs):
        given.append(graph)
        return graph.forward

    monkeypatch.setattr(compile, "BACKEND", compiler)

    def run(preset: str, number_of_steps: int = STEPS, **options) -> list[int]:
        settings = tiny(preset, model__attention="sdpa", training__compile=True, **options)
        training = settings.training
        steps = Steps(
            Rows(settings.model, settings.data, prepared, training.seed),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            kernel="sdpa",
        )
        engine = NativeEngine(settings, Grid.single("cpu"))
        engine.train()
        after = []
        for number in range(number_of_steps):
            engine.forward_backward(steps[number], 1.0)
            if number == SETTLED:
                engine.eval()
                with torch.no_grad():
                    engine(steps[0][0])  # scored between steps
                engine.train()
            after.append(len(given))
        return after

    yield run
    torch._dynamo.reset()


def kinds_of(preset: str) -> int:
    """Kinds of layers: of an encoder, of a decoder."""
    return len(catalogue.ARCHITECTURES[catalogue.PRESETS[preset].architecture].streams)


@pytest.mark.parametrize("preset", catalogue.PRESETS)
def test_a_layer_is_one_graph_and_is_compiled_once(graphs, preset):
    after = graphs(preset)
    assert not counters["graph_break"]
    assert after[0] == kinds_of(preset) + BESIDE_LAYERS, "graphs of the first step"
    assert after[-1] == after[SETTLED - 1] == after[0], after


def test_layers_share_their_graph(graphs):
    """However many there are: the compiler gives up on a function after eight graphs."""
    after = graphs("gpt", FEW, model__layers=10)
    assert after[-1] == 1 + BESIDE_LAYERS


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_layers_share_their_graph(graphs, recipe):
    given = {"model__layers": 3, "training__precision": "bf16"}
    after = graphs("gpt", training__float8=recipe, training__float8_emulate=True, **given)
    assert not counters["graph_break"]
    assert after[-1] == after[0] == 1 + BESIDE_LAYERS, after


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("preset", ["gpt", "prefix_lm", "t5"])
def test_recomputed_layers_share_their_graph(graphs, preset, mode):
    after = graphs(preset, FEW, model__layers=10, parallel__recompute=mode)
    assert not counters["graph_break"]
    assert after[0] == after[-1] == kinds_of(preset) + BESIDE_LAYERS, after
