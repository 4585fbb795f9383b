"""A study as a chain of SLURM jobs: prepare -> trials and cells, generation by generation -> report.

Cells of one generation and layout are one array job: task i is cell i of the study. Arrays run
side by side where the nodes hold both, each with a throttle, and behind each other where they do
not, so that a study never uses more nodes than it was given.
Every job waits for the success of what it needs; where that fails it is cancelled by SLURM, and
`status.py` says so. jobs.json in the study's folder keeps what was submitted.
"""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megaarch import config
from megaarch.cluster import slurm_commands
from megaarch.cluster.slurm_commands import Site
from megaarch.distributed import mesh
from megaarch.errors import UserError
from megaarch.files import LARGEST_TEXT, read_bytes, replacing
from megaarch.parallel.validate import check
from megaarch.study import sweep, sweep_grid
from megaarch.study.cells import StudyCell, expand, generations, study_of
from megaarch.study.folder import save_config
from megaarch.study.results import CellRecord
from megaarch.study.start import has_ended

# of site.sh; the CPU partition may refuse them, or never have them
FOR_GPUS = tuple(
    f"SBATCH_{name}"
    for name in (
        "CONSTRAINT",
        "CPUS_PER_GPU",
        "EXCLUSIVE",
        "GPUS",
        "GPUS_PER_NODE",
        "GPUS_PER_TASK",
        "GPU_BIND",
        "GPU_FREQ",
        "GRES",
        "GRES_FLAGS",
        "MEM_PER_GPU",
        "QOS",
        "RESERVATION",
    )
)


@dataclass(frozen=True)
class SlurmJob:
    """One job of the chain. id: SLURM's, 0 before it is submitted.

    kind: prepare, trial, cell or report. tasks: of an array, the key of each cell (and what a
    trial tries) by its number. needs: names of the jobs that must succeed before it; behind:
    of those that must have ended, so that there are nodes for it.
    """

    name: str
    kind: str
    nodes: int = 1
    ranks: int = 1  # of a node
    at_once: int = 1  # tasks of the array
    tasks: dict[int, str] | None = None
    needs: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    id: int = 0


JOBS = TypeAdapter(list[SlurmJob])  # of jobs.json


@dataclass(frozen=True)
class Request:
    """What a person asks for: nodes in use at a time, and the time limit of each job.

    options: more for sbatch, of the jobs that train. prepare_time: of the job that prepares the
    text; "": `time`.
    """

    nodes: int
    time: str
    options: tuple[str, ...] = ()
    prepare_time: str = ""


def plan(raw: config.Raw, directory: Path, site: Site, request: Request) -> list[SlurmJob]:
    """The chain for what is not finished yet. ConfigError where a cell's layout does not fit."""
    study, grid = study_of(raw), expand(raw, directory)
    _check(grid, directory, site, request)
    numbers = {cell.key: i for i, cell in enumerate(grid)}
    trials = sweep.trials(raw, directory, grid)
    left = unfinished(grid)
    if not left:
        return [SlurmJob("report", "report")]
    tuning = {cell.rate_key for cell in left}
    by_law = {cell.name for cell in left if not sweep_grid.holds(study, cell.size)}
    jobs: list[SlurmJob] = []
    home: dict[str, str] = {}  # the job of each cell
    for g, generation in enumerate(generations(grid)):
        keys, tuned_by = {cell.key for cell in generation}, []
        tried = [
            c for c in generation if c.tried(study) if c.rate_key in tuning or c.name in by_law
        ]
        for layout, group in _by_layout(tried):
            tasks = {
                i: f"{trial.key} {sweep_grid.label(trial.choice)}"
                for i, trial in enumerate(trials)
                if trial.choice and trial.key in {c.key for c in group}
            }
            jobs.append(_array(f"trials-{g}-{layout}", group, tasks, home, site))
            tuned_by.append(jobs[-1].name)
        for layout, group in _by_layout([cell for cell in left if cell.key in keys]):
            tasks = {numbers[cell.key]: cell.key for cell in group}
            job = _array(f"cells-{g}-{layout}", group, tasks, home, site)
            jobs.append(replace(job, needs=(*job.needs, *tuned_by)))
            home |= {cell.key: job.name for cell in group}
    report = SlurmJob("report", "report", needs=tuple(dict.fromkeys(home.values())))
    return [SlurmJob("prepare", "prepare"), *_in_waves(jobs, request.nodes), report]


