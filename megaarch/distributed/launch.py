"""Joining the processes of a job, whoever started them: torchrun, srun or mpirun.

    torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    Open MPI   OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
    MPICH      PMI_RANK, PMI_SIZE, MPI_LOCALRANKID (Intel MPI and MVAPICH too)
    SLURM      SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID

SLURM_NTASKS does not count: it is the job's, also where one process runs alone (the script of
sbatch, the shell of salloc), and srun --preserve-env passes the job's on to a smaller step.
Where no MASTER_ADDR is given, SLURM's lists of nodes say where rank 0 is, and under mpirun rank 0
sends its address to the others through mpi4py.
"""

import itertools
import os
import pickle
import re
import resource
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from megaarch.distributed.gloo import use_one_thread
from megaarch.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=10)  # of a collective
PATIENCE = timedelta(hours=2)  # of one that waits for files
PREPARATION = timedelta(days=2)  # of what the main process does first
# A SLURM job's port follows from its number. It lies below those that systems give to connections
# (from 32768 on Linux, from 16000 in some sandboxes), which any program may hold.
FIRST_PORT, PORTS = 10000, 6000
MOST_DIGITS = 9  # of a number in the environment


class Process(NamedTuple):
    """A process of a job. local_rank: among the processes of its machine."""

    rank: int
    world_size: int
    local_rank: int


_STARTERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def find(environment: Mapping[str, str] = os.environ) -> tuple[str, Process]:
    """Returns which launcher started this process ("" for none), and its ranks. UserError where the
    variables contradict each other."""
    for starter, (rank, size, local) in _STARTERS.items():
        if rank not in environment or size not in environment:
            continue
        if starter == "mpich" and _is_srun(environment):
            continue
        number = _number(environment, rank)
        process = Process(number, _number(environment, size), _number(environment, local, number))
        if process.rank >= process.world_size:
            raise UserError(
                f"{rank} is {number} and {size} is {process.world_size}, and ranks count from 0: "
                "unset both, or start the command with torchrun, srun or mpirun"
            )
        return starter, process
    return "", Process(0, 1, 0)


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise UserError(f"{name} must be a whole number from 0, not {text!r}: unset it, or mend it")
    return int(text)


def _is_srun(environment: Mapping[str, str]) -> bool:
    """Whether MPICH's variables are srun's, which sets them on clusters whose default MPI is pmi2.

    Everything that is started below such a step inherits them, also an srun --mpi=none and a job
    that is submitted there. mpiexec also numbers the processes of a machine (MPI_LOCALRANKID).
    """
    step = [environment.get(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    if step == [environment["PMI_RANK"], environment["PMI_SIZE"]]:
        return True
    named = re.fullmatch(r"\d+\.\d+", environment.get("PMI_JOBID", ""))  # job and step
    return named is not None and "MPI_LOCALRANKID" not in environment


def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Process:
    """Initializes the process group of the job: NCCL on CUDA, gloo on CPU.

    One process alone needs no process group and gets none. Sets the variables of torchrun, which
    other libraries read. UserError where there is no address to meet at.

    The backend is NCCL alone, not torch's "cpu:gloo,cuda:nccl", which would connect the hosts of
    every group of the mesh too; `host_group` is the one group that does.
    """
    starter, process = find()
    bound = None  # NCCL connects to this device at once, and its barriers need not guess
    if device.type == "cuda":
        bound = torch.device("cuda", _gpu(process.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(bound)
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # segments that grow: batches of differing sizes leave no gaps behind
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    _allow_files()
    use_one_thread()
    if process.world_size == 1 or distributed.is_initialized():
        return process
    address, port = rendezvous(starter, process)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ |= {name: str(value) for name, value in zip(_STARTERS["torchrun"], process)}
    try:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
            device_id=bound,
        )
    except distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} of {socket.gethostname()}, at which the processes were to meet, is in use "
            "by another program: start again with MASTER_PORT set to a free one"
        ) from None
    return process


def _gpu(local_rank: int, visible: int) -> int:
    """Returns the number of a process's GPU: of its machine's, or the only one that its launcher lets it
    see."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"{socket.gethostname()} has {visible} GPUs that torch finds, and process {local_rank} of this "
            "machine (from 0) has none left: start fewer on it, or leave the machine out"
        )
    return local_rank


def _allow_files() -> None:
    """Lets this process open as many files as it may: gloo keeps one open for each other rank, and 1,024 is
    the usual limit that a shell hands on."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def first(action: Callable[[], Result]) -> Result:
    """Returns `action()`, which runs on the main process, and on the others once it is done there (it
    may take hours: preparing data). Its ValueError or OSError is raised on every process."""
    if not distributed.is_initialized():
        return action()
    # The store of the rendezvous needs no process group.
    store = PrefixStore("first", distributed_c10d._get_default_store())
    rank = distributed.get_rank()
    done = f"done/{store.add(f'calls/{rank}', 1)}"
    if rank != 0:
        store.wait([done], PREPARATION)
        if fault := pickle.loads(store.get(done)):
            raise fault
        return action()
    try:
        result = action()
    except (ValueError, OSError) as error:
        store.set(done, pickle.dumps(error))  # pyright: ignore[reportArgumentType]  # takes bytes too
        raise
    store.set(done, pickle.dumps(None))  # pyright: ignore[reportArgumentType]
    return result


def host_group() -> distributed.ProcessGroup:
    """Returns the group of all processes over gloo, for what is not training; its collectives may take
    hours. Made once: such a group connects every process with every other, a file descriptor each.
    Every process first calls this at the same point. One thread of a process uses it at a time."""
    return _host_group(distributed.group.WORLD)


@lru_cache(maxsize=1)
def _host_group(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, distributed.ProcessGroup)
    return group


def leave() -> None:
    """Destroys the process groups of `join`."""
    if distributed.is_initialized():
        _host_group.cache_clear()
        distributed.destroy_process_group()


def rendezvous(
    starter: str, process: Process, environment: Mapping[str, str] = os.environ
) -> tuple[str, int]:
    """Returns the host and port at which the processes meet: MASTER_ADDR where it is given."""
    job = _number(environment, "SLURM_JOB_ID") * 31 + _number(environment, "SLURM_STEP_ID")
    port = _number(environment, "MASTER_PORT", FIRST_PORT + job % PORTS)
    if not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT must be from 1 to 65535, not {port}")
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], port
    if starter == "slurm":
        return _first_node(environment), port
    if starter in ("openmpi", "mpich"):
        return _broadcast_address(process)
    raise UserError(
        "RANK and WORLD_SIZE are set and MASTER_ADDR is not: start with torchrun, or set "
        "MASTER_ADDR and MASTER_PORT to an address of rank 0's machine"
    )


