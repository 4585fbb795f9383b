"""Settings that are each right and cannot stand together."""

from collections.abc import Iterator

from megaarch.config import catalogue, validate_study
from megaarch.config.matmuls import head_size, key_heads, layer_products
from megaarch.config.schema import Data, Model, Settings, Training
from megaarch.config.validate_study import Conflict
from megaarch.errors import UserError


def conflicts(settings: Settings) -> Iterator[Conflict]:
    """Yields every conflict between these settings."""
    yield from _model(settings)
    if settings.study is None:  # each cell of a study is looked at with its own objective
        yield from _noise(settings.data)
        yield from _pair_limits(settings)
        yield from _relative_bias(settings.model)
    training, parallel = settings.training, settings.parallel
    if training.steps is not None and training.budget is not None:
        yield (
            ("training.steps", "training.budget"),
            "cannot be given together with training.budget: a budget sets the number of steps",
        )
    ranks = parallel.data_ranks
    if training.global_batch_tokens is not None:
        if training.global_batch_size != Training().global_batch_size:
            yield (
                ("training.global_batch_size", "training.global_batch_tokens"),
                "cannot be given together with training.global_batch_tokens, from which the rows of a "
                "step follow: leave one out",
            )
    elif training.global_batch_size % (training.micro_batch_size * ranks):
        yield (
            ("training.global_batch_size", "training.micro_batch_size"),
            f"{training.global_batch_size} rows do not divide into micro-batches of "
            f"{training.micro_batch_size} rows on {ranks} data-parallel ranks",
        )
    yield from _start(settings)
    yield from _float8(settings)
    if training.keep_every and (
        not training.save_every or training.keep_every % training.save_every
    ):
        yield (
            ("training.keep_every", "training.save_every"),
            f"{training.keep_every} is no multiple of save_every {training.save_every}: no "
            "checkpoint is written at these steps",
        )
    if settings.study:
        yield from validate_study.conflicts(settings.study, settings)


def _start(settings: Settings) -> Iterator[Conflict]:
    training = settings.training
    streams = catalogue.ARCHITECTURES[settings.model.architecture].streams
    starts = training.start_from is not None
    if training.start_optimizer and not starts:
        yield (
            ("training.start_optimizer", "training.start_from"),
            "is the state of the run that a new one starts from: give training.start_from (in a study, "
            "set it in a cell that has from), or leave it out",
        )
    if training.start_cross_attention == "random" and not (starts and len(streams) > 1):
        yield (
            ("training.start_cross_attention", "training.start_from", "model.architecture"),
            "is of an encoder_decoder that starts from a decoder: give training.start_from (in a "
            "study, set it in a cell that has from), or leave it out",
        )


def _float8(settings: Settings) -> Iterator[Conflict]:
    """Yields what float8 products do not go with. `parallel/float8.py` looks for torchao and at the
    device."""
    training, parallel, name = settings.training, settings.parallel, "training.float8"
    if training.float8 is None:
        if training.float8_emulate:
            yield ("training.float8_emulate", name), f"belongs to {name}: set that, or leave it out"
        return
    if training.precision != "bf16":
        yield (
            (name, "training.precision"),
            "what is not multiplied in float8 is bf16: set training.precision=bf16",
        )
    if parallel.engine == "deepspeed":
        yield (name, "parallel.engine"), "not with deepspeed: use parallel.engine=torch"
    if parallel.splits_backward:
        yield (
            (name, "parallel.schedule", "parallel.pipeline_parallel"),
            "zero_bubble splits a backward pass in two, and each would run all float8 products "
            "of both: use another schedule",
        )
    keys, tensor = key_heads(settings.model), parallel.tensor_parallel
    sharded = parallel.data_ranks * parallel.context_parallel > 1
    if training.float8 == "tensorwise" and keys < tensor and sharded:
        yield (
            (name, "model.kv_heads", "parallel.tensor_parallel"),
            f"tensorwise gathers weights in float8, and {tensor} tensor ranks that share {keys} "
            "key heads gather theirs a second time, in bf16: use rowwise",
        )
    yield from _float8_widths(settings)


