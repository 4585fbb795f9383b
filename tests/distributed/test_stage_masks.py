"""Every stage of a pipeline masks by the same prefix lengths: each rebuilds its batch from the same
loader, whose samples depend on seed and index alone."""

from torch import distributed

from megaarch.data import dataset
from tests.distributed import runs

PP4 = {"parallel.pipeline_parallel": 4, "model.layers": 4, "training.micro_batch_size": 2}


def masks_seen(raw, preset, by_rank):
    """What attention was given on this stage in a step: a table of parts a call, in order.

    by_rank: draw prefix lengths from a state that differs between ranks, as Megatron's BigScience
    fork did.
    """
    if by_rank:
        keyed = dataset.generator
        dataset.generator = lambda seed, *key: keyed(seed + distributed.get_rank(), *key)
    trainer = runs.trainer_of(runs.settings_of(raw, preset, PP4))
    seen = []
    for module in trainer.model.modules():
        if hasattr(module, "attend"):
            module.attend = recorded(module.attend, seen)
    trainer.step(trainer.steps[0])
    return seen


def recorded(attend, seen):
    def call(q, k, v, parts, **options):
        seen.append(parts.table.tolist())
        return attend(q, k, v, parts, **options)

    return call


def test_first_and_last_stage_see_the_same_mask(pool, raw, prepared):
    first, *_, last = pool.run(4, masks_seen, raw, "prefix_lm", False)
    assert len(first) == 4, "one layer, four micro-batches"
    assert first == last
    assert len({str(table) for table in first}) > 1, "prefix lengths vary"


def test_a_state_that_depends_on_the_rank_would_show(pool, raw, prepared):
    first, *_, last = pool.run(4, masks_seen, raw, "prefix_lm", True)
    assert first != last
