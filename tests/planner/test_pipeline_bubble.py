"""Bubbles and micro-batches in flight, as torch's schedules order a step."""

import copy

import numpy as np
import pytest

from megaarch import config
from megaarch.config.schema import Parallel
from megaarch.planner import pipeline_bubble
from megaarch.planner.hardware import gpu
from megaarch.planner.pipeline_bubble import bubble, in_flight
from megaarch.planner.time import Cluster, step_seconds

EVEN = (1.0, 1.0, 1.0)  # forward, gradients of inputs, of weights
KINDS = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
    ("zero_bubble", 3),
)


def pipeline(schedule, ranks, each):
    return Parallel(pipeline_parallel=ranks, schedule=schedule, stages_per_rank=each)


def share(schedule, ranks, each, batches, costs=EVEN):
    """Returns the bubble as a share of the time that a rank works."""
    return bubble(pipeline(schedule, ranks, each), batches, costs) / batches / sum(costs)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("costs", [EVEN, (1.0, 2.5, 0.5)])
def test_the_bubble_of_full_rounds_is_the_closed_form(ranks, rounds, costs):
    batches = ranks * rounds  # Narayanan et al. 2021, 2.2
    for schedule, each in KINDS[:4]:
        wanted = (ranks - 1) / (each * batches)
        assert share(schedule, ranks, each, batches, costs) == pytest.approx(wanted)


def test_few_micro_batches_leave_ranks_waiting():
    for batches, wanted in ((1, 2.0), (2, 5 / 6), (4, 0.25)):
        assert share("zero_bubble", 4, 2, batches) == pytest.approx(wanted)
    assert share("zero_bubble", 8, 2, 4) == pytest.approx(11 / 12)
    assert share("zero_bubble", 8, 2, 32) == pytest.approx(0.0365, rel=0.01)
    for batches, wanted in ((1, 3.0), (2, 1.25)):
        assert share("interleaved_1f1b", 4, 2, batches) == pytest.approx(wanted)
        # one micro-batch, or two, go through all stages alone whatever their passes cost
        assert share("interleaved_1f1b", 4, 2, batches, (1, 2.5, 0.5)) == pytest.approx(wanted)


def test_a_zero_bubble_is_one_where_the_three_passes_cost_alike():
    even, uneven = (share("zero_bubble", 8, 2, 16, costs) for costs in (EVEN, (1, 1.5, 0.5)))
    assert uneven > 1.5 * even


@pytest.mark.parametrize(("schedule", "each"), KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_long_step_is_as_if_all_its_micro_batches_were_simulated(schedule, each, ranks):
    parallel, shares = pipeline(schedule, ranks, each), (13, 18, 9)
    if schedule != "zero_bubble":
        shares = EVEN
    for batches in (2 * ranks, 5 * ranks):
        whole = pipeline_bubble._idle(schedule, ranks, each, batches, shares)
        assert bubble(parallel, batches, shares) == pytest.approx(whole)
        for rank in range(ranks):
            # whatever passes and gradients of the stages weigh, no moment of the whole step weighs more
            found = in_flight(parallel, batches, rank)
            kept = pipeline_bubble._in_flight(schedule, ranks, each, batches, rank)
            weights = np.random.default_rng(rank).random((20, *found.shape[1:]))
            heaviest = [(weights[:, None] * x).sum((2, 3)).max(axis=1) for x in (found, kept)]
            assert heaviest[0] == pytest.approx(heaviest[1])


def test_forward_passes_that_a_rank_keeps():
    def most(schedule, each, batches):
        parallel = pipeline(schedule, 4, each)
        found = [in_flight(parallel, batches, rank) for rank in range(4)]
        return [moments[..., 0].sum(axis=1).max() for moments in found]

    assert most("1f1b", 1, 16) == [4, 3, 2, 1]
    assert most("gpipe", 1, 16) == [16] * 4
    assert most("interleaved_1f1b", 2, 16) == [11, 9, 7, 5]
    assert most("interleaved_1f1b", 2, 2) == [4, 4, 4, 3]
    assert most("zero_bubble", 2, 16) == [8] * 4
    assert most("zero_bubble", 2, 2) == [3, 4, 4, 4]
    assert most("zero_bubble", 1, 16) == [4] * 4  # a rank's later weights wait, and keep its inputs
    late = in_flight(pipeline("zero_bubble", 4, 1), 16, 3)
    assert (late[..., 0] == late[..., 1]).any() and late[..., 1].max() == 4


def test_a_rank_keeps_more_passes_of_its_first_stage_than_of_its_last():
    """Narayanan et al. 2021: 10 passes to warm up on the first of 4 ranks, in groups of 4, and one."""
    moments = in_flight(pipeline("interleaved_1f1b", 4, 2), 16, 0)
    fullest = moments[moments[..., 0].sum(axis=1).argmax()]
    assert fullest[:, 0].tolist() == [7, 4]


def test_gradients_of_a_second_half_wait_for_the_next_backward_pass_to_be_summed():
    moments = in_flight(pipeline("zero_bubble", 2, 2), 8, 0)
    unsummed = moments[..., 3]
    assert unsummed.max() == 1 and set(moments[..., 2][unsummed == 1].tolist()) == {0, 1}
    whole = in_flight(pipeline("interleaved_1f1b", 2, 2), 8, 0)
    assert not whole[..., 3].any() and not whole[..., 1].any()


def test_a_step_of_few_micro_batches_costs_its_bubble(raw):
    raw = copy.deepcopy(raw)
    raw["model"] |= {"layers": 8, "hidden_size": 512, "heads": 8, "feed_forward_size": 1408}
    raw["training"] |= {"precision": "bf16", "micro_batch_size": 4}
    found = {}
    for batches in (2, 32):
        raw["training"]["global_batch_size"] = 4 * batches
        raw["parallel"] = {"pipeline_parallel": 4, "schedule": "zero_bubble", "stages_per_rank": 2}
        seconds = step_seconds(config.resolve(raw), Cluster(gpu("h100")))
        found[batches] = seconds.bubble / (seconds.total - seconds.bubble)
    assert found[2] > 0.4 and 0.01 < found[32] < 0.1
