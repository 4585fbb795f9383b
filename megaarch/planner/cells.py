"""The cells of a study, or the one model of a plain configuration, with layouts of their own."""

from collections.abc import Iterator
from pathlib import Path

from megaarch import config
from megaarch.config.registry import nearest_of
from megaarch.config.schema import Settings
from megaarch.data import tokens_per_batch
from megaarch.errors import UserError
from megaarch.planner.search import PlannedLayout, counted, rows_a_step, search
from megaarch.planner.time import Cluster
from megaarch.study.cells import expand


def plans(
    raw: config.Raw, cluster: Cluster, gpus: int, top: int
) -> Iterator[tuple[str, PlannedLayout]]:
    """The `top` best plans of one model, without a name; of a study, the best plan of each cell, as
    it is found. UserError names the cell for which there is none."""
    if top < 1:
        raise UserError(f"--top {top}: must be at least 1")
    settings = config.resolve(raw)
    if settings.study is None:
        yield from (("", plan) for plan in search(settings, gpus, cluster)[:top])
        return
    for name, cell in cells(raw):
        try:
            yield name, search(cell, gpus, cluster)[0]
        except ValueError as error:
            raise UserError(f"cell {name}: {error}") from None


def cells(raw: config.Raw) -> Iterator[tuple[str, Settings]]:
    """Name and settings of each cell of a study, seeds left out; none without a study. Budgets tell apart cells
    that would else have one name."""
    study = config.resolve(raw).study
    if study is None:
        return
    for cell in expand(raw, Path("runs") / study.name):
        if cell.seed == study.seeds[0]:
            name = f"{cell.name}/{cell.size}" if cell.size else cell.name
            yield (name if len(study.budgets) == 1 else f"{name}-{cell.budget:.4g}"), cell.settings


def chosen(raw: config.Raw, cell: str | None, cluster: Cluster, gpus: int | None) -> Settings:
    """The settings to dry-run: of `cell` in a study; in the planner's best layout on `gpus` GPUs of
    `cluster` where they are given, else in their own. UserError for what cannot be."""
    settings = config.resolve(raw)
    if settings.study is not None:
        known = dict(cells(raw))
        if cell not in known:
            hint = nearest_of(cell or "", known) or f": one of {', '.join(known)}"
            raise UserError(f"--cell {cell}: names no cell of this study{hint}")
        settings = known[cell]
    elif cell is not None:
        raise UserError(f"--cell {cell}: this configuration is no study; leave it out")
    counted(settings)
    if gpus is not None:
        return search(settings, gpus, cluster)[0].settings
    if settings.training.global_batch_tokens is None:
        return settings
    return tokens_per_batch.in_rows(settings, rows_a_step(settings))
