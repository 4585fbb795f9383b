"""Context parallelism against one process: every preset, every kind of position, few key heads."""

import copy
import dataclasses
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch import config
from megaarch.config import schema
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import NativeEngine
from megaarch.model import initialize
from megaarch.parallel import context_parallel, fsdp, recompute, tensor_parallel
from megaarch.parallel.gradients import sum_summands
from megaarch.parallel.parallelize import build_model
from tests.conftest import PRESETS
from tests.distributed import runs
from tests.distributed.layouts import DEEPER

LAYOUTS = {
    "cp2": schema.Parallel(context_parallel=2),
    "cp4": schema.Parallel(context_parallel=4),
    "cp2 x tp2": schema.Parallel(context_parallel=2, tensor_parallel=2),
}
MESSAGES = ("_c10d_functional::reduce_scatter_tensor", "_c10d_functional::all_to_all_single")
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative L2 of a parameter's gradient
TARGET_LENGTH = {"t5": 24, "ul2": 32, "bart": 48}
RELATIVE = {"position_encoding": "relative", "relative_buckets": 8, "relative_max_distance": 16}
CASES = {preset: (preset, {}) for preset in PRESETS} | {
    "relative bias": ("t5", RELATIVE),
    "relative bias, tokens out of order": ("xlnet", RELATIVE | {"kv_heads": 1}),
    "one key head": ("t5", {"kv_heads": 1}),
    "three key heads": ("prefix_lm", {"heads": 12, "kv_heads": 3, "head_size": 8}),
    "learned positions": ("glm", {"position_encoding": "learned"}),
    "segments and a head transform": (
        "bert",
        {"segments": 2, "head_transform": True, "output_bias": True, "bias": True},
    ),
    "dropout": ("bart", {"dropout": 0.2, "embedding_normalization": True}),
}


def make(raw, prepared, preset, options):
    """Settings and the first micro-batch of a tiny run."""
    mine = copy.deepcopy(raw)
    mine["model"] |= {"preset": preset, **options}
    if preset in TARGET_LENGTH:
        mine["model"]["target_length"] = TARGET_LENGTH[preset]
    resolved = config.resolve(mine)
    rows = Rows(resolved.model, resolved.data, prepared, 0)
    batch = Steps(rows, global_batch_size=3, micro_batch_size=3)[0][0]
    if options.get("segments"):
        (stream,) = batch.streams
        kinds = torch.arange(stream.tokens.shape[1]).expand_as(stream.tokens) % 5 // 3
        batch = dataclasses.replace(
            batch, streams=(dataclasses.replace(stream, segments=kinds.contiguous()),)
        )
    return resolved, batch


@pytest.fixture(scope="session")
def cases(raw, prepared):
    return {name: make(raw, prepared, *case) for name, case in CASES.items()}


def run(given: schema.Settings, batch, dtype, grid=None, mode="none", half=False):
    """Gradients by name and losses [B, M], whole, of one micro-batch."""
    model = build_model(given.model, given.data.objective)
    initialize(model, 0)
    model.to(dtype).train()
    model.compute_dtype = torch.bfloat16 if half else None
    model.set_dropout_step(0, 3)
    if grid is not None:
        tensor_parallel.apply(model, grid, given)
        context_parallel.apply(model, grid)
        recompute.apply(model, mode)
        batch = context_parallel.local_batch(batch, grid)
    losses = model(batch)
    penalty = 1e-2 * losses.log_partition.square()
    ((losses.nll + penalty) * batch.target_weights).sum().backward()
    sum_summands(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if grid is not None:
        if grid.size("tp") > 1:
            gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        for gradient in gradients.values():
            distributed.all_reduce(gradient, group=grid.group("cp"))
        losses = context_parallel.gather(losses, grid)
    return gradients, losses


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def largest_differences(cases, parallel, dtype):
    """By case: the largest relative L2 of a gradient, with its name, and that of the losses."""
    grid, found = Grid.build(parallel, torch.device("cpu")), {}
    for name, (given, batch) in cases.items():
        wanted, wanted_losses = run(given, batch, dtype)
        gradients, losses = run(given, batch, dtype, grid, parallel.recompute)
        assert gradients.keys() == wanted.keys()
        worst = max((relative(gradients[n], wanted[n]), n) for n in wanted)
        pairs = list(zip(losses[:2], wanted_losses[:2], strict=True))
        found[name] = worst, max(relative(*pair) for pair in pairs)
    return found


def check(differences, names, dtype):
    assert differences.keys() == names
    for name, ((gradient, parameter), losses) in differences.items():
        assert gradient < LIMITS[dtype], f"{name}, {parameter}: {gradient}"
        assert losses < LIMITS[dtype], f"{name}: {losses}"


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("cp2", torch.float32), *((layout, torch.float64) for layout in LAYOUTS)],
    ids=str,
)
def test_gradients_and_losses_are_those_of_one_process(pool, cases, layout, dtype):
    parallel, fitting = LAYOUTS[layout], dict(cases)
    if parallel.tensor_parallel > 1:
        del fitting["three key heads"]  # which tensor parallelism cannot split
    ranks = parallel.context_parallel * parallel.tensor_parallel
    for differences in pool.run(ranks, largest_differences, fitting, parallel, dtype):
        check(differences, fitting.keys(), dtype)


