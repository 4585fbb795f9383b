"""A trace of some of a run's steps by torch's profiler, for Perfetto or chrome://tracing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from megaarch.config.schema import Logging
from megaarch.distributed.mesh import Grid

log = logging.getLogger(__name__)


@contextmanager
def traced(settings: Logging, grid: Grid, step: int) -> Iterator[Callable[[], None]]:
    """Yields a function that is to be called after each step. Writes the trace of `logging.profile_steps`
    steps from `logging.profile_from` on to `logging.directory`/profile, on each of `logging.profile_ranks`;
    where the run ends before them, that of the steps until then.

    step: the one that ended last. A run that begins within these steps traces what is left of them.
    """
    first = max(settings.profile_from, step + 1)
    end = settings.profile_from + settings.profile_steps
    if not settings.profile_from or end <= first or grid.global_rank not in settings.profile_ranks:
        yield lambda: None
        return

    def write(trace: profiler.profile) -> None:
        last = min(step + trace.step_num + 1, end - 1)  # the one that the run ended in, or the last
        name = f"steps-{first}-{last}.rank-{grid.global_rank}.json.gz"
        path = Path(settings.directory, "profile", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        log.info("wrote the trace of steps %d to %d to %s", first, last, path)

    before = first - 1 - step
    warmup = min(1, before)
    when = profiler.schedule(wait=before - warmup, warmup=warmup, active=end - first, repeat=1)
    with profiler.profile(schedule=when, on_trace_ready=write) as trace:
        yield trace.step
