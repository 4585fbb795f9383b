"""Tensor parallelism against one process: every preset, every optional piece, few key heads."""

import copy
import dataclasses

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megaarch import config
from megaarch.config import schema
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.distributed.mesh import Grid
from megaarch.model import initialize, loss
from megaarch.parallel import compile, context_parallel, parallelize, tensor_parallel
from megaarch.parallel.gradients import sum_summands
from tests.conftest import PRESETS

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative L2 of a parameter's gradient
TARGET_LENGTH = {"t5": 24, "ul2": 32, "bart": 48}
BERT = {
    "segments": 2,
    "head_transform": True,
    "output_bias": True,
    "bias": True,
    "normalization": "layernorm",
    "normalization_position": "post",
    "activation": "gelu",
}
CASES = {preset: (preset, {}) for preset in PRESETS} | {
    "relative bias": (
        "t5",
        {"position_encoding": "relative", "relative_buckets": 8, "tied_embedding": False},
    ),
    "one key head": ("t5", {"kv_heads": 1, "bias": True}),
    "as many key heads": ("xlnet", {"kv_heads": 4}),
    "learned positions, untied": (
        "glm",
        {"position_encoding": "learned", "tied_embedding": False, "output_bias": True},
    ),
    "BERT's options": ("bert", BERT | {"position_encoding": "learned"}),
    "dropout": (
        "bart",
        {"dropout": 0.2, "embedding_normalization": True, "position_encoding": "learned"},
    ),
    "fused kernels": ("gpt", {"fused_kernels": ["rms_norm", "cross_entropy"], "output_bias": True}),
    "all padding on one rank": ("gpt", {"output_scale": 0.5, "vocabulary_size": 520}),
}

TOGETHER = {
    "data_parallel_shard": ("gpt", "relative bias", "BERT's options", "fused kernels"),
    "context_parallel": ("relative bias", "one key head", "dropout"),
}


def make(raw, prepared, preset, options):
    """Settings and two micro-batches of a tiny run."""
    mine = copy.deepcopy(raw)
    mine["model"] |= {"preset": preset, **options}
    if preset in TARGET_LENGTH:
        mine["model"]["target_length"] = TARGET_LENGTH[preset]
    resolved = config.resolve(mine)
    rows = Rows(resolved.model, resolved.data, prepared, 0)
    batches = Steps(rows, global_batch_size=4, micro_batch_size=2)[0]
    if options.get("segments"):
        batches = [with_segments(batch) for batch in batches]
    return resolved, batches


def with_segments(batch):
    (stream,) = batch.streams
    kinds = torch.arange(stream.tokens.shape[1]).expand_as(stream.tokens) % 5 // 3
    return dataclasses.replace(
        batch, streams=(dataclasses.replace(stream, segments=kinds.contiguous()),)
    )


@pytest.fixture(scope="session")
def cases(raw, prepared):
    return {name: make(raw, prepared, *case) for name, case in CASES.items()}


def run(given, batches, dtype, grid=None, half=False):
    """Gradients by name, losses of `batches`, and the model; forward passes come first.

    Data ranks take turns at the batches; their gradients are averaged, hence the factor.
    """
    torch.set_default_dtype(dtype)  # this process runs nothing else
    if grid is None:
        model = parallelize.build_model(given.model, given.data.objective)
        initialize(model, 0)
    else:
        model = parallelize.build(given, grid)
        batches = [
            context_parallel.local_batch(b, grid)
            for b in batches[grid.data_rank :: grid.data_ranks]
        ]
    model.train()
    model.compute_dtype = torch.bfloat16 if half else None
    model.set_dropout_step(0, 3)
    text = torch.arange(given.model.vocabulary_size) % 7 > 0
    found = [model(batch, text) for batch in batches]
    scale = 1 if grid is None else grid.gradient_ranks
    for losses, batch in zip(found, batches, strict=True):
        penalty = 1e-2 * losses.log_partition.square()
        (scale * (losses.nll + penalty) * batch.target_weights).sum().backward()
    sum_summands(model)
    for name, p in model.named_parameters():
        assert grid is None or p.grad.placements == p.placements, name
    if grid is not None:
        found = [context_parallel.gather(losses, grid) for losses in found]
    return {name: p.grad for name, p in model.named_parameters()}, found, model


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = (x.full_tensor() if isinstance(x, DTensor) else x for x in (found, wanted))
    return float(((found - wanted).norm() / wanted.norm()).detach())


