"""Steps of models beside the presets' own: what they run stays on the device and waits for its figures
alone."""

import pytest

from megaarch.model import flops
from tests.fake_cuda import device, record, step

pytestmark = pytest.mark.skipif(device.obstacle() is not None, reason=str(device.obstacle()))

FUSED = "model.fused_kernels=[rms_norm, rows, cross_entropy]"
MODELS = {
    "groups of key heads": ("gpt", "model.kv_heads=4"),
    "groups of key heads in torch's attention": ("gpt", "model.kv_heads=4", "model.attention=sdpa"),
    "BERT as published": (
        "bert",
        "model.position_encoding=learned",
        "model.segments=2",
        "model.head_transform=true",
        "model.output_bias=true",
        "model.dropout=0.1",
        "model.normalization_position=post",
    ),
    "BART as published": (
        "bart",
        "model.position_encoding=learned",
        "model.learned_positions=2560",
        "model.embedding_normalization=true",
        "model.dropout=0.1",
        "training.z_loss=1e-4",
    ),
    "T5 as published": ("t5", "model.position_encoding=relative", "model.dropout=0.1"),
    "learned positions of two axes": ("glm", "model.position_encoding=learned"),
    "masks made dense": ("xlnet", "model.attention=sdpa"),
    "packed lengths": ("unilm", "model.attention=torch_varlen"),
    "fused kernels": ("prefix_lm", "model.attention=torch_varlen", FUSED),
    "layers recomputed": ("gpt", "parallel.recompute=full"),
    "layers recomputed but for products and attention": ("t5", "parallel.recompute=selective"),
    "two micro-batches": ("gpt", "training.micro_batch_size=4"),
    "fp32": ("gpt", "training.precision=fp32"),
    "float8, a scale for a tensor": ("t5", "training.float8=tensorwise"),
    "float8, a scale for a row": ("gpt", "training.float8=rowwise"),
}
SMALL = ("model.layers=2", "model.encoder_layers=2", "model.decoder_layers=2")
ONE_STACK = SMALL[:1]


@pytest.fixture(scope="module")
def steps():
    """steps(preset, *settings): the step of a model of two layers a stack, run once."""
    made: dict[tuple[str, ...], step.Step] = {}

    def of(preset: str, *overrides: str) -> step.Step:
        key = preset, *overrides
        if key not in made:
            layers = SMALL if preset in ("t5", "bart", "ul2") else ONE_STACK
            made[key] = step.run(step.benchmark(preset, (*layers, *overrides)))
        return made[key]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_and_waits_for_its_figures_alone(steps, name):
    recorder = steps(*MODELS[name]).recorder
    assert {k.phase for k in recorder.kernels} >= {"forward", "backward", "clip", "optimizer"}
    assert [k for k in recorder.kernels if k.kind == record.ATTENTION]
    assert recorder.waits == {("read", "event"): 1}


def test_exact_attention_is_the_area_of_the_parts(steps):
    found = steps("unilm", "model.attention=torch_varlen")
    attention = [k for k in found.recorder.kernels if k.kind == record.ATTENTION]
    exact = flops.forward(found.settings.model, found.counts).attention
    assert sum(k.flops for k in attention if k.phase == "forward") == exact
    assert sum(k.flops for k in attention if k.phase == "backward") == 2.5 * exact


def test_products_of_full_rows_are_the_exact_count(steps):
    found = steps("gpt", "training.precision=fp32")
    exact = flops.forward(found.settings.model, found.counts)
    products = sum(
        k.flops
        for k in found.recorder.kernels
        if k.kind == record.PRODUCT and k.phase == "forward" and not k.head
    )
    assert products == exact.projections + exact.feed_forward


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("float8")])
def test_all_products_of_layers_are_float8(steps, name):
    found = steps(*MODELS[name])
    products = [k for k in found.recorder.kernels if k.kind == record.PRODUCT]
    exact = flops.forward(found.settings.model, found.counts)
    in_float8 = {
        phase: sum(k.flops for k in products if k.name == "aten::_scaled_mm" and k.phase == phase)
        for phase in ("forward", "backward")
    }
    rest = [k for k in products if k.name != "aten::_scaled_mm"]
    assert rest and all(k.head for k in rest)
    assert in_float8["backward"] == 2 * in_float8["forward"]
    assert in_float8["forward"] >= exact.projections + exact.feed_forward  # padding counts as time


def test_recomputing_runs_the_layers_products_again(steps):
    """All but each layer's last, whose result no gradient needs."""

    def backward(*settings):
        kernels = steps("gpt", *settings).recorder.kernels
        found = [k for k in kernels if k.kind == record.PRODUCT and k.phase == "backward"]
        return sum(k.flops for k in found if not k.head)

    found = steps("gpt", "parallel.recompute=full")
    model, tokens = found.settings.model, sum(found.counts.tokens)
    exact = flops.forward(model, found.counts)
    down = 2 * tokens * model.hidden_size * model.feed_forward_size * model.layers
    again = backward("parallel.recompute=full") - backward("training.precision=bf16")
    assert again == exact.projections + exact.feed_forward - down


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_layers_that_recompute_share_their_graph(steps, mode):
    """As many plans as without recomputation, whose layers share theirs."""
    whole, again = (steps("gpt", f"parallel.recompute={x}") for x in ("none", mode))
    assert len(again.plans) == len(whole.plans) > 0


def test_two_micro_batches_launch_twice_as_many_products(steps):
    def products(*settings):
        kernels = steps("gpt", *settings).recorder.kernels
        return sum(k.launches for k in kernels if k.kind == record.PRODUCT and not k.head)

    assert products("training.micro_batch_size=4") == 2 * products("training.precision=bf16")
