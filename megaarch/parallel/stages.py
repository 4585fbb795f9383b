"""The stages of a pipeline: their layers, their ranks, and the parameters that they need.

A stage is a contiguous range of global layer indices, encoder first. Costs are forward FLOPs:
encoder and decoder layers differ, and the head belongs to the last stage.

    t5, 4 + 4 layers, 4 stages on 2 ranks        looped          V (zero bubble)
    encoder 0 1 2 | 3     decoder 4 5 6 | 7      0 | 1 | 0 | 1   0 | 1 | 1 | 0
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from megaarch.config import ConfigError
from megaarch.config.cached import cached
from megaarch.config.schema import Model, Settings
from megaarch.data.batch import Counts
from megaarch.data.row_lengths import segmentations
from megaarch.model import flops
from megaarch.model.transformer import Transformer, overlap, stacks

# schedules of one stage on a rank, which take that; the others take a list
ONE_STAGE = ("gpipe", "1f1b")


@dataclass(frozen=True)
class Stages:
    """layers: those of each stage. ranks: the pipeline rank that runs each stage."""

    layers: tuple[range, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, settings: Settings) -> "Stages":
        """Returns the stages of a run, the same on every rank. ConfigError for what does not fit."""
        check(settings)
        ranks, each = settings.parallel.pipeline_parallel, settings.parallel.stages_per_rank
        layers = split(settings.model, ranks * each, *row_shape(settings))
        order = list(range(ranks)) * each
        if is_v(settings):
            order = [*range(ranks), *reversed(range(ranks))]
        return cls(layers, tuple(order))

    def on(self, rank: int) -> list[int]:
        """Returns the stages that this pipeline rank runs."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def holders(self, name: str, model: Model) -> tuple[int, ...]:
        """Returns the pipeline ranks that hold the parameter of this global name, in order."""
        pairs = zip(self.layers, self.ranks, strict=True)
        return tuple(sorted({rank for layers, rank in pairs if needs(name, model, layers)}))


def is_v(settings: Settings) -> bool:
    """Whether the stages go down the ranks and come back, so that rank 0 has first and last."""
    return settings.parallel.schedule == "zero_bubble" and settings.parallel.stages_per_rank == 2


def check(settings: Settings) -> None:
    """Raises ConfigError for a pipeline that is impossible."""
    if found := list(problems(settings)):
        raise ConfigError(found)


def problems(settings: Settings) -> Iterator[str]:
    """Yields a sentence for each setting that does not fit the pipeline."""
    parallel, training = settings.parallel, settings.training
    ranks, each = parallel.pipeline_parallel, parallel.stages_per_rank
    schedule = parallel.schedule
    if ranks == 1:
        if each > 1:
            yield (
                f"parallel.stages_per_rank: {each} stages on a rank are of a pipeline, and there is "
                "none: set parallel.pipeline_parallel, or leave it out"
            )
        return
    layers = stacks(settings.model)[-1].layers.stop
    if ranks * each > layers:
        yield (
            f"parallel.pipeline_parallel: {ranks} ranks of {each} stage(s) are more stages than "
            f"the model's {layers} layers: lower it or parallel.stages_per_rank"
        )
    if schedule in ONE_STAGE and each > 1:
        yield (
            f"parallel.stages_per_rank: {schedule} runs one stage on a rank, not {each}: take "
            "schedule interleaved_1f1b or zero_bubble"
        )
    if schedule == "interleaved_1f1b" and each == 1:
        yield "parallel.stages_per_rank: interleaved_1f1b needs 2 or more; take schedule 1f1b"
    yield from _schedule_problems(settings)
    if schedule == "zero_bubble" and parallel.recompute != "none":
        yield (
            "parallel.recompute: zero_bubble runs each backward pass twice and would recompute "
            "twice too; use another schedule or recompute none"
        )
    if schedule == "zero_bubble" and parallel.gathers_again:
        yield (
            "parallel.reshard_after_forward: both backward passes of zero_bubble take the same parameters, "
            "which stay gathered: leave it out, or take another schedule"
        )
    if is_v(settings) and torch.__version__ < "2.13":
        yield (
            "parallel.stages_per_rank: zero_bubble with 2 hands from a stage to the next one on the "
            "same rank, which torch before 2.13 cannot: take 1, or another schedule"
        )
    if schedule == "zero_bubble" and training.compile:
        yield "training.compile: zero_bubble cannot split the backward pass of compiled layers"


