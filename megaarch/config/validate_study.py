"""What of a study cannot stand together: its cells, sizes and sweep."""

import re
from collections.abc import Iterator

from megaarch.config.registry import nearest_of
from megaarch.config.schema import ADAPTED, Data, Logging, Settings, Study, Training
from megaarch.config.suggest import flatten, setting_names, unknown_setting

Conflict = tuple[tuple[str, ...], str]  # the settings involved, the one to blame first; a sentence
# one for all cells of a study: what tells them apart, and what their shared yardsticks rest on
STUDYS_OWN = (
    "training.seed",
    "logging.directory",
    "data.cache",
    "data.sentinels",
    "data.tokenizer",
)
BATCH = "training.global_batch_tokens"
_FOLDER = re.compile(r"\w[\w.+-]{0,99}")


def conflicts(study: Study, settings: Settings) -> Iterator[Conflict]:
    """Yields every conflict within a study, or between it and the sections that all its cells share."""
    data, training = settings.data, settings.training
    names: set[str] = set()
    if not _FOLDER.fullmatch(study.name):
        yield ("study.name",), f"{study.name!r} cannot be the name of a folder"
    for i, cell in enumerate(study.cells):
        where = f"study.cells.{i}"
        if cell.name in names:
            yield (f"{where}.name",), f"{cell.name!r} is the name of two cells"
        if not _FOLDER.fullmatch(cell.name):
            yield (f"{where}.name",), f"{cell.name!r} cannot be the name of a folder"
        if cell.start_from is not None and cell.start_from not in names:
            hint = nearest_of(cell.start_from, names)
            yield (f"{where}.from",), f"no cell {cell.start_from!r} stands before this one{hint}"
        if cell.budget is not None and cell.start_from is None:
            yield (f"{where}.budget",), "is what a cell adds to its parent: give from, or leave it"
        starts = cell.start_from is not None
        yield from _cell_settings(f"{where}.set", cell.set, study, data, starts)
        names.add(cell.name)
    if study.adapt:
        yield from _cell_settings("study.adapt.set", study.adapt.set, study, data, True)
        for name in sorted(name for name in names if name + ADAPTED in names):
            yield (
                ("study.adapt",),
                f"makes a cell {name + ADAPTED!r}, and one of that name is there: rename it",
            )
    sizes = [size.name for size in study.sizes]
    for i, name in enumerate(sizes):
        if not _FOLDER.fullmatch(name):
            yield (f"study.sizes.{i}.name",), f"{name!r} cannot be the name of a folder"
    tune = study.tune.model_dump() if study.tune else {}
    for key, form, values in (  # forms: as the names of folders have them
        ("sizes", "{}", sizes),
        ("budgets", "{:.4g}", study.budgets),
        ("seeds", "{}", study.seeds),
        *((f"tune.{n}", "{:.3g}", tune.get(n, [])) for n in ("learning_rates", "encoder_shares")),
        *((f"tune.{n}", "{}", tune.get(n, [])) for n in ("global_batch_tokens", "sizes")),
        ("evaluation.shots", "{}", study.evaluation.numbers_of_shots),
    ):
        written = [form.format(value) for value in values]
        if twice := sorted({value for value in written if written.count(value) > 1}):
            rounded = ", as folders are named" if "g" in form else ""
            yield (f"study.{key}",), f"{', '.join(twice)} is given twice{rounded}"
    yield from _sweep(study)
    for section in ("steps", "budget"):
        if getattr(training, section) is not None:
            yield (f"training.{section}",), "a study sets it for each cell: leave it out"
    if training.seed != Training().seed:
        yield ("training.seed",), "a study's cells have the seeds of study.seeds: give it there"
    if settings.logging.directory != Logging().directory:
        yield (
            ("logging.directory",),
            "a study's folder is runs/NAME, or what --output says: leave it out",
        )


def _sweep(study: Study) -> Iterator[Conflict]:
    """Yields what a sweep cannot try in its study."""
    if study.tune is None:
        return
    sizes = [size.name for size in study.sizes]
    for name in study.tune.sizes:
        if name not in sizes:
            yield (
                ("study.tune.sizes",),
                f"{name!r} is no size of the study{nearest_of(name, sizes)}",
            )
    if study.rates:
        yield (
            ("study.tune", "study.rates"),
            "cannot be given together with study.rates: a sweep chooses its own rates",
        )
    starts = study.adapt or any(cell.start_from for cell in study.cells)
    if study.tune.encoder_shares and starts:
        yield (
            ("study.tune.encoder_shares",),
            "cannot be tried where cells start from others (from, study.adapt), whose layers are then "
            "given: sweep the parents in a study of their own, and give this one study.rates",
        )


def _cell_settings(
    where: str, given: dict[str, object], study: Study, data: Data, starts: bool
) -> Iterator[Conflict]:
    """Yields what a cell of the study cannot set. starts: whether it starts from another cell."""
    flat = flatten(given)
    if study.tune and flat.get("training.start_optimizer"):
        yield (
            (where, "study.tune"),
            "a cell that takes its parent's optimizer along (training.start_optimizer) has its "
            "rate too: sweep the parents in a study of their own, and give this one study.rates",
        )
    valid = set(setting_names())
    for path in flat:
        if path in STUDYS_OWN:
            yield (where,), f"{path} is the study's to set: leave it out"
        elif path.startswith("training.budget"):
            yield (
                (where,),
                f"{path} is the study's to set (study.budgets, study.match; of a cell that starts from "
                "another its budget): leave it out",
            )
        elif path == "training.start_from" and starts:
            yield (where,), f"{path} is the cell that from names: leave one of them out"
        elif path == BATCH and study.tune and study.tune.global_batch_tokens:
            yield (
                (where, "study.tune.global_batch_tokens"),
                f"{path} is tried by the sweep (study.tune): leave one of them out",
            )
        elif path == "model.vocabulary_size" and data.tokenizer is None:
            yield (
                (where,),
                f"{path} is the study's to set, for the tokenizer that cuts the items of "
                "all cells is trained to it: leave it out, or give data.tokenizer",
            )
        elif path not in valid or path.startswith("study"):
            yield (where,), unknown_setting(path)
