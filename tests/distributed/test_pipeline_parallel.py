"""Every schedule and every split gives the loss and the gradients of one process."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed import pipelining

from megaarch.config import ConfigError, catalogue
from megaarch.data.batch import Counts
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.model import Transformer, flops, initialize
from megaarch.parallel import compile
from megaarch.parallel.stages import check, layer_costs, row_shape, split
from tests.conftest import PRESETS
from tests.distributed import runs

Z_LOSS = 1e-2
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclasses.dataclass
class Case:
    """What one run of workers compares: a model, its micro-batches and a type."""

    name: str
    settings: object
    batches: list
    dtype: torch.dtype

    def model(self) -> Transformer:
        axes = catalogue.position_axes(self.settings.data.objective)
        return Transformer(self.settings.model, position_axes=axes)


@pytest.fixture
def case(tiny, prepared):
    def make(preset, dtype=torch.float32, **given):
        given = {
            "model__kv_heads": None,
            "model__layers": 2,
            "training__micro_batch_size": 2,
            "training__z_loss": Z_LOSS,
            **given,
        }
        settings = tiny(preset, **given)
        training = settings.training
        rows = Rows(settings.model, settings.data, prepared, training.seed)
        steps = Steps(
            rows,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            multiple=settings.parallel.tensor_parallel * settings.parallel.context_parallel,
        )
        return Case(f"{preset} {given}", settings, steps[0], dtype)

    return make


def compiled(settings):
    """How many graphs this rank had compiled, forward and backward, at the begin and the end of the schedule in two
    steps."""
    made = []

    def count(graph, inputs):
        made.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    seen = []
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    make = pipelining.Schedule1F1B.step

    def step(self, *given, **more):
        seen.append(len(made))
        make(self, *given, **more)
        seen.append(len(made))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "BACKEND", backend)
        patch.setattr(pipelining.Schedule1F1B, "step", step)
        trainer = runs.trainer_of(settings)
        for number in range(2):
            trainer.step(trainer.steps[number])
    return seen


@pytest.mark.parametrize("preset", ["prefix_lm", "t5"])
@pytest.mark.parametrize("shard", [1, 2])
def test_all_stages_compile_before_a_message_waits_for_them(preset, shard, pool, raw):
    """One after the other they would take as many times as long as a pipeline has stages."""
    given = {
        "model.layers": 4 // (1 + (preset == "t5")),
        "parallel.pipeline_parallel": 2,
        "parallel.data_parallel_shard": shard,
        "training.compile": True,
    }
    settings = runs.settings_of(raw, preset, given)
    for seen in pool.run(2 * shard, compiled, settings):
        first, *later = seen
        assert first >= 2 and set(later) == {first}, seen


def one_process(case):
    model = case.model()
    initialize(model, 0)
    model.to(case.dtype).train()
    model.set_dropout_step(0, 3)
    total, scale = 0.0, 1 / sum(float(b.target_weights.sum()) for b in case.batches)
    for batch in case.batches:
        out = model(batch)
        nll = (out.nll * batch.target_weights).sum()
        square = (out.log_partition.square() * batch.target_weights).sum()
        ((nll + Z_LOSS * square) * scale).backward()
        total += float(nll.detach())
    model.eval()
    text = torch.arange(case.settings.model.vocabulary_size) > 7
    with torch.no_grad():
        losses = model(case.batches[0], text)
    return total, {n: p.grad for n, p in model.named_parameters()}, losses


def pipelined(cases):
    """On each rank, for each case: loss, gradients, names it counts, held-out losses."""
    from megaarch.distributed.mesh import Grid
    from megaarch.parallel.pipeline_parallel import Pipeline
    from megaarch.parallel.stages import keep_stages

    found = []
    for case in cases:
        grid = Grid.build(case.settings.parallel, "cpu")
        with torch.device("meta"):
            model = case.model()
        keep_stages(model, grid.rank("pp"), case.settings)
        model.to_empty(device="cpu")
        initialize(model, 0)
        model.to(case.dtype).train()
        model.set_dropout_step(0, 3)
        pipeline = Pipeline(model, grid, case.settings)
        text = torch.arange(case.settings.model.vocabulary_size) > 7
        scale = 1 / sum(float(b.target_weights.sum()) for b in case.batches)
        steps, forwards = [], []
        count = partial(lambda into, *_: into.append(1), forwards)
        for _ in range(2):  # the second step runs on buffers that have been used
            model.zero_grad()
            hook = model.register_forward_hook(count)
            steps.append(float(pipeline.forward_backward(case.batches, scale)))
            hook.remove()
            losses = pipeline.evaluate(case.batches[0], text)
        assert steps[0] == steps[1], (case.name, steps)
        stages = case.settings.parallel.stages_per_rank
        assert len(forwards) == 2 * stages * len(case.batches), "a pass to learn shapes has run"
        grads = {n: p.grad for n, p in model.named_parameters()}
        counted = {n for n in grads if pipeline.counts(n)}
        found.append((steps[0], grads, counted, losses))
    return found


def compare(pool, ranks, cases, run=pipelined):
    for case, results in zip(cases, zip(*pool.run(ranks, run, cases), strict=True), strict=True):
        expected, reference, losses = one_process(case)
        bound, counted = PRECISION[case.dtype], []
        for loss, grads, counts, held_out in results:
            assert abs(loss - expected) <= bound * expected, case.name
            for name, grad in grads.items():
                error = (grad - reference[name]).norm()
                assert error <= bound * max(float(reference[name].norm()), 1e-6), (case.name, name)
            for ours, theirs in zip(held_out, losses, strict=True):
                assert torch.allclose(ours, theirs, rtol=bound, atol=bound), case.name
            counted += counts
        assert sorted(counted) == sorted(reference), case.name


PIPELINE = "parallel__pipeline_parallel"
SCHEDULE, EACH = "parallel__schedule", "parallel__stages_per_rank"
SHARDS = "parallel__data_parallel_shard"
EXACT = torch.float64


def test_every_preset_on_two_ranks(case, pool):
    cases = [
        case(preset, dtype, **{PIPELINE: 2, SCHEDULE: schedule, "model__tied_embedding": tied})
        for preset in PRESETS
        for schedule, dtype, tied in (("1f1b", EXACT, True), ("gpipe", torch.float32, False))
    ]
    compare(pool, 2, cases)


def test_every_preset_on_four_ranks(case, pool):
    kinds = [("1f1b", torch.float32, 5), ("gpipe", EXACT, 4)]
    cases = []
    for i, preset in enumerate(PRESETS):
        schedule, dtype, layers = kinds[i % 2]
        cases.append(case(preset, dtype, model__layers=layers, **{PIPELINE: 4, SCHEDULE: schedule}))
    compare(pool, 4, cases)


def test_several_stages_on_a_rank(case, pool):
    given = {PIPELINE: 2, SCHEDULE: "interleaved_1f1b"}
    cases = [case(preset, EXACT, model__layers=4, **{**given, EACH: 2}) for preset in PRESETS]
    cases.append(case("t5", model__layers=7, **{**given, EACH: 4}))
    compare(pool, 2, cases)


def test_zero_bubble(case, pool):
    given = {PIPELINE: 2, SCHEDULE: "zero_bubble"}
    cases = [
        case(
            preset, dtype, model__layers=layers, model__tied_embedding=tied, **{**given, EACH: each}
        )
        for preset in ("gpt", "t5", "xlnet")
        for dtype, layers, tied, each in (
            (EXACT, 3, True, 1),
            (EXACT, 4, True, 2),
            (torch.float32, 7, False, 3),
        )
    ]
    options = {"model__layers": 5, "model__position_encoding": "relative"}
    cases += [case("t5", EXACT, **options, **{**given, EACH: each}) for each in (1, 2)]
    deep = {"model__encoder_layers": 1, "model__decoder_layers": 7}  # memory passes through stages
    cases += [case("t5", EXACT, **deep, **{**given, EACH: each}) for each in (2, 3)]
    compare(pool, 2, cases)


OPTIONS = {
    "bias tables": {"position_encoding": "relative"},
    "bert": {
        "position_encoding": "learned",
        "normalization": "layernorm",
        "normalization_position": "post",
        "final_normalization": False,
        "bias": True,
        "activation": "gelu",
        "embedding_normalization": True,
        "head_transform": True,
        "output_bias": True,
        "segments": 2,
    },
    "dropout": {"dropout": 0.2, "kv_heads": 2},
    "uneven stacks": {"encoder_layers": 5, "decoder_layers": 2, "position_encoding": "relative"},
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_option_of_the_model(ranks, case, pool):
    cases = []
    for preset in ("t5", "gpt"):
        for options in OPTIONS.values():
            if preset == "t5" or "encoder_layers" not in options:
                given = {f"model__{name}": value for name, value in options.items()}
                cases.append(case(preset, EXACT, **({"model__layers": 3, PIPELINE: ranks} | given)))
    compare(pool, ranks, cases)


def combined(cases):
    """As `pipelined`, in any layout of four ranks; gradients whole."""
    from torch.distributed.tensor import DTensor

    from megaarch.distributed.mesh import Grid
    from megaarch.engine.native import NativeEngine

    found = []
    for case in cases:
        grid = Grid.build(case.settings.parallel, "cpu")
        engine = NativeEngine(case.settings, grid)
        engine.train()
        engine.model.set_dropout_step(0, 3)
        share = len(case.batches) // grid.data_ranks
        mine = case.batches[grid.data_rank * share :][:share]
        weight = sum(float(b.target_weights.sum()) for b in case.batches)
        loss = float(engine.forward_backward(mine, weight)) * weight
        grads = {
            n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for n, p in engine.model.named_parameters()
        }
        counted = {n for n in grads if engine.pipeline.counts(n)}
        text = torch.arange(case.settings.model.vocabulary_size) > 7
        with torch.no_grad():
            losses = engine(case.batches[0], text)
        first = all(grid.rank(axis) == 0 for axis in ("dp_shard", "cp", "tp"))
        found.append((loss, grads, counted if first else set(), losses))
    return found


@pytest.mark.parametrize("axis", ["data_parallel_shard", "tensor_parallel", "context_parallel"])
def test_with_another_axis(axis, case, pool):
    schedules = [
        {SCHEDULE: "1f1b"},
        {SCHEDULE: "interleaved_1f1b", EACH: 2},
        {SCHEDULE: "zero_bubble", EACH: 2},
    ]
    cases = [
        case(preset, model__layers=4, **deep, **{PIPELINE: 2, f"parallel__{axis}": 2} | schedule)
        for preset, deep, given in (
            ("gpt", {}, schedules[:2]),
            ("t5", {"model__encoder_layers": 1, "model__decoder_layers": 6}, schedules),
            ("xlnet", {}, schedules[2:]),
        )
        for schedule in given
    ]
    compare(pool, 4, cases, combined)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("preset", ["gpt", "t5", "bert"])
def test_no_split_has_a_cheaper_most_expensive_stage(preset, stages, tiny):
    options = {"decoder_layers": 4} if preset == "t5" else {}
    given = {f"model__{name}": value for name, value in options.items()}
    settings = tiny(preset, model__layers=7, **given)
    lengths, targets = row_shape(settings)
    costs = layer_costs(settings.model, lengths, targets)
    layers = split(settings.model, stages, lengths, targets)
    assert [i for r in layers for i in r] == list(range(len(costs))) and all(layers)
    splits = itertools.combinations(range(1, len(costs)), stages - 1)
    least = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))
        for cuts in splits
    )
    assert max(sum(costs[i] for i in r) for r in layers) == pytest.approx(least, rel=1e-12)


def test_costs_of_all_layers_are_the_flops_of_a_row(tiny):
    model = tiny("t5", model__encoder_layers=3, model__decoder_layers=5).model
    costs = layer_costs(model, (48, 16), 16)
    counts = Counts(1, (48, 16), (48 * 48, 16 * 16 // 2), (0, 48 * 16), 16, (48, 16))
    embedding = 2 * (48 + 16) * model.hidden_size
    assert sum(costs) == flops.forward(model, counts).total + embedding
    assert costs[4] < costs[1] and costs[4] != costs[3] and costs[7] > costs[6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({PIPELINE: 3}, "more stages than the model's 2 layers"),
        ({EACH: 2, SCHEDULE: "interleaved_1f1b"}, "are of a pipeline, and there is none"),
        ({PIPELINE: 2, EACH: 2, "model__layers": 4}, "1f1b runs one stage on a rank"),
        ({PIPELINE: 2, SCHEDULE: "interleaved_1f1b"}, "needs 2 or more"),
        ({PIPELINE: 2, SCHEDULE: "zero_bubble", "parallel__recompute": "full"}, "recompute twice"),
        ({PIPELINE: 2, SCHEDULE: "zero_bubble", "training__compile": True}, "cannot split"),
        (
            {
                PIPELINE: 2,
                SCHEDULE: "zero_bubble",
                SHARDS: 2,
                "parallel__reshard_after_forward": True,
            },
            "take the same parameters, which stay gathered",
        ),
        ({PIPELINE: 2, "training__micro_batch_size": 8}, "as many micro-batches"),
        (
            {
                PIPELINE: 2,
                SCHEDULE: "zero_bubble",
                SHARDS: 2,
                "training__precision": "bf16",
                "model__normalization_position": "post",
            },
            "needs two micro-batches a step at least",
        ),
        (
            {PIPELINE: 2, SCHEDULE: "zero_bubble", "training__global_batch_size": 20},
            "5 do not divide: make them a multiple of 2",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(given, message, tiny):
    with pytest.raises(ConfigError, match=message):
        check(tiny(**given))


def test_a_schedule_without_a_pipeline_keeps_nothing_from_being_compiled(tiny):
    gpu = torch.device("cuda")
    assert compile.wanted(tiny(**{SCHEDULE: "zero_bubble"}), gpu)
    assert not compile.wanted(tiny(**{SCHEDULE: "zero_bubble", PIPELINE: 2}), gpu)
