"""lm-evaluation-harness over several processes finds what one process finds, each taking its share."""

import copy
import os

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install '.[lm-eval]'")

from megaarch import config
from megaarch.training.trainer import Trainer
from tests.lm_eval.local import TASKS, write_tasks


def evaluated(runs, tasks, tensor_parallel=1):
    """Metrics of each run's tasks by their names, and how many requests this process had of each
    kind; metrics are None where this process does not report."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from megaarch.lm_eval.model import MegaarchLM

    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = {}
    for name, run in runs.items():
        lm = MegaarchLM(run=run, tensor_parallel=tensor_parallel, batch_size=3, device="cpu")
        asked = []
        scores = lm._scores
        lm._scores = lambda pairs, asked=asked, of=scores: asked.append(len(pairs)) or of(pairs)
        out = lm_eval.simple_evaluate(
            model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
        )
        metrics = out and {
            (task, metric): value
            for task, results in out["results"].items()
            for metric, value in results.items()
            if isinstance(value, float)
        }
        samples = out and {t: [s["doc_id"] for s in out["samples"][t]] for t in TASKS}
        found[name] = metrics, samples, sum(asked)
    return found


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["dp2", "tp2"])
def test_two_processes_find_what_one_finds(tensor_parallel, pool, raw, prepared, tmp_path):
    tasks, runs = str(write_tasks(tmp_path / "tasks", items=5)), {}
    for preset in ("gpt", "t5"):
        mine = copy.deepcopy(raw)
        mine["model"]["preset"] = preset
        mine["training"]["steps"] = 1
        mine["logging"]["directory"] = runs[preset] = str(tmp_path / preset)
        Trainer(config.resolve(mine), prepared).run()
    alone = evaluated(runs, tasks)
    first, second = pool.run(2, evaluated, runs, tasks, tensor_parallel)
    for preset in runs:
        metrics, samples, asked = alone[preset]
        assert ("local_rolling", "bits_per_byte,none") in metrics
        assert first[preset][0] == pytest.approx(metrics, rel=1e-5)
        assert {t: sorted(ids) for t, ids in first[preset][1].items()} == samples
        assert second[preset][:2] == (None, None)
        shares = first[preset][2], second[preset][2]
        if tensor_parallel == 2:
            assert shares == (asked, asked)
        else:  # five items: three and two, the smaller share filled up
            assert max(shares) < 0.75 * asked and sum(shares) >= asked