class Sent(TorchDispatchMode):
    """Counts the messages between ranks by their operator. (torch's CommDebugMode follows modules, and fails
    under a checkpoint.)"""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def messages(given, batch, parallel):
    """How many messages of each kind a micro-batch sends, by way to recompute."""
    grid, found = Grid.build(parallel, torch.device("cpu")), {}
    for mode in ("none", "selective", "full"):
        with Sent() as sent:
            run(given, batch, torch.float32, grid, mode)
        found[mode] = sent.counts
    return found


def test_selective_recomputation_sends_only_gathers_again(pool, cases):
    for found in pool.run(4, messages, *cases["t5"], LAYOUTS["cp2 x tp2"]):
        once, again = found["none"], found["full"]
        for name in MESSAGES:
            assert 0 < once[name] == found["selective"][name] < again[name], name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_equal_one_process(pool, cases, mode):
    some = {name: cases[name] for name in ("gpt", "t5", "xlnet", "relative bias", "dropout")}
    parallel = LAYOUTS["cp2 x tp2"].model_copy(update={"recompute": mode})
    for differences in pool.run(4, largest_differences, some, parallel, torch.float64):
        check(differences, some.keys(), torch.float64)


def sharded(given, batch):
    """The largest relative L2 of a gradient, with its name, for each way to recompute; parameters
    are sharded over four ranks, two of them of context parallelism."""
    parallel = schema.Parallel(context_parallel=2, data_parallel_shard=2)
    grid, found = Grid.build(parallel, torch.device("cpu")), {}
    wanted, _ = run(given, batch, torch.float64)
    for mode in ("none", "selective", "full"):
        model = build_model(given.model, given.data.objective)
        initialize(model, 0)
        model.double().train()
        model.set_dropout_step(0, 3)
        context_parallel.apply(model, grid)
        recompute.apply(model, mode)
        fsdp.shard(model, grid, given.model_copy(update={"parallel": parallel}))
        losses = model(context_parallel.local_batch(batch, grid))
        penalty = 1e-2 * losses.log_partition.square()
        ranks = grid.size("cp")  # gradients are means over four, and two pairs have the same rows
        (ranks * (losses.nll + penalty) * batch.target_weights).sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        assert gradients.keys() == wanted.keys()
        found[mode] = max((relative(gradients[name], wanted[name]), name) for name in wanted)
    return found


def test_under_sharded_parameters(pool, cases):
    for found in pool.run(4, sharded, *cases["dropout"]):
        for mode, (difference, parameter) in found.items():
            assert difference < 1e-10, (mode, parameter, difference)


def in_half_precision(given, batch):
    grid = Grid.build(LAYOUTS["cp2"], torch.device("cpu"))
    _, wanted = run(given, batch, torch.float32, half=True)
    _, losses = run(given, batch, torch.float32, grid, half=True)
    return relative(losses.nll, wanted.nll)


def test_bf16_is_that_of_one_process(pool, cases):
    assert max(pool.run(2, in_half_precision, *cases["t5"])) < 1e-3


def place(rank, ranks):
    """A rank's place, without processes."""
    return SimpleNamespace(rank=lambda axis: rank, size=lambda axis: ranks)


@pytest.mark.parametrize("name", ["gpt", "t5", "segments and a head transform"])
def test_shards_hold_every_token_and_every_target_once(cases, name):
    _, batch = cases[name]
    shards = [context_parallel.local_batch(batch, place(rank, 4)) for rank in range(4)]
    for s, stream in enumerate(batch.streams):
        parts = [shard.streams[s] for shard in shards]
        assert torch.cat([p.tokens for p in parts], 1).equal(stream.tokens)
        assert torch.cat([p.token_positions for p in parts], 1).equal(stream.positions)
        if stream.segments is not None:
            assert torch.cat([p.segments for p in parts], 1).equal(stream.segments)
    used = [shard.head_rows[: shard.head_count] for shard in shards]
    assert torch.cat(used).sort().values.equal(batch.head_rows[: batch.head_count].sort().values)
    tokens = batch.streams[-1].tokens
    share = tokens.shape[1] // 4
    for rank, (shard, rows) in enumerate(zip(shards, used, strict=True)):
        assert len(shard.head_rows) % 128 == 0 < len(shard.head_rows)
        padded = [pad(other.streams[-1].tokens, (0, -share % 4)) for other in shards]
        dealt = torch.cat([held[:, (rank - r) % 4 :: 4] for r, held in enumerate(padded)], 1)
        held = dealt.gather(1, shard.target_index)
        assert held.flatten()[rows].equal(tokens.gather(1, batch.target_index).flatten()[rows])


