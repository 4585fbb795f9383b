"""Tasks of lm-evaluation-harness by their names, for `megaarch evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaarch.errors import UserError
from megaarch.harness.command import register, restricted, told


@dataclass(frozen=True)
class Found:
    """A metric of a task or group. error: its standard error; None: not known."""

    task: str
    metric: str
    value: float
    error: float | None


class Tasks:
    """Tasks and groups of the harness. include_path: a folder with some beside its own. UserError for a
    name that is not known."""

    def __init__(self, names: Sequence[str], include_path: str | None = None):
        with told():
            register()
            from lm_eval import __version__
            from lm_eval.tasks import TaskManager

            self.manager = TaskManager(include_path=include_path)
            self.names: list[str] = []
            for name in names:
                if not (known := self.manager.match_tasks([name])):
                    raise UserError(
                        f"--tasks: {name} is neither a file or folder of tasks nor the name of a task of "
                        f"lm-evaluation-harness {__version__}"
                    )
                self.names += known

    def evaluate(self, run: Path, shots: int | None = None) -> list[Found]:
        """Returns what a run scores; on other processes than the one that reports, nothing.

        shots: answered examples before a question; None: as each task has it. UserError for data out of
        reach.
        """
        with told(), restricted():
            import lm_eval

            evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its arguments
            results = evaluate(
                model="megaarch",
                model_args={"run": str(run)},
                tasks=self.names,
                num_fewshot=shots,
                task_manager=self.manager,
                log_samples=False,
            )
        if results is None:
            return []
        scored = results["results"] | results.get("groups", {})
        return [found for task, metrics in scored.items() for found in _metrics(task, metrics)]


def _metrics(task: str, metrics: Any) -> list[Found]:
    """Returns the metrics of a task, which the harness names "metric,filter" and "metric_stderr,filter"."""
    found = []
    for key, value in metrics.items():
        metric, _, rule = key.partition(",")
        if rule and isinstance(value, float) and not metric.endswith("_stderr"):
            error = metrics.get(f"{metric}_stderr,{rule}")
            name = metric if rule == "none" else f"{metric} ({rule})"
            found.append(Found(task, name, value, error if isinstance(error, float) else None))
    return found