def differences(given, batches, dtype, grid, half=False):
    """The largest relative L2 of a gradient, with its name; that of all gradients' norm; that of
    the losses."""
    wanted, wanted_losses, _ = run(given, batches, dtype, half=half)
    gradients, losses, _ = run(given, batches, dtype, grid, half)
    worst = max((relative(gradients[n], wanted[n]), n) for n in wanted)
    norms = (torch.nn.utils.get_total_norm(g.values()) for g in (gradients, wanted))
    mine = wanted_losses[grid.data_rank :: grid.data_ranks]
    pairs = [pair for both in zip(losses, mine, strict=True) for pair in zip(*both, strict=True)]
    return worst, relative(*norms), max(relative(*pair) for pair in pairs)


def all_differences(cases, parallel, dtype):
    grid = Grid.build(schema.Parallel(**parallel), "cpu")
    return {name: differences(*case, dtype, grid) for name, case in cases.items()}


def check(ranks, cases, dtype):
    for found in ranks:
        assert found.keys() == cases.keys()
        for name, ((gradient, parameter), norm, losses) in found.items():
            assert gradient < LIMITS[dtype], f"{name}, {parameter}: {gradient}"
            assert max(norm, losses) < LIMITS[dtype], f"{name}: {norm}, {losses}"


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (4, torch.float64)], ids=str)
def test_gradients_and_losses_are_those_of_one_process(pool, cases, ranks, dtype):
    """Four ranks share two key heads, or one."""
    if ranks == 4:
        cases = {n: case for n, case in cases.items() if n not in PRESETS or n in ("t5", "glm")}
    found = pool.run(ranks, all_differences, cases, {"tensor_parallel": ranks}, dtype)
    check(found, cases, dtype)


@pytest.mark.parametrize("axis", TOGETHER)
def test_together_with_another_axis(pool, cases, axis):
    cases = {name: cases[name] for name in TOGETHER[axis]}
    parallel = {"tensor_parallel": 2, axis: 2}
    check(pool.run(4, all_differences, cases, parallel, torch.float64), cases, torch.float64)


def in_half_precision(given, batches):
    grid = Grid.build(schema.Parallel(tensor_parallel=2), "cpu")
    return differences(given, batches, torch.float32, grid, half=True)


def test_bf16_is_that_of_one_process(pool, cases):
    case = cases["one key head"]
    for (gradient, parameter), norm, losses in pool.run(2, in_half_precision, *case):
        assert gradient < 0.05, parameter
        assert max(norm, losses) < 2**-8  # a rounding to bfloat16


def placements(given, batches):
    grid = Grid.build(schema.Parallel(tensor_parallel=4), "cpu")
    model = parallelize.build(given, grid)
    whole = {n for n, p in model.named_parameters() if p.placements[0].is_replicate()}
    shares = {n: p.to_local().numel() / p.numel() for n, p in model.named_parameters()}
    return {n for n, share in shares.items() if share == 1} == whole, whole, set(shares.values())


def test_what_is_split(pool, cases):
    """All but norms, small tables, row-wise biases and BERT's head transform."""
    kept = ("norm.weight", "norm.bias", "positions.", "segments.", "head_transform.dense")
    kept += ("output.bias", "down.bias")
    for name in ("one key head", "BERT's options", "relative bias"):
        for agree, whole, shares in pool.run(4, placements, *cases[name]):
            assert agree and shares == {1.0, 0.25}
            assert all(any(k in parameter for k in kept) for parameter in whole), whole