@pytest.mark.parametrize("preset", ["prefix_lm", "glm", "xlnet", "t5", "gpt"])
def test_every_rank_has_its_share_of_the_head_s_rows(preset, raw, prepared):
    """Targets stand together; the last ranks would have all of them."""
    _, batch = make(raw, prepared, preset, {"sequence_length": 192})
    counts = [context_parallel.local_batch(batch, place(r, 4)).head_count for r in range(4)]
    assert sum(counts) == batch.head_count > 40
    assert max(counts) - min(counts) <= 0.3 * sum(counts) / 4, counts


def test_rows_that_do_not_divide_are_told(cases):
    with pytest.raises(ValueError, match="48 tokens does not divide among 5 ranks"):
        context_parallel.local_batch(cases["gpt"][1], place(0, 5))


def test_the_loader_makes_shards_and_the_step_copies_them_as_they_are(
    raw, prepared, cases, monkeypatch
):
    given, whole = cases["t5"]
    engine = SimpleNamespace(grid=place(1, 4))
    rows = Rows(given.model, given.data, prepared, 0)
    shard = partial(NativeEngine.shard, engine)
    batch = Steps(rows, global_batch_size=3, micro_batch_size=3, shard=shard)[0][0]
    wanted = context_parallel.local_batch(whole, engine.grid)
    assert batch.head_rows.equal(wanted.head_rows) and batch.counts == whole.counts
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    pinned = batch.pin_memory()
    assert NativeEngine.shard(engine, pinned) is pinned  # nothing is left to do in the step
    for stream, other in zip(pinned.streams, wanted.streams, strict=True):
        assert stream.tokens.is_contiguous() and stream.tokens.equal(other.tokens)


def whole_batch(given, batch):
    grid = Grid.build(LAYOUTS["cp2"], torch.device("cpu"))
    model = build_model(given.model, given.data.objective)
    context_parallel.apply(model, grid)
    with pytest.raises(AssertionError, match="shards of"):
        model(batch)


EXCHANGES = 2  # of an attention, each way: queries, keys and values; and its output
OF_MEMORY = 3  # queries; keys and values, of another length; and its output


def compiled(raw, prepared, preset, batches):
    """All-to-alls in the forward and the backward graphs of each kind of layer, how many graphs
    there are once each batch is done, and where these break."""
    torch._dynamo.reset()
    counters.clear()
    found = {"forward": [], "backward": []}

    def count(way, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        found[way].append(sum("all_to_all_single" in target for target in targets))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(count, "forward"), bw_compiler=partial(count, "backward")
    )
    given = {"parallel.context_parallel": 2, "training.global_batch_size": 2}
    resolved = runs.settings_of(raw, preset, given | DEEPER)
    grid = Grid.build(resolved.parallel, torch.device("cpu"))
    model = build_model(resolved.model, resolved.data.objective)
    initialize(model, 0)
    context_parallel.apply(model, grid)
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    rows = Rows(resolved.model, resolved.data, prepared, 0)
    steps, graphs = Steps(rows, global_batch_size=2, micro_batch_size=2), []
    for number in range(batches):
        model(context_parallel.local_batch(steps[number][0], grid)).nll.sum().backward()
        graphs.append(len(found["forward"]))
    return found, graphs, dict(counters["graph_break"])


@pytest.mark.parametrize(
    ("preset", "exchanges"),
    [("prefix_lm", [EXCHANGES]), ("t5", [EXCHANGES, EXCHANGES + OF_MEMORY])],
)
def test_the_exchange_is_part_of_a_layers_graph(pool, raw, prepared, preset, exchanges):
    for found, graphs, breaks in pool.run(2, compiled, raw, prepared, preset, 20):
        assert not breaks
        assert found["forward"] == exchanges and sorted(found["backward"]) == exchanges
        assert graphs == [len(exchanges)] * 20, graphs


def test_a_batch_that_is_not_a_shard_is_refused(pool, cases):
    pool.run(2, whole_batch, *cases["gpt"])
