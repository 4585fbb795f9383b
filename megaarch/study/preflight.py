"""Whether every cell of a study can run, told before the first one starts.

What a configuration alone shows, the grid has told already. Here is what shows with the data: rows
that cannot be made, items that fit no row, a parent of another shape or with other positions, a
layout or a device that is not there.
"""

from collections.abc import Callable, Iterator

import numpy as np

from megaarch.config import ConfigError, catalogue
from megaarch.config.schema import Data, Settings, Study
from megaarch.data import conditional
from megaarch.data.converters import converter_of
from megaarch.data.rows import Rows
from megaarch.distributed import mesh
from megaarch.ingest.prepare import Prepared
from megaarch.model.count import parameter_shapes
from megaarch.model.positions import position_scheme, scheme_fault
from megaarch.parallel import float8, validate
from megaarch.study import lanes, yardsticks
from megaarch.study.grid import GridCell
from megaarch.study.score import row_limit
from megaarch.training import optimizer
from megaarch.training.trainer import device_of


def check(grid: list[GridCell], study: Study, base: Data) -> None:
    """ConfigError that names every cell which cannot run, and why. Budgets and seeds change
    nothing here, so a cell is looked at once for each size."""
    cells = {cell.key: cell for cell in grid}
    first = {(cell.name, cell.size): cell for cell in reversed(grid)}
    problems = []
    for cell in reversed(first.values()):
        named = f"cell {cell.name}" + (f" ({cell.size})" if cell.size else "")
        problems += [f"{named}: {said}" for said in _problems(cell, cells, study, base)]
    if problems:
        raise ConfigError(problems)


def _problems(
    cell: GridCell, cells: dict[str, GridCell], study: Study, base: Data
) -> Iterator[str]:
    settings = cell.settings
    yield from _said(lambda: validate.check(settings, mesh.processes(settings.parallel)))
    yield from _said(lambda: float8.check(settings.training, device_of(settings)))
    if settings.training.optimizer == "apex_adam":
        yield from _said(optimizer.fused_adam)
    if cell.parent:
        yield from _misfits(cell, cells[cell.parent])
    try:
        prepared = lanes.text_of(cell, base)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    seed = settings.training.seed
    yield from _said(lambda: Rows(settings.model, settings.data, prepared, seed))
    yield from _said(lambda: _score(settings, prepared, study, base))


def _said(action: Callable[[], object]) -> Iterator[str]:
    """What a user's mistake in `action` is told as."""
    try:
        action()
    except (ValueError, OSError) as error:
        yield str(error)


def _misfits(cell: GridCell, parent: GridCell) -> Iterator[str]:
    """Where the weights of the parent are not those of the cell, or would mean other places."""
    other = scheme_fault(
        *(position_scheme(c.settings.model, c.settings.data.objective) for c in (parent, cell))
    )
    if other:
        yield (
            f"cannot start from the weights of {parent.name}, to which positions mean something "
            f"else: {other}"
        )
    mine, theirs = (_shapes(c.settings) for c in (cell, parent))
    names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    if other:  # their tables are told with the scheme
        names = [name for name in names if not name.startswith(("positions.", "relative_bias."))]
    if names:
        name = names[0]
        yield (
            f"cannot start from the weights of {parent.name}: {name} is "
            f"{theirs.get(name, 'absent')} there and {mine.get(name, 'absent')} here "
            f"({len(names)} parameters differ)"
        )
    sizes = [c.settings.model.vocabulary_size for c in (cell, parent)]
    if sizes[0] != sizes[1]:
        yield (
            f"cannot start from the weights of {parent.name}: its vocabulary has {sizes[1]} ids and "
            f"not {sizes[0]}"
        )


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(settings.model, catalogue.position_axes(settings.data.objective))


def _score(settings: Settings, prepared: Prepared, study: Study, base: Data) -> None:
    """ValueError where the longest items do not fit a row."""
    model, objective, evaluation = settings.model, settings.data.objective, study.evaluation
    held = lanes.held_out(base, model.vocabulary_size, evaluation)
    items = [item for part in held.values() for item in part]
    vocabulary, pair = prepared.tokenizer.vocabulary, (objective, model.architecture)

    def longest(tasks: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        return max(tasks, key=lambda task: sum(map(len, task)))

    task = longest([(item.left, item.span) for item in items])
    examples = conditional.continuation(*pair, *task, vocabulary)
    if evaluation.middles and catalogue.OBJECTIVES[objective].middle is not None:
        task = longest([yardsticks.middle_task(item) for item in items])
        examples += conditional.middle(*pair, *task, vocabulary)
    converter = converter_of(model.architecture)
    row_limit(settings, [converter(example, vocabulary) for example in examples])
