"""Processes find each other under torchrun, srun and mpirun; the command runs as several."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed import distributed_c10d

from megaarch.checkpoint import checkpoint
from megaarch.cli import main
from megaarch.distributed import launch
from megaarch.distributed.gloo import use_one_thread
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.launch import Process, find, hosts, rendezvous
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.ingest.prepare import prepare
from megaarch.ingest.tokenizer import train_sentencepiece
from megaarch.training.trainer import Trainer, device_of
from tests.conftest import made_up_text
from tests.distributed import pool as pools
from tests.tools.run import tool


def task(rank, tasks, local, *, job=4, **more):
    """Variables of a task of a SLURM step, in an allocation of `job` tasks."""
    step = {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_STEP_NUM_TASKS": tasks}
    given = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": job, "SLURM_STEP_ID": 0, **step, **more}
    return {name: str(value) for name, value in given.items() if value is not None}


BATCH = task(0, None, 0, SLURM_STEP_ID=None)  # the script of sbatch has no step around it
SHELL = task(0, 1, 0, SLURM_STEP_ID=4294967290)  # of salloc, as an interactive step
LOGIN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}  # of salloc, where it has no step
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
PMI2 = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_JOBID": "7.0"}  # of srun --mpi=pmi2 --pty bash
ALONE = Process(0, 1, 0)

# Where a process runs, its variables (those of SLURM as version 22.05.8 sets them), who is found to
# have started it, and its place.
SITUATIONS = [
    ("a terminal", {}, "", ALONE),
    ("torchrun", TORCHRUN, "torchrun", Process(3, 4, 1)),
    ("mpirun of Open MPI", OPENMPI, "openmpi", Process(2, 4, 0)),
    ("mpiexec of MPICH", MPICH, "mpich", Process(5, 8, 1)),
    (
        "mpiexec without numbers on a machine",
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        "mpich",
        Process(1, 2, 1),
    ),
    ("srun", task(3, 4, 1), "slurm", Process(3, 4, 1)),
    ("srun of a part of the job's tasks", task(1, 2, 0, job=2), "slurm", Process(1, 2, 0)),
    ("srun --preserve-env of a part", task(1, 2, 0, job=6), "slurm", Process(1, 2, 0)),
    ("srun in a batch script, of more tasks", task(5, 8, 1, job=8), "slurm", Process(5, 8, 1)),
    ("srun over a heterogeneous job", task(2, 4, 0, SLURM_HET_SIZE=2), "slurm", Process(2, 4, 0)),
    ("sbatch, the script itself", BATCH, "", ALONE),
    ("salloc, its shell on the login node", LOGIN, "", ALONE),
    ("salloc, its shell as an interactive step", SHELL, "slurm", ALONE),
    ("srun --overlap there", task(3, 4, 0, SLURM_STEP_ID=1), "slurm", Process(3, 4, 0)),
    ("srun --overlap -n1 there", task(0, 1, 0, job=1), "slurm", ALONE),
    ("torchrun there", SHELL | TORCHRUN, "torchrun", Process(3, 4, 1)),
    ("mpirun of Open MPI there", SHELL | OPENMPI, "openmpi", Process(2, 4, 0)),
    ("mpiexec of MPICH there", SHELL | MPICH, "mpich", Process(5, 8, 1)),
    ("torchrun below srun", task(1, 2, 0) | TORCHRUN, "torchrun", Process(3, 4, 1)),
    ("mpirun in a batch script", BATCH | OPENMPI, "openmpi", Process(2, 4, 0)),
    ("mpiexec, which srun starts once a node", task(1, 2, 0) | MPICH, "mpich", Process(5, 8, 1)),
    (
        "srun --mpi=pmi2",
        task(3, 4, 1, PMI_RANK=3, PMI_SIZE=4, PMI_JOBID="7.0"),
        "slurm",
        Process(3, 4, 1),
    ),
    ("srun --mpi=pmi2 --pty bash", task(0, 1, 0, job=1) | PMI2, "slurm", ALONE),
    ("srun --mpi=none in that shell", task(1, 2, 1) | PMI2, "slurm", Process(1, 2, 1)),
    ("mpiexec of MPICH in that shell", task(0, 1, 0) | PMI2 | MPICH, "mpich", Process(5, 8, 1)),
    ("the script of an sbatch in that shell", BATCH | PMI2 | {"PMI_SIZE": "4"}, "", ALONE),
]


@pytest.mark.parametrize(
    "environment, starter, process",
    [row[1:] for row in SITUATIONS],
    ids=[row[0] for row in SITUATIONS],
)
def test_the_place_is_read_from_whoever_started_the_process(environment, starter, process):
    assert find(environment) == (starter, process)


def test_commands_run_alone_in_the_shell_of_an_allocation(raw, corpus, tmp_path, monkeypatch):
    """salloc -n4 on a site with interactive steps: no command takes the job's tasks for its own."""
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    run, study, tokenizer = tmp_path / "run", json.loads(json.dumps(raw)), tmp_path / "t.model"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(study))
    assert main(["train", str(path), "--set", "training.steps=1", f"logging.directory={run}"]) == 0
    assert main(["evaluate", str(run)]) == 0
    study["study"] = {"budgets": [1e6], "cells": [{"name": "gpt", "preset": "gpt"}]}
    del study["training"]["steps"]
    path.write_text(yaml.safe_dump(study))
    assert main(["compare", str(path), "--output", str(tmp_path / "study"), "--prepare"]) == 0
    train_sentencepiece([made_up_text(0, 40)], 300, 0, tokenizer)
    given = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--workers", "2"]
    assert tool("preprocess")([*given, "--output", str(tmp_path / "tokens")]) == 0


