"""Checks that every cell of a study can run, before the first one starts.

`expand` has checked the configuration alone. Here is what needs the data too: rows that cannot be
made, items that fit no row, a parent of another shape, with other positions or of another tokenizer,
a layout or a device that is not there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from megaarch.checkpoint import checkpoint
from megaarch.checkpoint.record import read_record
from megaarch.config import ConfigError, catalogue
from megaarch.config.schema import Settings
from megaarch.data import conditional_forms, tokens_per_batch
from megaarch.data.dataset import Rows
from megaarch.data.feature_converters import converter_of
from megaarch.data.row_lengths import spans_of
from megaarch.distributed import mesh
from megaarch.errors import UserError
from megaarch.evaluation import tasks, yardsticks
from megaarch.evaluation.scorer import row_limit
from megaarch.ingest.prepared_data import Prepared
from megaarch.model import weight_transfer
from megaarch.model.parameter_count import parameter_shapes
from megaarch.model.positions import position_scheme, scheme_fault
from megaarch.parallel import float8, validate
from megaarch.study import start
from megaarch.study.cells import StudyCell
from megaarch.study.folder import StudyFolder
from megaarch.training import optimizer, resume
from megaarch.training.trainer import device_of

Task = TypeVar("Task", bound=tuple[np.ndarray, ...])


def check(folder: StudyFolder) -> None:
    """Raises a ConfigError that names every cell which cannot run, and why. Budgets and seeds change
    nothing here, so a cell is looked at once for each size."""
    first = {(cell.name, cell.size): cell for cell in reversed(folder.cells)}
    problems, unasked = [], list(_said(lambda: tasks.check_items(folder.study.evaluation)))
    answers = set() if unasked else tasks.answers(folder.study.evaluation)
    for cell in reversed(first.values()):
        named = f"cell {cell.name}" + (f" ({cell.size})" if cell.size else "")
        problems += [f"{named}: {said}" for said in _problems(cell, folder, answers)]
    if problems := problems + unasked:
        raise ConfigError(problems)


def _problems(cell: StudyCell, folder: StudyFolder, answers: set[str]) -> Iterator[str]:
    settings = cell.settings
    yield from _said(lambda: validate.check(settings, mesh.processes(settings.parallel)))
    yield from _said(lambda: float8.check(settings.training, device_of(settings)))
    if settings.training.optimizer == "apex_adam":
        yield from _said(optimizer.fused_adam)
    if cell.parent:
        parent = next(c for c in folder.cells if c.key == cell.parent)
        yield from _misfits(settings, parent.settings, parent.name)
    try:
        prepared = folder.text_of(cell)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    alike = [c for c in folder.cells if (c.name, c.size) == (cell.name, cell.size)]
    if (given := start.outside(cell)) and not all(map(start.has_run, alike)):
        yield from _unfit_start(settings, given, prepared)
    seed = settings.training.seed
    yield from _said(
        lambda: tokens_per_batch.rows_a_step(
            settings.training, Rows(settings.model, settings.data, prepared, seed)
        )
    )
    yield from _said(lambda: _check_items(settings, prepared, folder, answers))
    yield from _said(lambda: tasks.check(folder.study.evaluation, settings))


def _said(action: Callable[[], object]) -> Iterator[str]:
    """Yields the sentence of a user's mistake in `action`."""
    try:
        action()
    except (ValueError, OSError) as error:
        yield str(error)


def _unfit_start(settings: Settings, given: Path, prepared: Prepared) -> Iterator[str]:
    """Says why a cell cannot start from the outside checkpoint that it is given."""
    try:
        path = checkpoint.locate(given)
        saved = read_record(path)
    except (ValueError, OSError) as error:
        yield f"training.start_from: {error}"
        return
    tokenizer = prepared.tokenizer.fingerprint
    faults = list(_said(lambda: resume.check_parent(path, saved, settings, tokenizer)))
    yield from faults or _misfits(settings, resume.parent_settings(path, saved, settings), path)


def _misfits(settings: Settings, parent: Settings, name: str | Path) -> Iterator[str]:
    """Says how the parent's weights differ from the cell's in shape, or in what positions mean. name: of
    the parent."""
    other = scheme_fault(
        *(position_scheme(each.model, each.data.objective) for each in (parent, settings))
    )
    if other:
        yield (
            f"cannot start from the weights of {name}, to which positions mean something "
            f"else: {other}"
        )
    mine, theirs = (_shapes(each) for each in (settings, parent))
    try:
        found = weight_transfer.origins(parent, settings)
    except UserError as error:
        yield f"cannot start from the weights of {name}: {error}"
        return
    theirs = weight_transfer.renamed(found, theirs)
    mine = {name: shape for name, shape in mine.items() if name in found and found[name].whole}
    names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    if other:  # their tables are told with the scheme
        names = [name for name in names if not name.startswith(("positions.", "relative_bias."))]
    if names:
        first = names[0]
        yield (
            f"cannot start from the weights of {name}: {first} is "
            f"{theirs.get(first, 'absent')} there and {mine.get(first, 'absent')} here "
            f"({len(names)} parameters differ)"
        )
    sizes = [each.model.vocabulary_size for each in (settings, parent)]
    if sizes[0] != sizes[1]:
        yield (
            f"cannot start from the weights of {name}: its vocabulary has {sizes[1]} ids and "
            f"not {sizes[0]}"
        )


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    axes = catalogue.position_axes(settings.data.objective)
    return parameter_shapes(settings.model, axes)


def _check_items(
    settings: Settings, prepared: Prepared, folder: StudyFolder, answers: set[str]
) -> None:
    """UserError where the longest items, or the longest of the tasks' answers, do not fit a row."""
    model, objective, evaluation = settings.model, settings.data.objective, folder.study.evaluation
    held = folder.held_out(model.vocabulary_size)
    items = [item for part in held.values() for item in part]
    vocabulary, architecture = prepared.tokenizer.vocabulary, model.architecture

    def longest(items: list[Task]) -> Task:
        return max(items, key=lambda item: sum(map(len, item)))

    pairs = [(item.left, item.span) for item in items]
    scored = [longest(pairs), max(pairs, key=lambda pair: len(pair[1]))]
    if answers:
        answer = max(map(prepared.tokenizer.encode, answers), key=len)
        answer = np.append(answer, vocabulary.eos)  # which a finetuned cell's end in
        scored.append((answer[:1], answer))
    spans = spans_of(settings.data, model)
    form = objective, architecture
    examples = [
        example
        for left, span in scored
        for example in conditional_forms.continuation(*form, left, span, vocabulary, spans)
    ]
    if evaluation.middles and catalogue.OBJECTIVES[objective].middle is not None:
        left, span, right = longest([yardsticks.middle_task(item) for item in items])
        examples += conditional_forms.middle(*form, left, span, right, vocabulary, spans)
    converter = converter_of(architecture)
    row_limit(settings, [converter(example, vocabulary) for example in examples])