def unfinished(grid: list[StudyCell]) -> list[StudyCell]:
    """The cells that are to run, with those that start from a diverged one which is to run again."""
    left: dict[str, StudyCell] = {}
    for cell in grid:  # parents before their children
        record = CellRecord.read(cell.folder)
        waits = record is not None and record.diverged is not None and cell.parent in left
        if waits or not has_ended(cell, record):
            left[cell.key] = cell
    return list(left.values())


def _by_layout(group: list[StudyCell]) -> Iterator[tuple[str, list[StudyCell]]]:
    """Cells whose layouts are the same, so that one array job serves them; the layout's name."""
    groups: dict[str, list[StudyCell]] = {}
    for cell in group:
        parallel = cell.settings.parallel
        sizes = {axis: getattr(parallel, name) for axis, name in mesh.AXES.items()}
        short = {"dp_replicate": "dp", "dp_shard": "fsdp"}
        named = [f"{short.get(axis, axis)}{size}" for axis, size in sizes.items() if size > 1]
        groups.setdefault("-".join(named) or "single", []).append(cell)
    yield from groups.items()


def _array(
    name: str, group: list[StudyCell], tasks: dict[int, str], home: dict[str, str], site: Site
) -> SlurmJob:
    """The array job of cells of one layout. home: names of the jobs of their parents."""
    parents = [home[cell.parent] for cell in group if cell.parent in home]
    needs = dict.fromkeys(["prepare", *parents])
    return SlurmJob(
        name, name.partition("s-")[0], *shape(group[0], site), tasks=tasks, needs=(*needs,)
    )


