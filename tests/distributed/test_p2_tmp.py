import pytest
from tests.conftest import PRESETS
from tests.distributed import runs
TP={"parallel.tensor_parallel": 2}
def test_trainer(pool, raw, prepared):
    wanted = runs.run(raw, list(PRESETS), {}, "fp32")
    found = runs.merge(pool.run(2, runs.run, raw, list(PRESETS), TP, "fp32"))
    for p in PRESETS:
        print(p, runs.compare(found[p], wanted[p], p, 1e-5))
def test_2d(pool, raw, prepared):
    given={"training.clip_gradient":0.05,"training.z_loss":1e-3,"model.dropout":0.1}
    wanted = runs.run(raw, ["t5"], given, "fp64")
    for other in ("data_parallel_shard", "context_parallel", "pipeline_parallel"):
        found = runs.merge(pool.run(4, runs.run, raw, ["t5"], given|TP|{f"parallel.{other}": 2}, "fp64"))
        print(other, runs.compare(found["t5"], wanted["t5"], "x", 1e-10, weights=1e-8))
@pytest.mark.parametrize("opt", ["adafactor"])
def test_opt(pool, raw, prepared, opt):
    given={"training.optimizer":opt}
    wanted = runs.run(raw, ["gpt"], given, "fp32")
    found = runs.merge(pool.run(2, runs.run, raw, ["gpt"], given|TP, "fp32"))
    print(opt, runs.compare(found["gpt"], wanted["gpt"], "x", 1e-5))
def test_compile(pool, raw, prepared):
    given={"training.compile":True}
    wanted = runs.run(raw, ["gpt"], {}, "fp32")
    found = runs.merge(pool.run(2, runs.run, raw, ["gpt"], given|TP, "fp32", timeout=300))
    print("compile", runs.compare(found["gpt"], wanted["gpt"], "x", 1e-5))
