"""Plans as a person and as a program read them."""

from dataclasses import asdict
from typing import Any

from megaarch.config.schema import Settings
from megaarch.planner.cells import StudyTotals
from megaarch.planner.dry_run import DryRun
from megaarch.planner.search import PlannedLayout, layout
from megaarch.training.memory_check import in_words

SET = (
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "data_parallel_shard",
    "data_parallel_replicate",
    "schedule",
    "stages_per_rank",
    "recompute",
    "reshard_after_forward",
)


def record(name: str, plan: PlannedLayout) -> dict[str, Any]:
    """One entry of `plan --json`. Bytes, seconds, shares."""
    return {
        "name": name,
        "layout": layout(plan.settings),
        "gpus": plan.gpus,
        "settings": overrides(plan),
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "seconds": asdict(plan.seconds) | {"total": plan.seconds.total},
        "limit": plan.seconds.limit,
        "mfu": plan.mfu,
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }


def overrides(plan: PlannedLayout) -> dict[str, Any]:
    """The settings of a plan, as `--set` takes them."""
    parallel, training = plan.settings.parallel, plan.settings.training
    chosen = {f"parallel.{name}": getattr(parallel, name) for name in SET}
    return chosen | {"training.micro_batch_size": training.micro_batch_size}


def heading(width: int) -> str:
    """Above the lines of plans. width: of the longest name of a cell, 0 without names."""
    return (
        (f"{'cell':<{width + 2}}" if width else "")
        + f"{'layout':<21}{'schedule':<13}{'rows':>5} {'recompute':<10}{'GB':>5}{'s/step':>9}"
        + f"{'MFU':>6}{'GPU-h':>9}{'days':>9}  limit"
    )


def line(name: str, plan: PlannedLayout, width: int) -> str:
    """A plan, within 97 columns behind the name."""
    parallel = plan.settings.parallel
    schedule = {"interleaved_1f1b": "interleaved", "zero_bubble": "zero bubble"}.get(
        parallel.schedule, parallel.schedule
    )
    hours = plan.gpu_hours
    cost = "-" if hours is None else f"{hours:.3g}" if hours < 1e6 else f"{hours:.2e}"
    days = "-" if plan.hours is None else f"{plan.hours / 24:.3g}"
    return (
        (f"{name:<{width + 2}}" if width else "")
        + f"{layout(plan.settings):<21}"
        + f"{schedule if parallel.pipeline_parallel > 1 else '-':<13}"
        + f"{plan.settings.training.micro_batch_size:>5} {parallel.recompute:<10}"
        + f"{plan.memory.total / 1e9:>5.0f}{plan.seconds.total:>9.3g}{plan.mfu:>6.1%}"
        + f"{cost:>9}{days:>9}  {plan.seconds.limit}"
    )


def details(plan: PlannedLayout) -> str:
    """What the best plan is made of, and the flags that choose it."""
    seconds = {k: v for k, v in asdict(plan.seconds).items() if v / plan.seconds.total > 5e-4}
    memory = asdict(plan.memory)
    flags = " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in overrides(plan).items()
    )
    return "\n".join(
        (
            "time:   " + ", ".join(f"{k} {v / plan.seconds.total:.1%}" for k, v in seconds.items()),
            "memory: " + ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in memory.items()),
            f"--set {flags}",
        )
    )


def study(found: StudyTotals) -> str:
    """What all cells of a study take together."""
    lines = [
        f"all {found.runs} runs: {found.gpu_hours:,.3g} GPU-hours, {found.hours / 24:.3g} days one after another",
        f"the longest: {found.longest}, {found.longest_hours / 24:.3g} days",
        f"checkpoints that stay: {in_words(found.disk)}",
    ]
    if found.sweep_gpu_hours:
        lines.insert(1, f"their sweep before that: {found.sweep_gpu_hours:,.3g} GPU-hours")
    return "\n".join(lines)


def dry_record(cell: str | None, settings: Settings, found: DryRun) -> dict[str, Any]:
    """What `dry-run --json` prints. Bytes."""
    return {"cell": cell, "layout": layout(settings), **asdict(found)}


def dry(found: DryRun) -> str:
    """A dry run for a terminal."""
    parts = ("parameters", "gradients", "optimizer", "activations")
    lines = [
        f"rank {found.rank} of {found.world_size}: a step of {found.micro_batches} micro-batch(es) "
        "comes to its end",
        f"peak {found.peak / 1e9:.2f} GB: "
        + ", ".join(f"{name} {getattr(found, name) / 1e9:.2f}" for name in parts),
        f"planned {found.planned / 1e9:.2f} GB ({found.planned / found.peak - 1:+.1%})",
        f"{'axis':<16}{'collective':<26}{'count':>8}{'MB handed in':>15}",
    ]
    for axis, name, count, size in found.messages:
        lines.append(f"{axis:<16}{name:<26}{count:>8}{size / 1e6:>15,.2f}")
    return "\n".join(lines)