def _in_waves(jobs: list[SlurmJob], nodes: int) -> Iterator[SlurmJob]:
    """The jobs with throttles: as many side by side as `nodes` hold, the others behind these."""
    wave: list[str] = []
    before: tuple[str, ...] = ()
    free = nodes
    for job in jobs:
        if job.nodes > free or set(job.needs) & set(wave):
            wave, before, free = [], (*before, *wave), nodes
        at_once = min(free // job.nodes, len(job.tasks or ()))
        free -= at_once * job.nodes
        wave.append(job.name)
        yield replace(job, at_once=at_once, behind=before)


def shape(cell: StudyCell, site: Site) -> tuple[int, int]:
    """Nodes, and processes of a node, that the cell's layout takes. ConfigError where it leaves
    nodes half full."""
    number = mesh.processes(cell.settings.parallel)
    if number <= site.ranks_per_node:
        return 1, number
    if number % site.ranks_per_node:
        raise config.ConfigError(
            [
                f"cell {cell.key}: its layout is of {number} processes, which do not fill nodes "
                f"of {site.ranks_per_node} (RANKS_PER_NODE in {site.folder / 'site.sh'}): change "
                "one of them"
            ]
        )
    return number // site.ranks_per_node, site.ranks_per_node


def _check(grid: list[StudyCell], directory: Path, site: Site, request: Request) -> None:
    """ConfigError or UserError for what would fail hours later."""
    slurm_commands.pattern(directory)
    if request.nodes < 1:
        raise UserError(f"--nodes {request.nodes}: give at least 1")
    if request.prepare_time:
        slurm_commands.seconds(request.prepare_time, "--prepare-time")
    if slurm_commands.seconds(request.time) < 2 * site.warning_seconds:
        raise UserError(
            f"--time {request.time}: a job is told to save {site.warning_seconds} s before its limit "
            f"(WARNING_SECONDS in {site.folder / 'site.sh'}), so give at least "
            f"{math.ceil(2 * site.warning_seconds / 60)} minutes"
        )
    for cell in grid:
        check(cell.settings, mesh.processes(cell.settings.parallel))
        nodes, _ = shape(cell, site)
        if nodes > request.nodes:
            raise UserError(
                f"--nodes {request.nodes}: cell {cell.key} needs {nodes} nodes; give as many, or "
                "change its layout"
            )


def command(
    job: SlurmJob, directory: Path, site: Site, request: Request, ids: Mapping[str, object]
) -> list[str]:
    """The sbatch command of a job. ids: by name, of the jobs before it, as the command says them."""
    array = job.tasks is not None
    task = "%A_%a" if array else "%j_0"
    options = [
        f"--job-name={directory.absolute().name}-{job.name}",
        f"--output={slurm_commands.pattern(directory)}/jobs/{job.name}-{task}.log",
        f"--time={(job.kind == 'prepare' and request.prepare_time) or request.time}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks}",
        "--export=ALL",
    ]
    waits = [f"afterok:{ids[name]}" for name in job.needs]
    waits += [f"afterany:{ids[name]}" for name in job.behind if name not in job.needs]
    if waits:
        options += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"]
    if job.tasks is not None:
        options.append(f"--array={_ranges(job.tasks)}%{job.at_once}")
        if site.gpus_per_node:
            options.append(f"--gpus-per-node={min(job.ranks, site.gpus_per_node)}")
        options.append(f"--cpus-per-task={site.cpus_per_rank}")
        options += [f"--signal=USR1@{site.warning_seconds}", *request.options]
    unset = slurm_commands.job_variables()
    if site.cpu_partition and not array:
        options += [f"--partition={site.cpu_partition}", *site.cpu_options]
        unset += FOR_GPUS
    env = ["env", *(f"-u{name}" for name in unset)] if unset else []
    script = [str(site.folder / "study.sbatch"), job.kind, str(directory), str(site.folder)]
    return [*env, "sbatch", "--parsable", *options, *script]


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def submit(raw: config.Raw, directory: Path, site: Site, request: Request) -> list[SlurmJob]:
    """Submits the chain; returns it with its ids. UserError where an earlier one still runs."""
    jobs = plan(raw, directory, site, request)
    known = [job.id for job in read(directory)]
    queued = slurm_commands.queue(known)
    if known and queued is None:
        raise UserError(
            f"{directory}: squeue does not say whether jobs {' '.join(map(str, known))} of this "
            "study are still queued: submit where and when it answers"
        )
    if running := sorted({task.partition("_")[0] for task in queued or {}}):
        raise UserError(
            f"{directory}: jobs {' '.join(running)} of this study are still queued: wait for them, "
            f"or scancel {' '.join(running)}"
        )
    save_config(raw, directory)
    (directory / "jobs").mkdir(exist_ok=True)
    done: list[SlurmJob] = []
    try:
        for job in jobs:
            ids = {job.name: job.id for job in done}
            number = slurm_commands.submit(site, command(job, directory, site, request, ids))
            done.append(replace(job, id=number))
    finally:  # what is in the queue is known, also where SLURM refuses the rest
        write(directory, done)
    return done


def script(raw: config.Raw, directory: Path, site: Site, request: Request) -> str:
    """What `submit` would run, for a person to read: one sbatch command a job."""
    lines, ids = [f"source {shlex.quote(str(site.folder / 'site.sh'))}"], {}
    for job in plan(raw, directory, site, request):
        variable = job.name.replace("-", "_")
        text = " ".join(
            word if word.startswith("--dependency=") else shlex.quote(word)
            for word in command(job, directory, site, request, ids)
        )
        lines.append(f"{variable}=$({text})")
        ids[job.name] = f"${{{variable}}}"
    return "\n".join(lines)


def read(directory: Path) -> list[SlurmJob]:
    """The jobs that were submitted last; none where there are none."""
    path = directory / "jobs.json"
    try:
        return JOBS.validate_json(read_bytes(path, LARGEST_TEXT))
    except FileNotFoundError:
        return []
    except ValidationError:
        raise UserError(f"{path} is damaged: remove it (and scancel its jobs)") from None


def write(directory: Path, jobs: list[SlurmJob]) -> None:
    """Keeps the jobs as jobs.json."""
    with replacing(directory / "jobs.json") as aside:
        aside.write_bytes(JOBS.dump_json(jobs, indent=1))
