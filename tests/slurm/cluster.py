"""A real SLURM cluster of four nodes on this machine, below one folder: munged, slurmctld, four
slurmd; and the site.sh that its jobs want. It reads no file of an installed cluster and leaves none
behind. Its job numbers follow from its ports, so that those of two clusters on one machine, and with
them the ports at which the jobs' processes meet, are not the same.

By hand: `python -m tests.slurm.cluster FOLDER` starts it, prints how to reach it and ends it with
Ctrl-C.
"""

import argparse
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES, CPUS = 4, 4
FIRST_PORT, LAST_PORT = 7000, 9900  # below those of connections and of jobs
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
SBIN = "/usr/sbin"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
FirstJobId={job}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=10
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
SITE = """\
# shellcheck shell=bash disable=SC2034
export PATH={programs}:$PATH
GPUS_PER_NODE=0
RANKS_PER_NODE=1
CPUS_PER_RANK=1
MAX_LOSSES=1
CPU_PARTITION=
CONTAINER=()
MPI=(mpiexec --allow-run-as-root)
# the four nodes are this machine, which does not know their names
export OMP_NUM_THREADS=1 MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
"""


def missing() -> str:
    """Why no cluster can run on this machine, or ""."""
    if lacking := [name for name in PROGRAMS if not _find(name)]:
        return f"no SLURM here ({', '.join(lacking)} not found): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd starts as root only, and this user is not root"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


class Cluster:
    """Use as a context manager. `environment`: variables under which SLURM's commands reach it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", *(f"spool/node{i + 1}" for i in range(NODES))):
            (folder / name).mkdir(parents=True)
        first = _free_ports(NODES + 1)
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(
            folder=folder,
            host=host,
            user=getpass.getuser(),
            nodes=NODES,
            cpus=CPUS,
            first=first,
            last=first + NODES - 1,
            port=first + NODES,
            job=8 * (first - FIRST_PORT) + 1,
        )
        (folder / "slurm.conf").write_text(text)
        programs = Path(sys.executable).parent
        (folder / "site.sh").write_text(SITE.format(programs=programs))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )
        self._wait("munged", lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for i in range(NODES):
            self._daemon("slurmd", "-D", "-N", f"node{i + 1}")
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        self._wait("all nodes", lambda: self._run(*idle).stdout.strip() == str(NODES))

    def __exit__(self, *_: object) -> None:
        """Ends the jobs, then the daemons, by their ids."""
        if len(self.daemons) > 1:
            self.clear()
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def clear(self) -> None:
        """Ends all jobs."""
        self._run("scancel", "--user", getpass.getuser())
        self._wait("jobs to end", lambda: not self._run("squeue", "-h").stdout, quiet=True)

    def run(self, *command: str) -> str:
        """What a command of SLURM prints. AssertionError where it fails."""
        done = self._run(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"{f.name}:\n" + "\n".join(f.read_text().splitlines()[-15:]) for f in files
        )

    def _run(self, *command: str) -> subprocess.CompletedProcess:
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}-{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    [_find(name), *arguments],
                    env=os.environ | self.environment,
                    stdout=out,
                    stderr=out,
                )
            )

    def _wait(self, what: str, ready, quiet: bool = False) -> None:
        until = time.monotonic() + 60
        while not ready():
            if time.monotonic() > until:
                if quiet:
                    return
                raise AssertionError(f"the cluster does not start ({what}):\n{self.logs()}")
            time.sleep(0.3)


def _free_ports(number: int) -> int:
    """The first of `number` ports in a row that nobody listens on. The search begins at a place of
    this process's own, for one that searches at the same time."""
    rows = list(range(FIRST_PORT, LAST_PORT, number))
    own = os.getpid() % len(rows)
    for first in rows[own:] + rows[:own]:
        sockets = [socket.socket() for _ in range(number)]
        try:
            for i, probe in enumerate(sockets):
                probe.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise AssertionError("no free ports for a cluster")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.slurm.cluster", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="new or empty; everything of the cluster is in it"
    )
    chosen = parser.parse_args().folder.absolute()
    if reason := missing():
        parser.error(reason)
    if chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
        parser.error(f"{chosen} is there already: give a new folder, or an empty one")
    with Cluster(chosen) as started:
        print(f"export SLURM_CONF={started.environment['SLURM_CONF']}")
        print(f"cp {started.folder / 'site.sh'} launch/", flush=True)
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigwait(ends)
