"""DeepSpeed's configuration, from our settings or from a user's JSON.

What our settings say (batch sizes, precision, clipping, optimizer, schedule) they alone say: a JSON
may repeat it or write "auto", and a contradiction is an error that names both.
"""

import json
from collections.abc import Iterator
from typing import Any

from megaarch.config import ConfigError, get_path
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
    sections = {key: get_path(given, key) for key in _SECTIONS}
    if wrong := [key for key, value in sections.items() if not _is_section(value)]:
        raise ConfigError(
            [f"parallel.deepspeed_config: {path}: {key} has to be an object" for key in wrong]
        )
    return given


def _is_section(value: Any) -> bool:
    return value in (None, "auto") or isinstance(value, dict)


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
_SECTIONS = (
    *("zero_optimization", "data_types", "optimizer", "optimizer.params", "scheduler"),
    *_ENABLED,
)
# compared with the settings, and left out
_TAKEN = ("optimizer", "scheduler", "data_types", "communication_data_type", *_ENABLED)
# DeepSpeed's defaults, with which bf16 trains here: masters and states in fp32, a step that is not
# finite skipped; "": of all other keys
_BF16 = {
    "": "auto",
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


_KINDS = {"adamw": ("adam", "adamw"), "apex_adam": ("adam", "adamw"), "sgd": ("sgd",)}
Rows = dict[str, tuple[tuple[Any, ...], str]]


def _problems(given: Config, wanted: Config, training: Training) -> Iterator[str]:
    stage = get_path(given, "zero_optimization.stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        yield f"zero_optimization.stage is {stage}: it has to be 1, 2 or 3"
    if (given.get("scheduler") or "auto") != "auto":
        yield "scheduler: training.schedule is the schedule; remove this section"
    rows, flat = _rows(wanted, training), dict(given)
    for section in _SECTIONS:
        if isinstance(inner := get_path(given, section), dict):
            flat |= {f"{section}.{key}": value for key, value in inner.items()}
    for key, value in flat.items():
        value = str(value).lower() if key == "optimizer.type" else value
        section = key.rpartition(".")[0]
        ours, sentence = rows.get(key) or rows.get(f"{section}.") or ((value,), "")
        if value not in ("auto", *ours):
            yield f"{key} is {_json(value)} and {sentence}"


def _rows(wanted: Config, training: Training) -> Rows:
    """Maps each key that our settings decide to the values that it may have beside "auto", and to the rest of the
    sentence on any other. A name with a dot at its end stands for all other keys of that section."""
    rows: Rows = {}
    for key, setting in _SETTINGS.items():
        rows[key] = (wanted[key],), f"{setting} is {wanted[key]}: make them equal or write auto"
    ours = f"training.precision is {training.precision}"
    for key, precision in _ENABLED.items():
        enabled = training.precision == precision
        rows[f"{key}.enabled"] = (enabled,), f"{ours}: make them agree or write auto"
    for section in ("bf16", "bfloat16") if training.precision == "bf16" else ():
        for key, value in _BF16.items():
            trained = f"{ours}, which is trained with {_json(value)}: remove it or write auto"
            rows[f"{section}.{key}"] = (value,), trained
    summed = f"{ours}, whose gradients are summed in fp32: remove it or write auto"
    rows["communication_data_type"] = rows["data_types."] = (None, "fp32"), summed
    kinds = _KINDS.get(training.optimizer, ())
    rows["optimizer.type"] = kinds, f"training.optimizer is {training.optimizer}"
    for key, setting, value in (
        ("lr", "training.learning_rate", training.learning_rate),
        ("betas", "[training.beta1, training.beta2]", [training.beta1, training.beta2]),
        ("eps", "training.epsilon", training.epsilon),
        ("weight_decay", "training.weight_decay", training.weight_decay),
        ("", "no setting of ours", "auto"),
    ):
        rows[f"optimizer.params.{key}"] = (value,), f"{setting} is {value}: write auto"
    return rows


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
