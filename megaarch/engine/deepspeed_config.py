"""DeepSpeed's configuration, from our settings or from a user's JSON.

What our settings say (batch sizes, precision, clipping, optimizer, schedule) they alone say: a JSON
may repeat it or write "auto", and a contradiction is an error that names both.
"""

import json
from collections.abc import Iterator
from typing import Any

from megaarch.config import ConfigError
from megaarch.config.schema import Settings, Training
from megaarch.files import read_json

Config = dict[str, Any]


def of(settings: Settings, ranks: int) -> Config:
    """The configuration that deepspeed.initialize takes, for `ranks` data-parallel ranks.

    ConfigError with all contradictions between the JSON and the settings.
    """
    parallel = settings.parallel
    wanted = _ours(settings.training, ranks)
    if parallel.deepspeed_config is None:
        given = {"zero_optimization": _zero(parallel.zero_stage or 1, bool(parallel.offload))}
    else:
        given = read(parallel.deepspeed_config)
        if problems := list(_problems(given, wanted, settings.training)):
            raise ConfigError([f"{parallel.deepspeed_config}: {problem}" for problem in problems])
    given = {k: v for k, v in given.items() if k not in _TAKEN and v != "auto"}
    # torch's optimizers are right under ZeRO; progress is ours to print
    own = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    return {**own, **given, **wanted}


def read(path: str) -> Config:
    """A DeepSpeed JSON. ConfigError where it is none."""
    try:
        given = read_json(path)
    except OSError as error:
        raise ConfigError([f"parallel.deepspeed_config: {path}: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"parallel.deepspeed_config: {error}"]) from None
    if not isinstance(given, dict):
        raise ConfigError([f"parallel.deepspeed_config: {path} holds no JSON object"])
    wrong = [key for key in _SECTIONS if not _is_section(given.get(key))]
    if not _is_section(_section(given, "optimizer").get("params")):
        wrong.append("optimizer.params")
    if wrong:
        raise ConfigError(
            [f"parallel.deepspeed_config: {path}: {key} has to be an object" for key in wrong]
        )
    return given


def _is_section(value: Any) -> bool:
    return value in (None, "auto") or isinstance(value, dict)


def _section(given: Config, key: str) -> Config:
    """A section of the JSON; empty where it is absent or left to "auto"."""
    value = given.get(key)
    return value if isinstance(value, dict) else {}


def _zero(stage: int, offload: bool) -> Config:
    zero: Config = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return zero


def _ours(training: Training, ranks: int) -> Config:
    wanted: Config = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size
        // (training.micro_batch_size * ranks),
        "gradient_clipping": training.clip_gradient,
        "bf16": {"enabled": training.precision == "bf16"},
    }
    if training.precision == "bf16":
        wanted["data_types"] = {"grad_accum_dtype": "fp32"}
        wanted["communication_data_type"] = "fp32"
    return wanted


_ENABLED = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "amp": "", "torch_autocast": ""}
_SECTIONS = ("zero_optimization", "data_types", "optimizer", "scheduler", *_ENABLED)
# compared with the settings, and left out
_TAKEN = ("optimizer", "scheduler", "data_types", "communication_data_type", *_ENABLED)
# DeepSpeed's defaults, with which bf16 trains here: masters and states in fp32, a step that is not
# finite skipped
_BF16 = {
    "immediate_grad_update": False,
    "check_grad_overflow": True,
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
}
_SETTINGS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": (
        "training.global_batch_size / (training.micro_batch_size x parallel.data_parallel_shard)"
    ),
    "gradient_clipping": "training.clip_gradient",
}


def _problems(given: Config, wanted: Config, training: Training) -> Iterator[str]:
    stage = _section(given, "zero_optimization").get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        yield f"zero_optimization.stage is {stage}: it has to be 1, 2 or 3"
    for key, setting in _SETTINGS.items():
        value = given.get(key, "auto")
        if value not in ("auto", wanted[key]):
            yield f"{key} is {value} and {setting} is {wanted[key]}: make them equal or write auto"
    yield from _precision_problems(given, training.precision)
    if (given.get("scheduler") or "auto") != "auto":
        yield "scheduler: training.schedule is the schedule; remove this section"
    if optimizer := _section(given, "optimizer"):
        yield from _optimizer_problems(optimizer, training)


def _precision_problems(given: Config, precision: str) -> Iterator[str]:
    ours = f"training.precision is {precision}"
    for key, wanted in _ENABLED.items():
        enabled = _section(given, key).get("enabled", "auto")
        if enabled not in ("auto", precision == wanted):
            yield f"{key}.enabled is {_json(enabled)} and {ours}: make them agree or write auto"
    for section in ("bf16", "bfloat16") if precision == "bf16" else ():
        for key, value in _section(given, section).items():
            if key != "enabled" and value not in ("auto", _BF16.get(key, "auto")):
                yield (
                    f"{section}.{key} is {_json(value)} and {ours}, which is trained with "
                    f"{_json(_BF16.get(key, 'auto'))}: remove it or write auto"
                )
    sums = {"communication_data_type": given.get("communication_data_type")}
    sums |= {f"data_types.{key}": value for key, value in _section(given, "data_types").items()}
    for key, value in sums.items():
        if value not in (None, "auto", "fp32"):
            yield (
                f"{key} is {_json(value)} and {ours}, whose gradients are summed in fp32: remove it "
                "or write auto"
            )


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _optimizer_problems(given: Config, training: Training) -> Iterator[str]:
    kinds = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
    kind = str(given.get("type", "auto")).lower()
    if kind != "auto" and kinds.get(kind) != training.optimizer.removeprefix("apex_"):
        yield f"optimizer.type is {kind} and training.optimizer is {training.optimizer}"
    wanted = {
        "lr": ("training.learning_rate", training.learning_rate),
        "betas": ("[training.beta1, training.beta2]", [training.beta1, training.beta2]),
        "eps": ("training.epsilon", training.epsilon),
        "weight_decay": ("training.weight_decay", training.weight_decay),
    }
    for key, value in _section(given, "params").items():
        setting, ours = wanted.get(key, ("no setting of ours", "auto"))
        if value not in ("auto", ours):
            yield f"optimizer.params.{key} is {value} and {setting} is {ours}: write auto"
