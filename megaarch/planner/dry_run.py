"""One rank of a layout, run for real but for the numbers: the trainer's own model, tensor plan,
`fully_shard`, pipeline stage and optimizer on fake tensors, among as many ranks as the layout has,
in one process and without an accelerator.

That a step comes to its end shows that shapes and collectives fit; the trace shows what it takes.

    place on meta (fake process group) -> to_empty (fake tensors) -> forward, backward, clip, step
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import getattr_static
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import pipelining
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaarch.attention.sdpa import SdpaKernel
from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import AXES, Grid, processes
from megaarch.engine.native import NativeEngine
from megaarch.errors import UserError
from megaarch.model import linear, loss
from megaarch.parallel import gradients
from megaarch.parallel.parallelize import build_on_meta
from megaarch.parallel.validate import check
from megaarch.planner.memory import memory_by_rank, micro_batches
from megaarch.planner.trace import StepTrace
from megaarch.study.describe import made_up_batch
from megaarch.training import optimizer


@dataclass(frozen=True)
class DryRun:
    """What one rank of `world_size` holds and sends in a step. Bytes.

    parameters, gradients: this rank's shards. optimizer: its states. activations: what else is
    alive when most is: saved for the backward pass, gathered parameters, whole gradients, buffers.
    micro_batches: how many of the step's were run; enough to fill the pipeline.
    messages: axis and collective, how many, and the bytes that the rank hands in.
    peak: at the fullest moment of a step that is not the first. planned: what the planner expected of it.
    """

    rank: int
    world_size: int
    micro_batches: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    messages: tuple[tuple[str, str, int, int], ...]
    peak: int
    planned: float


def dry_run(settings: Settings, rank: int | None = None) -> DryRun:
    """A training step of `rank` in the layout of `settings`; None: of a rank of the pipeline stage that the
    planner finds fullest. ConfigError where the layout does not fit.

    No process group may exist; none is left.
    """
    training, ranks = settings.training, processes(settings.parallel)
    check(settings, ranks)
    if rank is None:
        totals = [memory.total for memory in memory_by_rank(settings)]
        rank = totals.index(max(totals)) * (ranks // len(totals))
    expected = planned(settings, rank)
    eager = training.model_copy(update={"compile": False, "float8": None})
    settings = settings.model_copy(update={"training": eager})
    if training.optimizer not in ("adamw", "sgd"):
        raise UserError(
            f"training.optimizer: a dry run has no figures to look at, as {training.optimizer} "
            "does; set it to adamw, whose states are larger"
        )
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "OFF")
    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        grid = Grid.build(settings.parallel, "cpu")
        engine = _DryEngine(settings, grid, model=build_on_meta(settings, grid))
        count = _enough(settings)
        batches = [made_up_batch(settings, i, grid.row_multiple) for i in range(count)]
        with _as_accelerator():
            return _step(settings, grid, engine, batches, expected)
    finally:
        distributed.destroy_process_group()


def planned(settings: Settings, rank: int) -> float:
    """Bytes that the planner expects `rank` to hold in the step that a dry run makes, in a layout that fits."""
    training, ranks = settings.training, processes(settings.parallel)
    if not 0 <= rank < ranks:
        raise UserError(f"--rank {rank}: the layout has ranks 0 to {ranks - 1}")
    rows = _enough(settings) * training.micro_batch_size * settings.parallel.data_ranks
    made = training.model_copy(update={"global_batch_size": rows})
    by_rank = memory_by_rank(settings.model_copy(update={"training": made}))
    return by_rank[rank * len(by_rank) // ranks].total


def _enough(settings: Settings) -> int:
    """Micro-batches after which no later one finds more in memory: the pipeline is full, and the
    sums of gradients of all stages are there."""
    parallel, count = settings.parallel, micro_batches(settings)
    if parallel.schedule == "gpipe" and parallel.pipeline_parallel > 1:
        return count
    later = 1 if parallel.schedule == "1f1b" else 2 * parallel.pipeline_parallel
    return min(count, parallel.pipeline_parallel + later)


class _DryEngine(NativeEngine):
    def _local(self, batch: Batch) -> Batch:
        with unset_fake_temporarily():  # which targets a shard has is a matter of their numbers
            return super()._local(batch)


def _step(
    settings: Settings, grid: Grid, engine: NativeEngine, batches: list[Batch], expected: float
) -> DryRun:
    model, training = engine.model, settings.training
    trace = StepTrace(_axes(grid))
    with FakeTensorMode(allow_non_fake_inputs=True), trace:
        model.to_empty(device=grid.device)
        made = optimizer.build(model, training)
        engine.train()
        model.set_dropout_step(training.seed, 0)
        trace.mark()
        engine.forward_backward(batches, 1.0)
        peak = trace.peak
        engine.clip(training.clip_gradient)
        made.step()
        parameters = _bytes(model.parameters())
        grads = _bytes(p.grad for p in model.parameters())
        states = _bytes(x for state in made.state.values() for x in state.values())
        messages = tuple(
            (axis, name, found["count"], found["bytes"])
            for (axis, name), found in sorted(trace.messages.items())
        )
        made.zero_grad(set_to_none=True)
    return DryRun(
        rank=distributed.get_rank(),
        world_size=grid.world_size,
        micro_batches=len(batches),
        parameters=parameters,
        gradients=grads,
        optimizer=states,
        activations=peak - parameters - grads,
        messages=messages,
        peak=peak + states,
        planned=expected,
    )


def _bytes(held: Iterable[Any]) -> int:
    """Bytes of the tensors among what is `held`, each storage once."""
    tensors = (gradients.local(x) for x in held if isinstance(x, torch.Tensor))
    return sum({x._cdata: x.nbytes() for x in (t.untyped_storage() for t in tensors)}.values())


def _axes(grid: Grid) -> dict[tuple[int, ...], str]:
    """The axes that a process group spans, by its ranks."""
    found: dict[tuple[int, ...], str] = {}
    if grid.mesh is None:
        return found
    for span in (*((axis,) for axis in AXES), ("dp_shard", "cp")):
        ranks = grid.submesh(*span).mesh.flatten().tolist()
        if len(ranks) > 1:
            found.setdefault(tuple(sorted(ranks)), " x ".join(span))
    return found


@contextmanager
def _as_accelerator() -> Iterator[None]:
    """Fake tensors lie on the CPU: attention computes in half precision, as on an
    accelerator, the loss takes its chunks, products sum weights' gradients in fp32, and a norm is one kernel that
    keeps its input. Pipeline stages
    ask each other whether all know the shapes that they receive, which fake tensors cannot answer (torch
    2.11 does not ask); the engine gives every stage its shapes."""
    stage, question = pipelining.PipelineStage, "_warmup_backward_result"
    yes = SimpleNamespace(item=lambda: 1)
    changes: list[tuple[Any, str, Any]] = [
        (SdpaKernel, "compute_dtype", lambda self, q: q.dtype),
        (F, "rms_norm", lambda x, shape, weight=None, eps=None: _Norm.apply(x, weight)),
        (loss, "limits_of", lambda device_type: loss.ACCELERATOR),
        *((module, "transposed_product", _summed_in_fp32) for module in (loss, linear)),
    ]
    if hasattr(stage, question):
        changes.append((stage, question, lambda self, received_result=None: yes))
    with ExitStack() as undo:
        for owner, name, value in changes:
            undo.callback(setattr, owner, name, getattr_static(owner, name))
            setattr(owner, name, value)
        yield


def _summed_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As linear.transposed_product of a GPU."""
    return torch.mm(a.t(), b, out_dtype=torch.float32) if a.dtype in linear.HALF else a.t() @ b


class _Norm(torch.autograd.Function):
    """The shapes of a fused norm."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