def _first_node(environment: Mapping[str, str]) -> str:
    """Returns the node of rank 0 of a SLURM step. UserError where nothing says which one that is.

    The list of a step's nodes is sorted, and ranks follow it; but those of a heterogeneous job
    follow its components.
    """
    nodes = hosts(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
    if environment.get("SLURM_DISTRIBUTION") == "arbitrary" and len(nodes) > 1:
        raise UserError(
            "srun places these processes by a file of hosts, and SLURM's list of nodes does not say "
            "which one has rank 0: export MASTER_ADDR, the first host of that file"
        )
    for number in itertools.count():
        component = environment.get(f"SLURM_JOB_NODELIST_HET_GROUP_{number}")
        if component is None:
            break
        if here := [node for node in hosts(component) if node in nodes]:
            return here[0]
    return nodes[0]


def hosts(nodes: str) -> list[str]:
    """Returns the hosts of SLURM's list: "gpu[003-004,9],x" -> ["gpu003", "gpu004", "gpu9", "x"]."""
    found = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = re.split(r"\[([^\]]*)\]", name)  # every second one is what stood in brackets
        choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        found += map("".join, itertools.product(*choices))
    return found


def _numbers(ranges: str) -> list[str]:
    """ "003-004,9" -> ["003", "004", "9"]."""
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [f"{i:0{len(first)}}" for i in range(int(first), int(last or first) + 1)]
    return found


def _broadcast_address(process: Process) -> tuple[str, int]:
    world = mpi_world(
        "mpirun",
        process.world_size,
        missing="mpirun gives no address to meet at: pip install mpi4py, so that rank 0 can tell the "
        "others its own, or set MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=...)",
        instead="set MASTER_ADDR and MASTER_PORT",
    )
    own = None
    if process.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            own = socket.gethostname(), probe.getsockname()[1]
    return world.bcast(own, root=0)


def mpi_world(starter: str, size: int, *, missing: str, instead: str) -> Any:
    """Returns mpi4py's communicator of the `size` processes that `starter` started. UserError where
    there is no mpi4py (`missing`), and where it sees another number of them: reinstall it or `instead`."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(missing) from None
    if MPI.COMM_WORLD.Get_size() != size:
        raise UserError(
            f"{starter} started {size} processes and mpi4py sees {MPI.COMM_WORLD.Get_size()}: it "
            f"was built for another MPI; reinstall it, or {instead}"
        )
    return MPI.COMM_WORLD
