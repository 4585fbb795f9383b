"""The layouts of a model on so many GPUs, best first."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megaarch.config import ConfigError
from megaarch.config.schema import Parallel, Settings
from megaarch.config.validate import conflicts
from megaarch.data import tokens_per_batch
from megaarch.errors import UserError
from megaarch.parallel.validate import check
from megaarch.planner.layer_costs import Layers
from megaarch.planner.memory import Memory, step_memory
from megaarch.planner.time import Cluster, Seconds, model_flops, step_seconds
from megaarch.study.describe import describe
from megaarch.training.limit import Limit

MICRO_BATCHES = (1, 2, 4, 8, 16)
DEEPEST = 64  # pipeline ranks
LONGEST = 1 << 20  # tokens of a row
LONG = 8192  # tokens of a row from which context parallelism is looked at; over nodes, of a row's shard
SCHEDULES = (("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("zero_bubble", 2))
RECOMPUTE = ("none", "selective", "full")  # cheapest first; the first that fits is the fastest


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that fits, and what it takes. steps: of the run, None where nothing limits it."""

    settings: Settings
    gpus: int
    memory: Memory
    seconds: Seconds
    mfu: float
    steps: int | None

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of the whole run."""
        return None if self.hours is None else self.hours * self.gpus

    @property
    def hours(self) -> float | None:
        """Wall time of the whole run."""
        return None if self.steps is None else self.steps * self.seconds.total / 3600


def search(settings: Settings, gpus: int, cluster: Cluster) -> list[PlannedLayout]:
    """Every layout of `settings` that runs on `gpus` GPUs and fits their memory, the fastest first.

    The model, the data and the global batch stay; `parallel` and the micro-batch are searched.
    UserError says what is missing where none is left.
    """
    counted(settings)
    nodes, rest = divmod(gpus, cluster.gpus_per_node)
    if nodes and rest:
        raise UserError(
            f"--gpus {gpus} does not divide into nodes of {cluster.gpus_per_node}: give a multiple, "
            "or --gpus-per-node"
        )
    plans: list[PlannedLayout] = []
    refused: Counter[str] = Counter()
    leanest: tuple[float, float, Settings] | None = None
    for candidate in candidates(settings, gpus, cluster, refused):
        for recompute in RECOMPUTE:
            parallel = candidate.parallel.model_copy(update={"recompute": recompute})
            tried = candidate.model_copy(update={"parallel": parallel})
            if reasons := _problems(tried, gpus):
                refused.update(reasons)
                continue
            memory, room = step_memory(tried), cluster.room(parallel)
            if leanest is None or memory.total - room < leanest[0] - leanest[1]:
                leanest = memory.total, room, tried
            if memory.total <= room:
                plans.append(plan(tried, gpus, cluster, memory))
                break
    if not plans:
        raise UserError(_nothing(gpus, leanest, refused))
    return sorted(plans, key=lambda found: found.seconds.total)


def counted(settings: Settings) -> None:
    """UserError for what the planner and the dry run have no figures of."""
    if settings.training.precision != "bf16":
        raise UserError(
            f"training.precision: the planner counts bf16, not {settings.training.precision}: set it "
            "to bf16"
        )
    for name in ("sequence_length", "target_length"):
        if (getattr(settings.model, name) or 0) > LONGEST:
            raise UserError(
                f"model.{name}: the planner counts rows of at most {LONGEST:,} tokens, not "
                f"{getattr(settings.model, name):,}"
            )
    if settings.parallel.engine != "torch":
        raise UserError(
            f"parallel.engine: the planner counts torch's shards, not those of "
            f"{settings.parallel.engine}: set it to torch, or measure a run"
        )


def candidates(
    settings: Settings, gpus: int, cluster: Cluster, refused: Counter[str]
) -> Iterator[Settings]:
    """Every layout worth a look that a run takes, without recomputation. refused: counts the reasons
    against the others."""
    in_tokens = settings.training.global_batch_tokens is not None
    wanted = rows_a_step(settings) if in_tokens else None
    for parallel in _layouts(settings, gpus, cluster):
        data = parallel.data_ranks
        if wanted is None and settings.training.global_batch_size % data:
            refused[
                f"training.global_batch_size: {settings.training.global_batch_size} rows do not divide "
                f"among the data-parallel ranks that {gpus} GPUs leave: give another number of rows, "
                "training.global_batch_tokens, or another number of GPUs"
            ] += 1
            continue
        tried = set()
        for size in MICRO_BATCHES:
            training = settings.training.model_copy(update={"micro_batch_size": size})
            found = settings.model_copy(update={"parallel": parallel, "training": training})
            if wanted is not None:
                found = tokens_per_batch.in_rows(found, wanted)
                size = found.training.micro_batch_size
            if size in tried or found.training.global_batch_size % (data * size):
                continue
            tried.add(size)
            if reasons := _problems(found, gpus):
                refused.update(reasons)
            else:
                yield found


def rows_a_step(settings: Settings) -> Fraction:
    """Mean rows of a step, of made-up text."""
    per_row = Fraction(describe(settings, "").seen_tokens_per_row)
    return tokens_per_batch.rows_of(settings.training, per_row)


def _problems(settings: Settings, gpus: int) -> list[str]:
    """What a run of these settings on so many GPUs would be refused for."""
    try:
        check(settings, gpus)
    except ConfigError as error:
        return error.problems
    return [f"{paths[0]}: {sentence}" for paths, sentence in conflicts(settings)]


def _layouts(settings: Settings, gpus: int, cluster: Cluster) -> Iterator[Parallel]:
    own = settings.parallel
    node = min(cluster.gpus_per_node, gpus)
    longest = max(Layers(settings).slots)
    for tensor in _divisors(node):
        for context in _contexts(longest, node // tensor, gpus // tensor):
            for deep in _divisors(gpus // (tensor * context)):
                if deep <= DEEPEST:
                    data = gpus // (tensor * context * deep)
                    for found in _data_layouts(tensor, context, deep, data, node):
                        yield own.model_copy(update=found)


def _contexts(longest: int, inside: int, gpus: int) -> Iterator[int]:
    """Context ranks of rows of so many tokens, `inside` of them in a node."""
    for context in _divisors(gpus):
        within = not inside % context and longest >= LONG
        if context == 1 or within or (not context % inside and longest >= LONG * context):
            yield context


def _data_layouts(
    tensor: int, context: int, deep: int, data: int, node: int
) -> Iterator[dict[str, Any]]:
    # one shard group of all ranks, or groups that fill a node, two of them, ...
    inside = max(1, node // (tensor * context))
    copies = _divisors(data // inside) if deep == 1 and data % inside == 0 else [1]
    for copy in copies:
        for schedule, each in SCHEDULES if deep > 1 else SCHEDULES[:1]:
            for again in (True, False) if deep == 1 else (False,):
                yield {
                    "tensor_parallel": tensor,
                    "context_parallel": context,
                    "pipeline_parallel": deep,
                    "data_parallel_shard": data // copy,
                    "data_parallel_replicate": copy,
                    "schedule": schedule,
                    "stages_per_rank": each,
                    "reshard_after_forward": again,
                    "recompute": "none",
                }


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if not number % n]


def plan(settings: Settings, gpus: int, cluster: Cluster, memory: Memory) -> PlannedLayout:
    """What these settings take, in their own layout."""
    seconds, flops = step_seconds(settings, cluster), model_flops(settings)
    mfu = flops / (seconds.total * gpus * cluster.gpu.peak * 1e12)
    return PlannedLayout(settings, gpus, memory, seconds, mfu, _steps(settings, flops))


def _steps(settings: Settings, flops: float) -> int | None:
    training, counts = settings.training, Layers(settings).counts
    if training.steps is None and training.budget is None:
        return None
    limit, rows = Limit.of(training), training.global_batch_size / counts.rows
    each = {
        "step": 1,
        "flops": flops,
        "seen_tokens": rows * sum(counts.tokens),
        "target_tokens": rows * counts.targets,
    }
    return max(1, math.ceil(limit.amount / each[limit.kind]))


def _nothing(
    gpus: int, leanest: tuple[float, float, Settings] | None, refused: Counter[str]
) -> str:
    """Why no layout is listed. leanest: bytes that it needs, bytes that tensors may take, the layout."""
    if leanest is None:
        reason = refused.most_common(1)[0][0] if refused else "no micro-batch divides the batch"
        return f"no layout of {gpus} GPUs runs this model: {reason}"
    memory, room, found = leanest
    return (
        f"nothing fits {gpus} GPUs: the leanest layout ({layout(found)}) needs "
        f"{memory / 1e9:.0f} GB on a GPU and tensors may take {room / 1e9:.0f} GB; take more GPUs, GPUs "
        "with more memory, or a smaller model"
    )


def layout(settings: Settings) -> str:
    """tp8 cp2 pp4x2 dp64: a layout in a few characters; x2: two stages on a rank, dp8x4: four
    copies of shards over eight."""
    p = settings.parallel
    axes = (
        ("tp", p.tensor_parallel, 1),
        ("cp", p.context_parallel, 1),
        ("pp", p.pipeline_parallel, p.stages_per_rank),
        ("dp", p.data_parallel_shard, p.data_parallel_replicate),
    )
    return " ".join(
        f"{axis}{size}" + (f"x{times}" if times > 1 else "")
        for axis, size, times in axes
        if size > 1 or axis == "dp"
    )