def _float8_widths(settings: Settings) -> Iterator[Conflict]:
    model, ranks = settings.model, settings.parallel.tensor_parallel
    keys = max(key_heads(model), ranks)  # where ranks share one, each has a copy
    model = model.model_copy(update={"kv_heads": keys})
    streams = len(catalogue.ARCHITECTURES[model.architecture].streams)
    for of, product in layer_products(model, streams - 1).items():
        split = (1, ranks) if product.column else (ranks, 1)
        inputs, outputs = product.inputs / split[0], product.outputs / split[1]
        if inputs % 16 or outputs % 16:
            width = "feed_forward_size" if of in ("up", "down") else "hidden_size"
            among = f" on each of {ranks} tensor ranks" if ranks > 1 else ""
            yield (
                ("training.float8", f"model.{width}", "model.heads", "parallel.tensor_parallel"),
                "float8 products need widths that are multiples of 16, and those of a layer's "
                f"{of} are {inputs:g} and {outputs:g}{among}: change model.{width}, or leave it out",
            )
            return


def _model(settings: Settings) -> Iterator[Conflict]:
    model, data = settings.model, settings.data
    architecture = catalogue.ARCHITECTURES[model.architecture]
    accepted = catalogue.objectives_of(architecture.name)
    if data.objective not in accepted:
        runs = [a for a in catalogue.ARCHITECTURES if data.objective in catalogue.objectives_of(a)]
        yield (
            ("data.objective", "model.architecture"),
            f"{data.objective} does not run on the architecture {architecture.name}: it runs on "
            f"{' or '.join(runs)}, and {architecture.name} runs "
            f"{', '.join(accepted)}",
        )
    if model.head_size is None and model.hidden_size % model.heads:
        yield (
            ("model.heads", "model.hidden_size"),
            f"{model.heads} heads do not divide hidden_size {model.hidden_size}: "
            "change one, or give model.head_size",
        )
    if model.kv_heads and model.heads % model.kv_heads:
        yield (
            ("model.kv_heads", "model.heads"),
            f"{model.kv_heads} key heads do not divide {model.heads} heads",
        )
    exact = model.head_size or model.hidden_size % model.heads == 0
    axes = catalogue.position_axes(data.objective)
    if exact and model.position_encoding == "rope" and head_size(model) % (2 * axes):
        yield (
            ("model.head_size", "model.heads", "model.hidden_size"),
            f"rope over {axes} position axis(es) needs a head size divisible by {2 * axes}, "
            f"not {head_size(model)}",
        )
    if axes > 1 and model.position_encoding == "relative":
        yield (
            ("model.position_encoding", "data.objective"),
            f"relative positions have one axis and {data.objective} has {axes}: use rope",
        )
    if model.initializer == "t5x" and model.initial_deviation != Model().initial_deviation:
        yield (
            ("model.initial_deviation", "model.initializer"),
            "has no meaning under t5x, whose deviations follow from each parameter's shape: leave it out",
        )
    width = model.hidden_size
    if "rms_norm" in model.fused_kernels and width > (16384 if width % 8 == 0 else 4096):
        yield (
            ("model.fused_kernels", "model.hidden_size"),
            f"rms_norm takes a hidden_size up to 16384, or 4096 where it is no multiple of 8, not "
            f"{width}",
        )
    yield from _rope_scaling(model)
    yield from _lengths(settings)


def _rope_scaling(model: Model) -> Iterator[Conflict]:
    scaling, where = model.rope_scaling, "model.rope_scaling"
    if scaling is None:
        return
    if model.position_encoding != "rope":
        yield (
            (where, "model.position_encoding"),
            f"belongs to rope, and the position encoding is {model.position_encoding}",
        )
    original = scaling.original_length
    if (original is None) == (scaling.kind != "linear"):
        must = "has to be given for" if original is None else "has no meaning for"
        yield (f"{where}.original_length", f"{where}.kind"), f"{must} the kind {scaling.kind}"
    longest = max(model.sequence_length, model.target_length or 0)
    if scaling.kind == "dynamic" and original is not None and longest > original:
        yield (
            (f"{where}.original_length", "model.sequence_length", "model.target_length"),
            f"dynamic scaling takes rows of at most {original} tokens here, not {longest}: "
            "beyond that its frequencies would depend on the row",
        )
    if scaling.kind == "yarn" and model.rope_base <= 1:
        yield (
            ("model.rope_base", f"{where}.kind"),
            f"must be more than 1 for yarn, not {model.rope_base}",
        )
    for kind, low, high in (
        ("llama3", "low_frequency_factor", "high_frequency_factor"),
        ("yarn", "beta_slow", "beta_fast"),
    ):
        if scaling.kind == kind and getattr(scaling, low) >= getattr(scaling, high):
            yield (f"{where}.{low}", f"{where}.{high}"), f"must be less than {high}"


