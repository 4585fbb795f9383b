"""What SLURM is asked, and what it answers: sbatch, squeue, sacct."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megaarch
from megaarch.errors import UserError
from megaarch.files import check_regular

SCRIPTS = Path(megaarch.__file__).parents[1] / "launch"
# of site.sh, with their least; WARNING_SECONDS may lack
NUMBERS = {"GPUS_PER_NODE": 0, "RANKS_PER_NODE": 1, "CPUS_PER_RANK": 1, "WARNING_SECONDS": 1}
WARNING_SECONDS = 300
WARNING_MOST = 65535  # that sbatch --signal takes
# variables that do not come from a job around this process, but say where SLURM is
REACHES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
END = "end of site.sh"  # behind what it says
PATIENCE = 60  # seconds that it may take
MOST_DIGITS = 9  # of a number that a person or SLURM gives; int() refuses more than 4,300
TIME = re.compile(r"(?:(N)-)?(N)(?::(N))?(?::(N))?".replace("N", rf"\d{{1,{MOST_DIGITS}}}"))


@dataclass(frozen=True)
class Site:
    """A cluster as `folder`/site.sh describes it.

    cpu_partition: "" where there is but one. warning_seconds: between SIGUSR1 and the time limit of
    a job that trains. cpu_options: more for sbatch, of jobs in the CPU partition.
    """

    folder: Path
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_rank: int
    cpu_partition: str
    warning_seconds: int = WARNING_SECONDS
    cpu_options: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Site":
        """UserError where site.sh is not there, fails, or does not say what it must."""
        folder = folder.absolute()
        path = folder / "site.sh"
        if not path.exists():
            raise UserError(
                f"{path} does not exist: copy {folder / 'site.example.sh'} there and fill it in"
            )
        check_regular(path)
        names = " ".join(f'"${{{name}:-}}"' for name in (*NUMBERS, "CPU_PARTITION"))
        printed = f'printf "%s\\0" {names} "${{CPU_SBATCH_OPTIONS[@]}}" "{END}"'
        try:
            done = _run(
                ["bash", "-c", f'source "$0" >&2 && {printed}', str(path)], timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{path} does not come to its end within {PATIENCE} s") from None
        lines = done.stdout.split("\0")
        if done.returncode or END not in lines:
            told = done.stderr.strip()[-300:]
            raise UserError(
                f"{path} fails (code {done.returncode}): it must come to its end, without exit or "
                f"exec, and its last command must succeed{f': {told}' if told else ''}"
            )
        lines = lines[: lines.index(END)]  # a trap of its own may print behind it
        values = dict(zip(NUMBERS, lines, strict=False))
        values["WARNING_SECONDS"] = values["WARNING_SECONDS"] or str(WARNING_SECONDS)
        for name, least in NUMBERS.items():
            is_number = values[name].isdecimal() and len(values[name]) <= MOST_DIGITS
            if not is_number or int(values[name]) < least:
                raise UserError(
                    f"{path}: {name} must be a number from {least}, not {values[name]!r}"
                )
        gpus, ranks, cpus, warning = map(int, values.values())
        if warning > WARNING_MOST:
            raise UserError(f"{path}: WARNING_SECONDS must be {WARNING_MOST} at most")
        partition, *options = lines[len(NUMBERS) :]
        return cls(folder, gpus, ranks, cpus, partition, warning, tuple(filter(None, options)))


def submit(site: Site, command: list[str]) -> int:
    """Runs an sbatch command; returns the job's id. UserError with what sbatch says."""
    if not shutil.which("sbatch"):
        raise UserError("sbatch is not on this machine: submit from a login node of the cluster")
    source = f"source {shlex.quote(str(site.folder / 'site.sh'))} >&2"
    done = _run(["bash", "-c", f"{source} && exec {shlex.join(command)}"])
    told = " ".join(done.stderr.split())
    if done.returncode:
        raise UserError(f"SLURM refuses a job: {told}: {shlex.join(command)}")
    number = re.search(r"^(\d+)(?:;.*)?$", done.stdout, re.M)  # and the cluster's name
    if number is None:
        raise UserError(
            f"sbatch gives no number of a job: {' '.join(done.stdout.split()) or told or 'nothing'}: "
            f"{shlex.join(command)}"
        )
    return int(number[1])


def pattern(path: Path) -> str:
    """The path of a folder, in a name of a file that sbatch fills in ("%j"). UserError where it
    cannot be."""
    if "\\" in str(path):
        raise UserError(
            f"{path}: sbatch fills no job's number into the name of a log where its path has a "
            "backslash: give another folder"
        )
    return str(path).replace("%", "%%")


def job_variables() -> list[str]:
    """Names of the variables that a job around this process has set. A job that is submitted here
    would inherit them, and its srun take them for options: tasks of a node, distribution, memory."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return sorted(n for n in os.environ if n.startswith("SLURM_") and n not in REACHES)


def queue(jobs: list[int]) -> dict[str, tuple[str, str]] | None:
    """Returns the state of each task ("12_3") that is queued or runs, and the reason why it waits. None
    where there is no squeue, or it does not answer."""
    done = _ask(jobs, "squeue", "--noheader", "--array", "--format=%i|%T|%r")
    if done is None:
        return None
    if done.returncode:  # it says so of a job that has left its memory, where that is the only one
        return {} if "Invalid job id" in done.stderr else None
    lines = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") > 1)
    return {_task(job): (state, reason) for job, state, reason in lines}


def accounts(jobs: list[int]) -> dict[str, str]:
    """The state in which each task ended, where the cluster keeps accounts."""
    done = _ask(jobs, "sacct", "-X", "-n", "-P", "--array", "--format=JobID,State")
    if done is None or done.returncode:
        return {}
    lines = (line.split("|") for line in done.stdout.splitlines() if "|" in line)
    return {_task(job): state.split()[0] for job, state in lines if state.strip()}


def seconds(time: str, flag: str = "--time") -> int:
    """Returns the seconds of a time limit as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds. UserError, of the option `flag`, for
    anything else."""
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"{flag} {time}: give it as hours:minutes:seconds or days-hours")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # hours
    hours, minutes, rest = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _ask(jobs: list[int], *command: str) -> subprocess.CompletedProcess | None:
    """The command's answer about these jobs, as a whole: variables as SQUEUE_PARTITION would leave some out of
    it. None where there is no such command, or it does not answer."""
    if not jobs or not shutil.which(command[0]):
        return None
    own = ("SQUEUE_", "SACCT_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    try:
        asked = [*command, f"--jobs={','.join(map(str, jobs))}"]
        return _run(asked, env=environment, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess:
    """What it prints, as text; it reads nothing from the terminal."""
    given = {"capture_output": True, "text": True, "errors": "replace"} | more
    return subprocess.run(command, stdin=subprocess.DEVNULL, **given)


def _task(job: str) -> str:
    return job if "_" in job else f"{job}_0"