def kept_of_all_ranks(given, batches, compiled):
    """For each stack, what its layers keep of the model's width of more tokens than this rank's: (tokens,
    address) of each tensor; and the tokens of the stack's micro-batch."""
    if compiled:
        compile.BACKEND = "aot_eager"
    model = parallelize.build(given, Grid.build(schema.Parallel(tensor_parallel=2), "cpu"))
    if compiled:
        compile.apply(model)
    width, batch = given.model.hidden_size, batches[0]
    tokens = [stream.tokens.numel() for stream in batch.streams]
    weights = {p.to_local().untyped_storage().data_ptr() for p in model.parameters()}
    found = [set() for _ in model.stacks]

    def watched(forward, stack):
        def keep(x):
            here = x[..., 0].numel() if x.shape[-1:] == (width,) else 0
            weight = x.untyped_storage().data_ptr() in weights or here not in tokens
            if here > tokens[stack] // 2 and not weight:
                found[stack].add((here, x.data_ptr()))
            return x

        def run(*args):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                return forward(*args)

        return run

    for index, stack in enumerate(model.stacks):
        for layer in stack.layers:
            module = model.layers[str(layer)]
            module.forward = watched(module.forward, index)
    losses = model(batch)
    (losses.nll * batch.target_weights).sum().backward()
    return [[size for size, _ in kept] for kept in found], tokens


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["gpt", "t5", "one key head"])
def test_layers_keep_a_share_of_the_tokens(pool, cases, name, compiled):
    """No rank keeps all of them for a column-wise product; of an encoder's output, once for all layers."""
    for kept, tokens in pool.run(2, kept_of_all_ranks, *cases[name], compiled):
        assert kept == ([[]] if name == "gpt" else [[], tokens[:1]])


def cross_entropies(rows, kept_bytes, dtype):
    """Largest difference from one process, of losses and gradients; ids from 250 on are padding, and all
    of the last rank's."""
    loss.CPU = loss.CPU._replace(kept=kept_bytes)
    mesh = Grid.build(schema.Parallel(tensor_parallel=4), "cpu").submesh("tp")
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (3 * torch.randn(s, generator=g, dtype=dtype)).requires_grad_()
        for s in ((rows, 16), (384, 16), (384,))
    )
    target = torch.randint(0, 250, (rows,), generator=g)
    upstream = torch.randn(2, rows, generator=g, dtype=dtype)
    options = {"vocabulary_size": 250, "chunk_rows": 128}
    options["text_tokens"] = torch.arange(250) % 3 > 0
    wanted = loss.cross_entropy(hidden, weight, bias, target, **options)
    gradients = torch.autograd.grad(wanted[:2], [hidden, weight, bias], list(upstream))
    split = [
        distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)
    ]
    sharding = tensor_parallel.TensorSharding(mesh, frozenset())
    weight_share, bias_share = (sharding.local(x) for x in split)
    options |= sharding.vocabulary(len(weight_share))
    found = loss.cross_entropy(hidden, weight_share, bias_share, target, **options)
    ours = torch.autograd.grad(found[:2], [hidden, *split], list(upstream))
    pairs = zip((*found, *ours), (*wanted, *gradients), strict=True)
    pairs = [(x.full_tensor() if isinstance(x, DTensor) else x, y) for x, y in pairs]
    return max(float((x - y).abs().max()) if x.numel() else 0.0 for x, y in pairs)


def all_cross_entropies():
    sizes = [(300, 1 << 30), (300, 0), (300, 200_000), (0, 0)]  # all chunks kept, none, some
    return [cross_entropies(*size, torch.float64) for size in sizes]


def test_cross_entropy_split_by_vocabulary(pool):
    for found in pool.run(4, all_cross_entropies):
        assert max(found) < 1e-11, found