def _lengths(settings: Settings) -> Iterator[Conflict]:
    model, data = settings.model, settings.data
    architecture = catalogue.ARCHITECTURES[model.architecture]
    if len(architecture.streams) == 1:
        for name in ("encoder_layers", "decoder_layers", "target_length"):
            if getattr(model, name) is not None:
                yield (
                    (f"model.{name}", "model.architecture"),
                    f"belongs to an encoder_decoder; {architecture.name} has one stack",
                )
    if model.position_encoding == "learned" and (
        (model.learned_positions or model.sequence_length) < model.sequence_length
    ):
        yield (
            ("model.learned_positions", "model.sequence_length"),
            f"{model.learned_positions} positions are fewer than the "
            f"{model.sequence_length} tokens of a row",
        )
    if (data.kind == "supervised") != (data.objective == "supervised") and data.kind != "auto":
        yield (
            ("data.kind", "data.objective"),
            f"{data.kind} data and the objective {data.objective} do not go together",
        )


def _noise(data: Data) -> Iterator[Conflict]:
    """Yields settings that the objective does not have, or values that it cannot take."""
    objective = catalogue.OBJECTIVES[data.objective]
    for name, value in ((name, getattr(data, name)) for name in catalogue.NOISE):
        if value is None or value is False:
            continue
        try:
            objective.components(**{name: value})
        except UserError as error:
            yield (f"data.{name}", "data.objective"), str(error)


def _relative_bias(model: Model) -> Iterator[Conflict]:
    if model.position_encoding != "relative":
        return

    buckets, distance = model.relative_buckets, model.relative_max_distance
    rules = catalogue.ARCHITECTURES[model.architecture].bidirectional_bias
    faults = [bucket_fault(buckets, rule, distance) for rule in rules]
    if fault := next(filter(None, faults), None):
        yield ("model.relative_buckets", "model.relative_max_distance", "model.architecture"), fault


def bucket_fault(buckets: int, bidirectional: bool, max_distance: int) -> str | None:
    """Returns a sentence on what is wrong with these settings of a relative bias, or None."""
    parts = 4 if bidirectional else 2
    if 1 <= buckets // parts < max_distance:
        return None
    return (
        f"a relative bias of {buckets} buckets cannot reach {max_distance} tokens: give at least "
        f"{parts} buckets, and a distance of more than a {'quarter' if bidirectional else 'half'} "
        "of them"
    )


def _pair_limits(settings: Settings) -> Iterator[Conflict]:
    model, data = settings.model, settings.data
    given = {
        name: getattr(data, name)
        for name in ("max_input_length", "max_target_length")
        if getattr(data, name) is not None
    }
    if given and data.objective != "supervised":
        for name in given:
            yield (
                (f"data.{name}", "data.objective"),
                f"is a limit of supervised pairs; {data.objective} has none: leave it out",
            )
        return
    row = model.sequence_length
    if len(catalogue.ARCHITECTURES[model.architecture].streams) == 2:
        rooms = (("sequence_length", row), ("target_length", model.target_length or row))
        for name, (of, room) in zip(("max_input_length", "max_target_length"), rooms, strict=True):
            if given.get(name, 0) > room:
                yield (
                    (f"data.{name}", f"model.{of}", "model.sequence_length"),
                    f"{given[name]} tokens do not fit a row of {room}: raise model.{of}",
                )
        return
    need = given.get("max_input_length", 1) + given.get("max_target_length", 1)
    if given and need > row:
        yield (
            (*(f"data.{name}" for name in given), "model.sequence_length"),
            f"{need} tokens of input and target do not fit a row of {row}, which holds both: "
            "raise model.sequence_length",
        )
