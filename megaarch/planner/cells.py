"""The cells of a study, or the one model of a plain configuration, with layouts of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megaarch import config
from megaarch.config.registry import nearest_of
from megaarch.config.schema import Settings
from megaarch.data import tokens_per_batch
from megaarch.errors import UserError
from megaarch.planner.search import PlannedLayout, counted, rows_a_step, search
from megaarch.planner.time import Cluster
from megaarch.study.cells import StudyCell, expand
from megaarch.study.costs import checkpoint_bytes, checkpoints, trials


@dataclass(frozen=True)
class StudyTotals:
    """What a whole study takes, its cells one after another on all GPUs. runs: cells and seeds. sweep_gpu_hours:
    of the trials before them. disk: bytes of the checkpoints that stay. longest: the cell of most hours."""

    runs: int
    gpu_hours: float
    sweep_gpu_hours: float
    hours: float
    disk: float
    longest: str
    longest_hours: float


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
    for name, cell in cells(raw).items():
        try:
            plan = search(cell.settings, gpus, cluster)[0]
        except ValueError as error:
            raise UserError(f"cell {name}: {error}") from None
        budget = cell.settings.training.budget
        assert plan.steps is not None and budget is not None, "a study gives every cell a budget"
        own = 1 - cell.inherited / budget.amount  # the rest its parents have spent
        yield name, replace(plan, steps=max(1, round(own * plan.steps)))


def totals(raw: config.Raw, found: Mapping[str, PlannedLayout]) -> StudyTotals:
    """The sums of a study over its cells and seeds. found: the plan of each cell, by its name."""
    study = config.resolve(raw).study
    assert study is not None
    seeds, hours, swept, disk = len(study.seeds), {}, 0.0, 0.0
    for name, cell in cells(raw).items():
        plan = found[name]
        assert plan.hours is not None and plan.steps is not None
        hours[name] = plan.hours
        if study.tune:
            swept += plan.hours * plan.gpus * study.tune.budget * trials(cell, study)
        stay = checkpoints(plan.settings.training, plan.steps)
        disk += seeds * stay * checkpoint_bytes(plan.settings)
    longest = max(hours, key=lambda name: hours[name])
    return StudyTotals(
        runs=seeds * len(hours),
        gpu_hours=seeds * sum(plan.gpus * hours[name] for name, plan in found.items()),
        sweep_gpu_hours=swept,
        hours=seeds * sum(hours.values()),
        disk=disk,
        longest=longest,
        longest_hours=hours[longest],
    )


def cells(raw: config.Raw) -> dict[str, StudyCell]:
    """The cells of a study by name, each with its first seed; none without a study. Budgets tell apart cells
    that would else have one name."""
    study, found = config.resolve(raw).study, {}
    if study is None:
        return found
    for cell in expand(raw, Path("runs") / study.name):
        name = f"{cell.name}/{cell.size}" if cell.size else cell.name
        name = name if len(study.budgets) == 1 else f"{name}-{cell.budget:.4g}"
        found.setdefault(name, cell)
    return found


def chosen(raw: config.Raw, cell: str | None, cluster: Cluster, gpus: int | None) -> Settings:
    """The settings to dry-run: of `cell` in a study; in the planner's best layout on `gpus` GPUs of
    `cluster` where they are given, else in their own. UserError for what cannot be."""
    settings = config.resolve(raw)
    if settings.study is not None:
        known = cells(raw)
        if cell not in known:
            hint = nearest_of(cell or "", known) or f": one of {', '.join(known)}"
            raise UserError(f"--cell {cell}: names no cell of this study{hint}")
        settings = known[cell].settings
    elif cell is not None:
        raise UserError(f"--cell {cell}: this configuration is no study; leave it out")
    counted(settings)
    if gpus is not None:
        return search(settings, gpus, cluster)[0].settings
    if settings.training.global_batch_tokens is None:
        return settings
    return tokens_per_batch.in_rows(settings, rows_a_step(settings))
