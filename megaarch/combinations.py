"""Settings that are each right and cannot stand together."""

import difflib
import re
from collections.abc import Iterator

from megaarch import catalogue
from megaarch.names import setting_names, unknown
from megaarch.settings import Settings

Fault = tuple[tuple[str, ...], str]  # the settings involved, the one to blame first; a sentence


def combinations(settings: Settings) -> Iterator[Fault]:
    """Every impossible combination in these settings."""
    yield from _model_combinations(settings)
    training, parallel = settings.training, settings.parallel
    if training.steps is not None and training.budget is not None:
        yield (
            ("training.steps", "training.budget"),
            ("cannot be given together with training.budget: a budget sets the number of steps"),
        )
    ranks = parallel.data_parallel_shard * parallel.data_parallel_replicate
    if training.global_batch_size % (training.micro_batch_size * ranks):
        yield (
            ("training.global_batch_size", "training.micro_batch_size"),
            (
                f"{training.global_batch_size} rows do not divide into micro-batches of "
                f"{training.micro_batch_size} rows on {ranks} data-parallel ranks"
            ),
        )
    if settings.study:
        yield from _study_combinations(settings)


def _model_combinations(settings: Settings) -> Iterator[Fault]:
    model, data = settings.model, settings.data
    architecture = catalogue.ARCHITECTURES[model.architecture]
    if data.objective not in architecture.objectives:
        runs = [a.name for a in catalogue.ARCHITECTURES.values() if data.objective in a.objectives]
        yield (
            ("data.objective", "model.architecture"),
            (
                f"{data.objective} does not run on the architecture {architecture.name}: it runs on "
                f"{' or '.join(runs)}, and {architecture.name} runs "
                f"{', '.join(architecture.objectives)}"
            ),
        )
    if model.head_size is None and model.hidden_size % model.heads:
        yield (
            ("model.heads", "model.hidden_size"),
            (
                f"{model.heads} heads do not divide hidden_size {model.hidden_size}: "
                "change one, or give model.head_size"
            ),
        )
    if model.kv_heads and model.heads % model.kv_heads:
        yield (
            ("model.kv_heads", "model.heads"),
            (f"{model.kv_heads} key heads do not divide {model.heads} heads"),
        )
    exact = model.head_size or model.hidden_size % model.heads == 0
    head_size = model.head_size or model.hidden_size // model.heads
    axes = catalogue.position_axes(data.objective)
    if exact and model.position_encoding == "rope" and head_size % (2 * axes):
        yield (
            ("model.head_size", "model.heads", "model.hidden_size"),
            (
                f"rope over {axes} position axis(es) needs a head size divisible by {2 * axes}, "
                f"not {head_size}"
            ),
        )
    if axes > 1 and model.position_encoding == "relative":
        yield (
            ("model.position_encoding", "data.objective"),
            (f"relative positions have one axis and {data.objective} has {axes}: use rope"),
        )
    yield from _lengths(settings)


def _lengths(settings: Settings) -> Iterator[Fault]:
    model, data = settings.model, settings.data
    architecture = catalogue.ARCHITECTURES[model.architecture]
    if len(architecture.streams) == 1:
        for name in ("encoder_layers", "decoder_layers", "target_length"):
            if getattr(model, name) is not None:
                yield (
                    (f"model.{name}", "model.architecture"),
                    (f"belongs to an encoder_decoder; {architecture.name} has one stack"),
                )
    if model.position_encoding == "learned" and (
        (model.learned_positions or model.sequence_length) < model.sequence_length
    ):
        yield (
            ("model.learned_positions", "model.sequence_length"),
            (
                f"{model.learned_positions} positions are fewer than the "
                f"{model.sequence_length} tokens of a row"
            ),
        )
    if (data.kind == "supervised") != (data.objective == "supervised") and data.kind != "auto":
        yield (
            ("data.kind", "data.objective"),
            (f"{data.kind} data and the objective {data.objective} do not go together"),
        )


_FOLDER = re.compile(r"\w[\w.+-]{0,99}")


def _study_combinations(settings: Settings) -> Iterator[Fault]:
    study, names = settings.study, set()
    valid = set(setting_names())
    for i, cell in enumerate(study.cells):
        where = f"study.cells.{i}"
        if cell.name in names:
            yield (f"{where}.name",), f"{cell.name!r} is the name of two cells"
        if not _FOLDER.fullmatch(cell.name):
            yield (f"{where}.name",), f"{cell.name!r} cannot be the name of a folder"
        if cell.start_from is not None and cell.start_from not in names:
            guess = difflib.get_close_matches(cell.start_from, names, 1)
            yield (
                (f"{where}.from",),
                (
                    f"no cell {cell.start_from!r} stands before this one"
                    + (f"; did you mean {guess[0]!r}?" if guess else "")
                ),
            )
        if cell.budget is not None and cell.start_from is None:
            yield (f"{where}.budget",), "is what a cell adds to its parent: give from, or leave it"
        for path in cell.set:
            if path in ("training.seed", "logging.directory"):
                yield (f"{where}.set",), f"{path} is the study's to set: leave it out"
            elif path not in valid or path.startswith("study"):
                yield (f"{where}.set",), unknown(path)
        names.add(cell.name)
    names = [size.name for size in study.sizes]
    for i, name in enumerate(names):
        if not _FOLDER.fullmatch(name):
            yield (f"study.sizes.{i}.name",), f"{name!r} cannot be the name of a folder"
    amounts = [f"{amount:.4g}" for amount in study.budgets]
    for key, values in (("sizes", names), ("budgets", amounts), ("seeds", study.seeds)):
        twice = sorted({str(v) for v in values if values.count(v) > 1})
        if twice:
            yield (f"study.{key}",), f"{', '.join(twice)} is given twice"
    if study.tune and study.rates:
        yield (
            ("study.tune", "study.rates"),
            ("cannot be given together with study.rates: a sweep chooses its own rates"),
        )
    for section in ("steps", "budget"):
        if getattr(settings.training, section) is not None:
            yield (f"training.{section}",), "a study sets it for each cell: leave it out"