def _schedule_problems(settings: Settings) -> Iterator[str]:
    """Yields what is wrong with the number of micro-batches, where rows give it. Tokens give one that
    every schedule runs."""
    parallel, training = settings.parallel, settings.training
    if training.global_batch_tokens is not None:
        return
    ranks, schedule = parallel.pipeline_parallel, parallel.schedule
    data_ranks = parallel.data_ranks
    batches = training.global_batch_size // (training.micro_batch_size * data_ranks)
    if schedule == "1f1b" and batches < ranks:
        yield (
            f"parallel.schedule: 1f1b on {ranks} ranks needs as many micro-batches a step, not "
            f"{batches}: raise training.global_batch_size or take gpipe"
        )
    # torch's second half of a backward pass runs FSDP's hook between two gradients of a layer that normalizes
    # behind its branches: the first is then summed in fp32, and the other only by the next micro-batch
    summed = training.precision == "bf16" and data_ranks * parallel.context_parallel > 1
    post = settings.model.normalization_position == "post"
    if schedule == "zero_bubble" and batches == 1 and summed and post:
        yield (
            "parallel.schedule: zero_bubble on several data ranks needs two micro-batches a step at least "
            "where model.normalization_position is post and training.precision bf16: raise "
            "training.global_batch_size or take gpipe"
        )
    rounds = max(1, batches // ranks)
    if schedule in ("interleaved_1f1b", "zero_bubble") and not is_v(settings) and batches % rounds:
        yield (
            f"parallel.schedule: {schedule} on {ranks} ranks runs micro-batches in {rounds} rounds "
            f"and {batches} do not divide: make them a multiple of {ranks}"
        )


def needs(name: str, model: Model, layers: range) -> bool:
    """Whether the stage of these layers needs the parameter (or module) of this global name."""
    kind, _, rest = name.partition(".")
    key = rest.partition(".")[0]
    all_stacks = stacks(model)
    begun = [s.stream for s in all_stacks if s.layers.start in layers]
    last = all_stacks[-1].layers.stop == layers.stop
    if kind == "layers":
        return int(key) in layers
    if kind in ("positions", "embedding_norm"):
        return key in begun
    if kind == "relative_bias":
        return any(s.stream == key and overlap(s.layers, layers) for s in all_stacks)
    if kind == "segments":
        return bool(begun)
    if kind == "embedding":
        return bool(begun) or (last and model.tied_embedding)
    if kind == "encoder_norm":
        return len(all_stacks) > 1 and all_stacks[1].stream in begun
    assert kind in ("norm", "head_transform", "output", "output_bias"), name
    return last


def keep_stages(model: Transformer, rank: int, settings: Settings) -> None:
    """Leaves in `model`, in place, what the stages of this pipeline rank need. Names stay global.

    All stages of a rank share the model, so a tied embedding is one parameter on a rank. The model may
    be on meta and have its tensor plan; shard it afterwards. ConfigError for stages that do not fit.
    """
    stages = Stages.of(settings)
    ranges = [stages.layers[stage] for stage in stages.on(rank)]

    def kept(name: str) -> bool:
        return any(needs(name, model.settings, layers) for layers in ranges)

    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleDict | nn.ParameterDict):
            for key in list(child.keys()):
                if not kept(f"{name}.{key}"):
                    del child[key]
        elif not kept(name):
            setattr(model, name, None)
    if model.output_bias is not None and not kept("output_bias"):
        model.output_bias = None


def row_shape(settings: Settings) -> tuple[tuple[int, ...], int]:
    """Returns the mean tokens of each stream and the mean targets of a row, as settings predict them."""
    model, data = settings.model, settings.data
    if data.objective == "supervised":
        lengths = (model.sequence_length, model.target_length or model.sequence_length)
        lengths = lengths[: len(stacks(model))]
        return lengths, lengths[-1]
    shapes = [(share, row.shape) for share, row in segmentations(model, data)]
    streams = zip(*([share * n for n in shape.streams] for share, shape in shapes), strict=True)
    return tuple(round(sum(s)) for s in streams), round(sum(s * x.targets for s, x in shapes))


@cached(1024)
def split(model: Model, stages: int, lengths: tuple[int, ...], targets: int) -> tuple[range, ...]:
    """Returns the layers of each stage: contiguous, none empty, the most expensive stage as cheap
    as can be, and among such splits the most even one.

    lengths, targets: tokens of each stream and targets of a row.
    """
    costs = layer_costs(model, lengths, targets)
    count = len(costs)
    assert 1 <= stages <= count, f"{stages} stages of {count} layers"
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[i]: (most expensive stage, sum of squares, where the stages begin) of the first i layers
    best = {i: (before[i], before[i] ** 2, (0,)) for i in range(1, count + 1)}
    for stage in range(1, stages):
        shorter, best = best, {}
        for stop in range(stage + 1, count + 1):
            for start in range(stop - 1, stage - 1, -1):
                cost = before[stop] - before[start]
                if stop in best and cost > best[stop][0]:
                    break  # costs only grow from here on
                most, squares, starts = shorter[start]
                found = (max(most, cost), squares + cost**2, (*starts, start))
                best[stop] = min(best.get(stop, found), found)
    starts = best[count][2]
    return tuple(range(a, b) for a, b in zip(starts, (*starts[1:], count), strict=True))


def layer_costs(model: Model, lengths: tuple[int, ...], targets: int) -> list[float]:
    """Returns the forward FLOPs of each layer for one row. The last one includes the head, and the
    first of each stack its embedding (a sum and a copy of each number: two FLOPs, as memory traffic)."""
    all_stacks = stacks(model)
    counts = Counts(
        rows=1,
        tokens=lengths,
        areas=tuple(n * n // (1 if s.looks_ahead else 2) for n, s in zip(lengths, all_stacks)),
        cross_areas=(0, *(a * b for a, b in pairwise(lengths))),
        targets=targets,
        slots=lengths,
    )
    costs: list[float] = []
    for stream, (stack, length) in enumerate(zip(all_stacks, lengths, strict=True)):
        costs += [float(flops.layer(model, stream, counts).total)] * len(stack.layers)
        costs[-len(stack.layers)] += 2 * length * model.hidden_size
    costs[-1] += flops.forward(model, counts).head
    return costs
