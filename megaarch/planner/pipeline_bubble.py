"""The order in which a pipeline's ranks run their stages, as torch's schedules have it, and what
follows from it: how long ranks wait for each other, and how many forward passes they keep.

F forward, B backward, or its halves where a schedule splits it: I gradients of inputs, W of weights.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from megaarch.config.schema import Parallel
from megaarch.parallel.pipeline_parallel import ONE_STAGE, SCHEDULES

Action = tuple[int, str, int]  # stage, one of FBIW, micro-batch
Order = tuple[tuple[Action, ...], ...]  # of each rank
GRAIN = 40  # costs are rounded to parts of a micro-batch, so that few are told apart


class InFlight(NamedTuple):
    """Of one stage at a moment. kept: forward passes whose activations are there. late: of these, those
    whose gradients of inputs are made and of weights are not. summed: 1 once gradients of its weights are
    summed in fp32. unsummed: 1 while those of a second half wait for that in half precision."""

    kept: int = 0
    late: int = 0
    summed: int = 0
    unsummed: int = 0


def bubble(parallel: Parallel, batches: int, costs: tuple[float, float, float]) -> float:
    """Seconds that a rank idles in a step of so many micro-batches, where messages take no time.

    costs: seconds of a micro-batch on one rank, all its stages: F, I and W. All ranks are taken to
    cost the same, and a rank's stages too.
    """
    if parallel.pipeline_parallel == 1:
        return 0.0
    shares = (1, 1, 1)  # all one where the backward pass stays whole
    if parallel.schedule == "zero_bubble":
        shares = tuple(round(cost / sum(costs) * GRAIN) for cost in costs)
    idle = _idle(*_order_of(parallel, batches, rounds=2), shares)
    return idle / sum(shares) * sum(costs)


def in_flight(parallel: Parallel, batches: int, rank: int) -> np.ndarray:
    """Counts [moments, stages of the rank, 4], each an InFlight, after the rank's passes in a step."""
    if parallel.pipeline_parallel == 1:
        return np.array([[InFlight(kept=1)]])
    if parallel.schedule == "gpipe":
        return np.array([[InFlight(kept=batches)], [InFlight(kept=batches - 1, summed=1)]])
    return _in_flight(*_order_of(parallel, batches, rounds=3), rank)


def _order_of(parallel: Parallel, batches: int, rounds: int) -> tuple[str, int, int, int]:
    """What `order` takes for such a step. With more micro-batches than so many for each rank nothing
    changes: after two no rank waits longer, after three no moment has more in flight. Where a schedule
    cuts them into rounds that are longer than its ranks, all are taken."""
    ranks, each = parallel.pipeline_parallel, parallel.stages_per_rank
    schedule = parallel.schedule
    in_rounds = schedule == "interleaved_1f1b" or (schedule == "zero_bubble" and each != 2)
    if not (in_rounds and batches % ranks):
        batches = min(batches, rounds * ranks)
    return schedule, ranks, each, batches


@lru_cache(maxsize=64)
def order(schedule: str, ranks: int, each: int, batches: int) -> Order:
    """What every rank runs, in turn. each: stages on a rank."""
    if schedule in ONE_STAGE:
        ahead = [batches if schedule == "gpipe" else ranks - rank for rank in range(ranks)]
        return tuple(_of_one_stage(rank, batches, ahead[rank]) for rank in range(ranks))
    v = schedule == "zero_bubble" and each == 2
    found = _of_torch(ScheduleZBVZeroBubble if v else SCHEDULES[schedule], ranks, each, batches)
    return tuple(
        tuple((a.stage_index, a.computation_type.value, a.microbatch_index) for a in mine if a)
        for mine in (found[rank] for rank in range(ranks))
    )


def _of_one_stage(rank: int, batches: int, ahead: int) -> tuple[Action, ...]:
    """One forward and one backward pass in turn, with so many forward passes ahead."""
    actions = [(rank, "F", i) for i in range(min(ahead, batches))]
    for i in range(batches):
        actions.append((rank, "B", i))
        if ahead + i < batches:
            actions.append((rank, "F", ahead + i))
    return tuple(actions)


def _of_torch(kind: Any, ranks: int, each: int, batches: int) -> dict[int, list]:
    class Computation(kind):
        def _prepare_schedule_with_comms(self, *args: Any, **options: Any) -> None:
            pass  # sends and receives between the computations take long to order

    stages = [
        SimpleNamespace(
            group_size=ranks, group_rank=0, num_stages=ranks * each, submod=nn.Identity()
        )
        for _ in range(each)
    ]
    return Computation(stages, batches).pipeline_order


@lru_cache(maxsize=4096)
def _idle(schedule: str, ranks: int, each: int, batches: int, costs: tuple[int, int, int]) -> float:
    """The step's length less a rank's work, in the unit of costs."""
    forward, inputs, weights = (cost / each for cost in costs)
    takes = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights}
    todo, last = order(schedule, ranks, each, batches), ranks * each - 1
    begun, clocks = [0] * ranks, [0.0] * ranks
    # when a stage's forward pass (F), or the gradients of its inputs (B), ended
    done: dict[Action, float] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(todo):
            place, clock = begun[rank], clocks[rank]
            for stage, kind, i in actions[place:]:
                ready: float | None = clock
                if kind == "F" and stage:
                    ready = done.get((stage - 1, "F", i))
                elif kind in "BI":
                    ready = done.get((stage, "F", i) if stage == last else (stage + 1, "B", i))
                if ready is None:
                    break
                clock = max(clock, ready) + takes[kind]
                if kind != "W":
                    done[stage, "F" if kind == "F" else "B", i] = clock
                place, moved = place + 1, True
            begun[rank], clocks[rank] = place, clock
    assert begun == [len(actions) for actions in todo], "ranks wait for each other"
    return max(clocks) - batches * sum(costs)


@lru_cache(maxsize=4096)
def _in_flight(schedule: str, ranks: int, each: int, batches: int, rank: int) -> np.ndarray:
    actions = order(schedule, ranks, each, batches)[rank]
    places = {stage: place for place, stage in enumerate(sorted({stage for stage, *_ in actions}))}
    now, found = [InFlight()] * len(places), []
    for stage, kind, _ in actions:
        kept, late, summed, unsummed = now[places[stage]]
        now[places[stage]] = {
            "F": InFlight(kept + 1, late, summed, unsummed),
            "B": InFlight(kept - 1, late, 1, 0),
            "I": InFlight(kept, late + 1, summed or unsummed, 0),
            "W": InFlight(kept - 1, late - 1, summed, 1),
        }[kind]
        found.append(list(now))
        if kind in "BI":  # FSDP's callback at the end sums what W has left, of all stages
            now = [s._replace(summed=s.summed or s.unsummed, unsummed=0) for s in now]
    return np.unique(np.array(found, np.int32), axis=0)
