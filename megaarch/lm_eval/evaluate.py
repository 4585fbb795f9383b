"""Tasks of lm-evaluation-harness by their names, for `megaarch evaluate` and for studies."""

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megaarch.errors import UserError
from megaarch.lm_eval.command import register, restricted, told

if TYPE_CHECKING:
    from megaarch.inference.generate import Generator

ACCURACY = ("acc", "exact_match")  # metrics that say of an item whether it is right
GENERATES = "generate_until"


@dataclass(frozen=True)
class Found:
    """A metric of a task or group. error: its standard error; None: not known."""

    task: str
    metric: str
    value: float
    error: float | None


class Items(NamedTuple):
    """What a model got right of a task's items, by the first of the task's filters.

    right: by ACCURACY. normalized: by log-likelihoods over the lengths of choices, where the task measures
    that. matched: by exact matches, where these are the ACCURACY. chances: of guessing, where an answer is one of
    several.
    """

    right: list[float]
    normalized: list[float]
    matched: list[float]
    chances: list[float]


class Tasks:
    """Tasks and groups of the harness. include_path: a folder with some beside its own. UserError for a
    name that is not known."""

    def __init__(self, names: Sequence[str], include_path: str | None = None):
        with told():
            register()
            from lm_eval import __version__

            self.manager = _manager(include_path)
            self.names: list[str] = []
            for name in names:
                if not (known := self.manager.match_tasks([name])):
                    raise UserError(
                        f"tasks: {name} is neither a file or folder of tasks nor the name of a task of "
                        f"lm-evaluation-harness {__version__}; a task of that in a file of yours goes by "
                        "its name, with the folder as the include path"
                    )
                self.names += known

    def evaluate(self, run: Path, shots: int | None = None) -> list[Found]:
        """Returns what a run scores; on other processes than the one that reports, nothing.

        shots: answered examples before a question; None: as each task has it. UserError for data out of
        reach.
        """
        results = self._run(
            model="megaarch", model_args={"run": str(run)}, num_fewshot=shots, log_samples=False
        )
        if results is None:
            return []
        scored = results["results"] | results.get("groups", {})
        return [found for task, metrics in scored.items() for found in _metrics(task, metrics)]

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """The harness's tasks by their names, groups taken apart. UserError for data out of reach, and for a
        task that does not say of each item whether it is right."""
        with told(), restricted(), redirect_stderr(io.StringIO()):
            found = self.manager.load(self.names)["tasks"]
        for name, task in found.items():
            measured = [entry["metric"] for entry in task.config.metric_list or []]
            if not set(measured) & set(ACCURACY):
                raise UserError(
                    f"study.evaluation.tasks: {name} measures {', '.join(measured) or 'nothing'} and none of "
                    f"{', '.join(ACCURACY)}, which cells are compared by: megaarch evaluate RUN --tasks {name} "
                    "shows it"
                )
        return found

    @property
    def generating(self) -> list[str]:
        """The tasks whose answers are generated."""
        return [name for name, task in self.loaded.items() if task.OUTPUT_TYPE == GENERATES]

    def identity(self, most: int) -> dict[str, str]:
        """Maps each task to a digest of the questions and answers of its first `most` items."""
        found = {}
        with told(), restricted():
            for name, task in self.loaded.items():
                asked = [_asked(task, doc) for doc in islice(task.eval_docs, most)]
                text = json.dumps([task.VERSION, asked], default=str)
                found[name] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return found

    def score(
        self, generator: "Generator", shots: int, most: int, rows: int, text: int
    ) -> dict[str, Items]:
        """Returns what a model gets right of the first `most` items of each task, behind so many answered
        examples, in prompts and answers of at most `text` tokens. All processes of the model call this."""
        from megaarch.lm_eval.model import GeneratorLM

        with redirect_stderr(io.StringIO()):  # bars of progress, between those of a study's cells
            results = self._run(
                model=GeneratorLM(generator, rows=rows, quiet=True, text=text),
                num_fewshot=shots,
                limit=most,
                bootstrap_iters=0,
                log_samples=True,
            )
        return {name: _items(samples) for name, samples in results["samples"].items()}

    def _run(self, **arguments: Any) -> Any:
        with told(), restricted():
            import lm_eval

            evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its arguments
            return evaluate(tasks=self.names, task_manager=self.manager, **arguments)


@lru_cache(maxsize=4)
def _manager(include_path: str | None) -> Any:
    """Returns the harness's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include path {include_path} is no folder: give one with tasks in it")
    return TaskManager(include_path=include_path)


def _asked(task: Any, doc: Any) -> list[Any]:
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice else None
    return [task.doc_to_text(doc), task.doc_to_target(doc), choices]


def _items(samples: Sequence[dict[str, Any]]) -> Items:
    """Returns what the harness's samples of one task say of each item."""
    first = samples[0]["filter"]
    kept = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    metric = next(name for name in ACCURACY if name in kept[0])
    right = [float(s[metric]) for s in kept]
    choices = [len(s["resps"]) for s in kept]
    return Items(
        right,
        normalized=[float(s["acc_norm"]) for s in kept if "acc_norm" in s],
        matched=right if metric == "exact_match" else [],
        chances=[1 / number for number in choices] if max(choices) > 1 else [],
    )


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
