"""DeepSpeed as the data-parallel engine equals one process, and its checkpoints are the common ones."""

import json
import os

import pytest

from megaarch.config import ConfigError
from megaarch.engine import deepspeed_config
from megaarch.parallel.validate import check
from megaarch.training.trainer import Trainer
from tests.conftest import PRESETS
from tests.distributed import runs

ENGINE = {"parallel.engine": "deepspeed", "parallel.data_parallel_shard": 2}


def zero(stage, **more):
    return ENGINE | {"parallel.zero_stage": stage} | more


@pytest.mark.parametrize("stage", [1, 3])
def test_every_preset_equals_one_process(stage, pool, raw, prepared):
    wanted = runs.run(raw, PRESETS, {})
    found = runs.merge(pool.run(2, runs.zero_runs, raw, PRESETS, zero(stage)))
    for preset in PRESETS:
        runs.compare(found[preset], wanted[preset], f"{preset} ZeRO-{stage}", 1e-5)


def test_batches_in_tokens_and_documents_apart_equal_one_process(pool, raw, prepared):
    given = {"training.global_batch_tokens": 300, "data.document_masks": True}
    found = runs.merge(pool.run(2, runs.zero_runs, raw, ["gpt", "t5"], zero(1) | given))
    for preset, wanted in runs.run(raw, ["gpt", "t5"], given).items():
        found[preset].counts = (*found[preset].counts[:-1], wanted.counts[-1])  # slots may be more
        runs.compare(found[preset], wanted, preset, 1e-5)


def test_offload_and_recompute_equal_one_process(pool, raw, prepared):
    wanted = runs.run(raw, ["t5"], {})
    for given in (zero(2, **{"parallel.offload": True}), zero(3, **{"parallel.recompute": "full"})):
        found = runs.merge(pool.run(2, runs.zero_runs, raw, ["t5"], given))
        runs.compare(found["t5"], wanted["t5"], str(given), 1e-5)


def train_to(raw, preset, given, steps):
    """Runs towards step 6 and is stopped past `steps`; whole weights, and where it started."""
    given = {"training.steps": 6, "training.save_every": 2, **given}
    trainer = runs.trainer_of(runs.settings_of(raw, preset, given))
    start = trainer.progress.step
    while trainer.progress.step < steps:
        trainer.step(trainer.steps[trainer.progress.step])
    trainer.save()
    weights, _ = trainer.engine.state(None)
    return start, {name: runs.whole(value) for name, value in weights.items()}


def test_a_run_moves_between_deepspeed_and_other_layouts(pool, raw, prepared, tmp_path):
    def given(name):
        return {"logging.directory": str(tmp_path / name)}

    _, wanted = train_to(raw, "t5", given("whole"), 6)
    layouts = [
        (2, zero(1)),
        (2, {"parallel.data_parallel_shard": 2}),
        (2, zero(3)),
        (1, {}),
        (2, zero(2)),
    ]
    for number, (ranks, layout) in enumerate(layouts):
        answers = pool.run(ranks, train_to, raw, "t5", given("moved") | layout, number + 2)
        assert {start for start, _ in answers} == {number + 1 if number else 0}
    for name, value in wanted.items():
        assert runs.distance(answers[0][1][name], value) < 1e-4, name


