"""The order in which a pipeline's ranks run their stages, as torch's schedules have it, and what
follows from it: how long ranks wait for each other, and how many forward passes they keep.

F forward, B backward, or its halves where a schedule splits it: I gradients of inputs, W of weights.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from megaarch.config.schema import Parallel
from megaarch.parallel.pipeline_parallel import ONE_STAGE, SCHEDULES

Action = tuple[int, str, int]  # stage, one of FBIW, micro-batch
Order = tuple[tuple[Action, ...], ...]  # of each rank
GRAIN = 40  # costs are rounded to parts of a micro-batch, so that few are told apart


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
    idle = _idle(*_order_of(parallel, batches), shares)
    return idle / sum(shares) * sum(costs)


def in_flight(parallel: Parallel, batches: int, rank: int) -> tuple[tuple[int, int], ...]:
    """At the moments of a step that may be the fullest: forward passes of the rank's stages that
    are kept, and of these, those whose gradients of inputs are made and of weights are not."""
    if parallel.pipeline_parallel == 1:
        return ((1, 0),)
    if parallel.schedule == "gpipe":
        return ((batches, 0),)
    return _in_flight(*_order_of(parallel, batches), rank)


def _order_of(parallel: Parallel, batches: int) -> tuple[str, int, int, int]:
    """What `order` takes for such a step. With more micro-batches than twice the ranks no rank waits
    longer and none keeps more: so many are enough, unless the schedule cuts them into rounds that
    are longer than its ranks."""
    ranks, each = parallel.pipeline_parallel, parallel.stages_per_rank
    schedule = parallel.schedule
    rounds = schedule == "interleaved_1f1b" or (schedule == "zero_bubble" and each != 2)
    if not (rounds and batches % ranks):
        batches = min(batches, 2 * ranks)
    return schedule, ranks, each, batches


@lru_cache(maxsize=64)
def order(schedule: str, ranks: int, each: int, batches: int) -> Order:
    """What every rank runs, in turn. each: stages on a rank."""
    if schedule == "gpipe":
        return tuple(
            tuple((rank, kind, i) for kind in "FB" for i in range(batches)) for rank in range(ranks)
        )
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(rank, ranks, batches) for rank in range(ranks))
    v = schedule == "zero_bubble" and each == 2
    found = _of_torch(ScheduleZBVZeroBubble if v else SCHEDULES[schedule], ranks, each, batches)
    return tuple(
        tuple((a.stage_index, a.computation_type.value, a.microbatch_index) for a in mine if a)
        for mine in (found[rank] for rank in range(ranks))
    )


def _one_forward_one_backward(rank: int, ranks: int, batches: int) -> tuple[Action, ...]:
    first = min(ranks - rank, batches)
    actions = [(rank, "F", i) for i in range(first)]
    for i in range(batches):
        actions.append((rank, "B", i))
        if first + i < batches:
            actions.append((rank, "F", first + i))
    return tuple(actions)


def _of_torch(kind: Any, ranks: int, each: int, batches: int) -> dict[int, list]:
    class Computation(kind):
        def _prepare_schedule_with_comms(self, *args: Any, **options: Any) -> None:
            pass  # sends and receives between the computations take long to order

    assert kind not in (SCHEDULES[name] for name in ONE_STAGE)
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
    ahead: dict[tuple[int, int], float] = {}  # when the forward pass of a stage ended
    back: dict[tuple[int, int], float] = {}  # when the gradients of its inputs were there
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(todo):
            place, clock = begun[rank], clocks[rank]
            for stage, kind, i in actions[place:]:
                ready: float | None = clock
                if kind == "F" and stage:
                    ready = ahead.get((stage - 1, i))
                elif kind in "BI":
                    ready = (ahead if stage == last else back).get(
                        (stage if stage == last else stage + 1, i)
                    )
                if ready is None:
                    break
                clock = max(clock, ready) + takes[kind]
                if kind == "F":
                    ahead[stage, i] = clock
                elif kind != "W":
                    back[stage, i] = clock
                place, moved = place + 1, True
            begun[rank], clocks[rank] = place, clock
    assert begun == [len(actions) for actions in todo], "ranks wait for each other"
    return max(clocks) - batches * sum(costs)


@lru_cache(maxsize=4096)
def _in_flight(
    schedule: str, ranks: int, each: int, batches: int, rank: int
) -> tuple[tuple[int, int], ...]:
    kept, late = 0, 0
    found: dict[int, int] = {}  # the most that wait for their second half, by passes kept
    for _, kind, _ in order(schedule, ranks, each, batches)[rank]:
        kept += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        late += {"F": 0, "B": 0, "I": 1, "W": -1}[kind]
        found[kept] = max(found.get(kept, 0), late)
    return tuple(
        (kept, late)
        for kept, late in sorted(found.items())
        if not any(k > kept and found[k] >= late for k in found)
    )