WRONG = [
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0, not 'x'"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0, not '-1'"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number from 0, not ''"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK must be a whole number"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2, and ranks count from 0"),
    ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK must be a whole number from 0, not '9"),
    (task("x", 2, 0), "SLURM_PROCID must be a whole number from 0, not 'x'"),
    (task(0, 2, 0, MASTER_PORT="x"), "MASTER_PORT must be a whole number from 0, not 'x'"),
    (task(0, 2, 0, MASTER_PORT=70000), "MASTER_PORT must be from 1 to 65535, not 70000"),
    (task(0, 2, 0, MASTER_PORT=0), "MASTER_PORT must be from 1 to 65535, not 0"),
    (TORCHRUN | {"RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not: start with torchrun"),
]


@pytest.mark.parametrize("environment, sentence", WRONG, ids=[row[1][:40] for row in WRONG])
def test_variables_that_cannot_be_are_one_sentence(
    environment, sentence, tiny, prepared, tmp_path, monkeypatch, capsys
):
    for name, value in (environment | {"SLURM_STEP_NODELIST": "localhost"}).items():
        monkeypatch.setenv(name, value)
    raw = tiny().model_dump(mode="json", exclude_none=True, exclude={"study"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    size = environment.get("WORLD_SIZE", environment.get("SLURM_STEP_NUM_TASKS"))
    layout = f"parallel.data_parallel_shard={size or 1}"
    given = ["--set", layout, "training.micro_batch_size=1"]
    assert main(["train", str(tmp_path / "run.yaml"), *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megaarch: ") and sentence in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "nodes, found",
    [
        ("node1", "node1"),
        ("node1,node2", "node1 node2"),
        ("gpu[003-005,009],x", "gpu003 gpu004 gpu005 gpu009 x"),
        ("gpu[9-11]", "gpu9 gpu10 gpu11"),
        ("rack[2-3]-ib,other", "rack2-ib rack3-ib other"),
        ("a,b[1-2]", "a b1 b2"),
        ("rack[1-2]node[3,5]", "rack1node3 rack1node5 rack2node3 rack2node5"),
    ],
)
def test_the_hosts_of_a_node_list(nodes, found):
    assert hosts(nodes) == found.split()


def test_the_meeting_point():
    process = Process(0, 8, 0)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "n[4-5]"}
    host, port = rendezvous("slurm", process, slurm)
    assert host == "n4" and 10000 <= port < 16000  # below what systems give to connections
    assert port != rendezvous("slurm", process, slurm | {"SLURM_STEP_ID": "2"})[1]
    # ranks of a heterogeneous job follow its components, and the list of nodes is sorted
    mixed = {f"SLURM_JOB_NODELIST_HET_GROUP_{i}": n for i, n in enumerate(("n[7-8]", "n[1-2]"))}
    both = slurm | mixed | {"SLURM_STEP_NODELIST": "n[1-2,8]"}
    assert rendezvous("slurm", process, both)[0] == "n8"
    assert rendezvous("slurm", process, both | {"SLURM_STEP_NODELIST": "n[1-2]"})[0] == "n1"
    placed = slurm | {"SLURM_DISTRIBUTION": "arbitrary"}
    with pytest.raises(ValueError, match="export MASTER_ADDR, the first host of that file"):
        rendezvous("slurm", process, placed)
    assert rendezvous("slurm", process, placed | {"SLURM_STEP_NODELIST": "n5"})[0] == "n5"
    given = {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    for starter in ("torchrun", "openmpi", "mpich", "slurm"):
        assert rendezvous(starter, process, slurm | given) == ("here", 1234)
    with pytest.raises(ValueError, match="MASTER_ADDR is not"):
        rendezvous("torchrun", process, {})


def test_mpirun_without_mpi4py_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match="pip install mpi4py"):
        rendezvous("openmpi", Process(0, 2, 0), {})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_may_open_as_many_files_as_its_limit_lets_it(ranks, monkeypatch):
    """Workers of the loader hand on each tensor as an open file, of one process too."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "MASTER_PORT": 29500}
    for name, value in {**given, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch.distributed, "init_process_group", lambda *_, **__: None)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        launch.join(torch.device("cpu"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_process_joins_nothing(monkeypatch):
    for names in launch._STARTERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert launch.join(torch.device("cpu")) == Process(0, 1, 0)
    assert not torch.distributed.is_initialized()


def one_after_another(path):
    def count():
        done = path.read_text() if path.exists() else ""
        path.write_text(done + "x")
        return len(done)

    return launch.first(count)


def refuse():
    def action():
        raise ValueError("no such data")

    try:
        launch.first(action)
    except ValueError as error:
        return str(error)


def test_the_main_process_goes_first_and_its_error_is_everyones(pool, tmp_path):
    found = pool.run(2, one_after_another, tmp_path / "count")
    assert found == [0, 1]
    assert pool.run(2, refuse) == ["no such data"] * 2


def threads_and_groups(settings):
    Grid.build(settings.parallel, "cpu")
    launch.host_group()
    groups = list(distributed_c10d._world.pg_map)
    for group in groups:
        torch.distributed.barrier(group)  # its thread runs, and has its name
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop\n"), len(groups)


@pytest.mark.parametrize("interface", ["", "lo"])
def test_each_group_of_gloo_has_one_thread(interface, pool, tiny):
    """Two write one string without a lock: about one run in a thousand under tensor parallelism died of it."""
    settings = tiny("gpt", parallel__tensor_parallel=2)
    given = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    [found, _] = pool.run(2, threads_and_groups, settings, environment=given)
    assert found[0] == found[1] > 2


def test_a_group_of_gloo_is_made_in_every_form_that_torch_takes():
    use_one_thread()
    make, place = torch.distributed.ProcessGroupGloo, (torch.distributed.HashStore(), 0, 1)
    options = make._Options()
    options._devices, options._threads = [make.create_default_device()], 3
    second = timedelta(seconds=1)
    for group in (make(*place), make(*place, timeout=second), make(*place, second)):
        assert group.size() == 1
    assert make(*place).options._threads == 1
    assert make(*place, options).options._threads == 3


def groups_of_all(folder, settings):
    """How many groups that connect every process with every other a run's beginning makes."""
    world, found = torch.distributed.get_world_size(), []
    honest = distributed_c10d._new_process_group_helper

    def counted(size, rank, ranks, backend, *args, **kwargs):
        made = honest(size, rank, ranks, backend, *args, **kwargs)
        if size == world and "gloo" in str(backend):
            found.append(kwargs.get("group_name"))
        return made

    distributed_c10d._new_process_group_helper = counted
    launch.first(lambda: None)
    launch.first(lambda: None)
    grid = Grid.build(settings.parallel, "cpu")
    with Heartbeat(grid, settings.training):
        trainer = Trainer(
            settings, prepare(settings.data, settings.model.vocabulary_size), grid=grid
        )
        trainer.save(wait=False)
        trainer.saver.finish()
        trainer.progress = trainer.progress.plus(step=1)
        trainer.save()
    assert checkpoint.newest(folder / "run", grid).name == "step-00000001"
    return len(found)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_makes_one_group_beside_its_mesh(background, pool, tiny, prepared, tmp_path):
    """Each takes a file descriptor for every other process: three exhaust them at 1024 ranks."""
    layout = {"parallel__data_parallel_shard": 2, "parallel__tensor_parallel": 2}
    settings = tiny(training__async_save=background, **layout)
    assert pool.run(4, groups_of_all, tmp_path, settings) == [1] * 4


def test_on_cuda_a_process_is_bound_to_its_device(monkeypatch):
    given = {}
    place = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *names, **more: given.update(more)
    )
    configured = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", configured.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    launch.join(torch.device("cuda"))
    assert configured == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")  # a user's own stays
    launch.join(torch.device("cuda"))
    assert len(configured) == 1
    assert given["device_id"] == torch.device("cuda", 1) == torch.device(given["current"])
    launch.join(torch.device("cpu"))
    assert given["device_id"] is None


def fail_on(rank):
    if torch.distributed.get_rank() == rank:
        raise KeyError("made up")
    torch.distributed.barrier()


def test_the_pool_names_the_rank_that_fails_dies_or_hangs(pool):
    with pytest.raises(pools.RankError, match=r"(?s)rank 1 of 2: Traceback.*KeyError: 'made up'"):
        pool.run(2, fail_on, 1)
    with pytest.raises(pools.RankError, match="rank 0 of 1: died with exit code 7"):
        pool.run(1, os._exit, 7)
    with pytest.raises(pools.RankError, match=r"no answer within 3 s from ranks \[0\]"):
        pool.run(1, subprocess.run, ["sleep", "60"], timeout=3.0)


def fault_unless(path, folder):
    found = sorted(file.name for file in folder.iterdir())
    if not path.exists():
        path.touch()
        (folder / "new").touch()
        (folder / "old").unlink()
        fault()
    return found


def fault():
    os.kill(os.getpid(), signal.SIGSEGV)


def test_the_pool_runs_again_where_a_rank_died_of_a_fault_and_warns(
    pool, tmp_path, tmp_path_factory
):
    """In the folder as it was: from what the first run left, the second would go on."""
    (tmp_path / "old").touch()
    once = tmp_path_factory.mktemp("marks") / "once"
    with pytest.warns(UserWarning, match=r"(?s)rank 0 of 1: died with exit code -11.*fault_unless"):
        assert pool.run(1, fault_unless, once, tmp_path) == [["old"]]
    with (
        pytest.warns(UserWarning, match="ran again"),
        pytest.raises(pools.RankError, match="exit code -11"),
    ):
        pool.run(1, fault)


def test_a_port_that_is_taken_is_one_sentence(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=rf"port {port} of .* is in use .* MASTER_PORT set to"):
            launch.join(torch.device("cpu"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(settings, tmp_path, environments, *more):
    """`megaarch train` once in each environment, at the same time; returns the finished ones."""
    path = tmp_path / "run.yaml"
    raw = settings.model_dump(mode="json", exclude_none=True, exclude={"study"})
    path.write_text(yaml.safe_dump(raw))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "megaarch", "train", str(path), *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    return [(p, *p.communicate(timeout=120)) for p in started]


def test_the_command_trains_under_srun_and_only_the_first_process_speaks(tiny, prepared, tmp_path):
    settings = tiny("t5", training__steps=2, parallel__data_parallel_shard=2)
    port = free_port()
    environments = [
        {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "MASTER_PORT": port,
        }
        for rank in range(2)
    ]
    first, second = command(settings, tmp_path, environments)
    assert first[0].returncode == second[0].returncode == 0, (first[2], second[2])
    assert first[1].startswith("2 steps in") and second[1] == ""
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_layout_that_does_not_fit_is_one_sentence(tiny, tmp_path):
    ((process, out, told),) = command(tiny(), tmp_path, [{}], "--set", "parallel.tensor_parallel=2")
    assert process.returncode == 2 and out == ""
    assert len(told.splitlines()) == 1 and "1 process was started" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("local_rank", "visible", "number"), [(7, 8, 7), (5, 1, 0)])
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one(local_rank, visible, number):
    assert launch._gpu(local_rank, visible) == number


def test_a_machine_that_has_lost_a_gpu_is_named():
    with pytest.raises(UserError, match="has 7 GPUs that torch finds, and process 7 of this"):
        launch._gpu(7, 7)


def test_without_the_gpus_that_slurm_gave_a_run_does_not_go_to_the_cpu(tiny, monkeypatch):
    settings = tiny("gpt", training__device="auto")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert device_of(settings).type == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="gave this job 8 GPUs on .*, and torch finds none"):
        device_of(settings)
    assert device_of(tiny("gpt")).type == "cpu"