def broken_batch(raw, given):
    """A step whose loss is not finite, then one that is fine."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    before, _ = trainer.engine.state(None)
    batches = trainer.steps[0]
    for batch in batches:
        batch.target_weights.fill_(float("nan"))
    skipped = trainer.step(batches)
    after, _ = trainer.engine.state(None)
    same = all(runs.whole(after[n]).equal(runs.whole(before[n])) for n in before)
    fine = trainer.step(trainer.steps[1])
    return skipped.progress.skipped, same, fine.progress.skipped, fine.loss


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_not_finite_is_skipped(stage, pool, raw, prepared):
    for skipped, same, later, loss in pool.run(2, broken_batch, raw, zero(stage)):
        assert (skipped, same, later) == (1, True, 1)
        assert loss == loss


def config_of(raw, tmp_path, given, settings=()):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    named = ENGINE | {"parallel.deepspeed_config": str(path)} | dict(settings)
    return deepspeed_config.of(runs.settings_of(raw, "gpt", named), 2)


def test_a_deepspeed_json_is_taken_and_may_repeat_the_settings(raw, tmp_path):
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000000},
    }
    config = config_of(raw, tmp_path, given)
    assert config["zero_optimization"] == given["zero_optimization"]
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (8, 2)
    assert "optimizer" not in config


def test_a_deepspeed_json_may_say_adam_of_either_adam(raw, tmp_path):
    given = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}
    for optimizer in ("adamw", "apex_adam"):
        config_of(raw, tmp_path, given, {"training.optimizer": optimizer})
    with pytest.raises(ConfigError, match="optimizer.type is adam and training.optimizer is sgd"):
        config_of(raw, tmp_path, given, {"training.optimizer": "sgd"})


@pytest.mark.parametrize(
    "given, words",
    [
        ({"zero_optimization": 3}, "zero_optimization has to be an object"),
        ({"zero_optimization": {"stage": True}}, "stage is True: it has to be 1, 2 or 3"),
        ({"bf16": True}, "bf16 has to be an object"),
        ({"optimizer": "adam"}, "optimizer has to be an object"),
        ({"optimizer": {"params": [1]}}, "optimizer.params has to be an object"),
    ],
)
def test_a_value_in_place_of_a_section_is_told(given, words, raw, tmp_path):
    given = {"zero_optimization": {"stage": 1}} | given
    with pytest.raises(ConfigError, match=words):
        config_of(raw, tmp_path, given)


def test_a_lock_that_a_killed_build_has_left_is_told(tiny, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(ConfigError, match=f"{lock} says .* remove this file"):
        Trainer(tiny(**{"parallel.engine": "deepspeed"}), prepared)


def test_a_deepspeed_json_that_contradicts_the_settings_is_told_all_at_once(raw, tmp_path):
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 1.0}},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 0},
    }
    with pytest.raises(ConfigError) as told:
        config_of(raw, tmp_path, given)
    message = str(told.value)
    for part in (
        "train_micro_batch_size_per_gpu is 4 and training.micro_batch_size is 2",
        "bf16.enabled",
        "fp16.enabled",
        "optimizer.type is lamb",
        "optimizer.params.lr is 1.0",
        "scheduler",
        "zero_optimization.stage is 0",
    ):
        assert part in message


@pytest.mark.parametrize(
    "precision, given, words",
    [
        (
            "bf16",
            {"communication_data_type": "bf16"},
            "communication_data_type is bf16 and .* bf16",
        ),
        (
            "fp32",
            {"communication_data_type": "bf16"},
            "communication_data_type is bf16 and .* fp32",
        ),
        (
            "bf16",
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "data_types.grad_accum_dtype is bf16",
        ),
        ("fp32", {"data_types": "bf16"}, "data_types has to be an object"),
        ("bf16", {"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow is false and"),
        (
            "bf16",
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads is true and training.precision is bf16",
        ),
        ("bf16", {"bf16": {"of_a_later_deepspeed": 1}}, "bf16.of_a_later_deepspeed is 1"),
        ("fp32", {"bfloat16": {"enabled": True}}, "bfloat16.enabled is true and .* fp32"),
        ("bf16", {"amp": {"enabled": True}}, "amp.enabled is true and training.precision is bf16"),
        ("fp32", {"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true and"),
    ],
)
def test_a_precision_of_the_json_that_is_not_the_settings_is_told(
    precision, given, words, raw, tmp_path
):
    given = {"zero_optimization": {"stage": 1}} | given
    with pytest.raises(ConfigError, match=words):
        config_of(raw, tmp_path, given, {"training.precision": precision})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_of_the_json_may_repeat_the_settings(precision, raw, tmp_path):
    chosen = {"training.precision": precision}
    bare = config_of(raw, tmp_path, {"zero_optimization": {"stage": 1}}, chosen)
    for sums, amp in (("fp32", False), ("auto", "auto")):
        given = {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
            "fp16": {"enabled": False},
            "amp": {"enabled": amp},
            "data_types": {"grad_accum_dtype": sums},
            "communication_data_type": sums,
        }
        found = config_of(raw, tmp_path, given, chosen)
        assert found == bare


@pytest.mark.parametrize(
    "given, told",
    [
        (ENGINE | {"parallel.tensor_parallel": 2}, "parallel.tensor_parallel"),
        (ENGINE | {"training.optimizer": "adafactor"}, "adafactor"),
        (ENGINE | {"parallel.reshard_after_forward": False}, "parallel.zero_stage says what"),
        (ENGINE | {"parallel.stages_per_rank": 2}, "are of a pipeline, and there is none"),
        ({"parallel.zero_stage": 2, "parallel.data_parallel_shard": 2}, "engine=deepspeed"),
        (ENGINE | {"parallel.zero_stage": 2, "parallel.deepspeed_config": "x"}, "one of the two"),
    ],
)
def test_what_deepspeed_cannot_do_is_said_before_anything_starts(given, told, raw):
    settings = runs.settings_of(raw, "gpt", given)
    with pytest.raises(ConfigError, match=told):
        check(settings, 4 if "parallel.tensor_parallel" in given else 2)
