"""Processes find each other under torchrun, srun and mpirun; the command runs as several."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from torch.distributed import distributed_c10d

from megaarch.data.prepare import prepare
from megaarch.parallel import launch
from megaarch.parallel.heartbeat import Heartbeat
from megaarch.parallel.launch import Place, find, first_host, rendezvous
from megaarch.parallel.mesh import Grid
from megaarch.training import checkpoint
from megaarch.training.trainer import Trainer
from tests.distributed import pool as pools

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, ("", Place(0, 1, 0))),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("torchrun", Place(3, 4, 1))),
        (OPENMPI, ("openmpi", Place(2, 4, 0))),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("mpich", Place(1, 2, 1))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, ("slurm", Place(5, 8, 1))),
        (  # srun on a cluster whose default MPI is pmi2
            SLURM | {"SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "5", "PMI_SIZE": "8"},
            ("slurm", Place(5, 8, 1)),
        ),
        (  # MPICH's mpiexec, which starts one process a node with srun
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "5", "PMI_SIZE": "8"},
            ("mpich", Place(5, 8, 5)),
        ),
        (SLURM, ("", Place(0, 1, 0))),  # the script of sbatch, with no srun around the command
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"} | OPENMPI, ("openmpi", Place(2, 4, 0))),
        (
            SLURM
            | {"SLURM_STEP_NUM_TASKS": "8", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            ("torchrun", Place(0, 2, 0)),  # srun starts torchrun, which starts this
        ),
    ],
)
def test_the_place_is_read_from_whoever_started_the_process(environment, wanted):
    assert find(environment) == wanted


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-005,009],x", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("rack[2-3]-ib,other", "rack2-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_the_meeting_point():
    place = Place(0, 8, 0)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "n[4-5]"}
    host, port = rendezvous("slurm", place, slurm)
    assert host == "n4" and 10000 <= port < 16000  # below what systems give to connections
    assert port != rendezvous("slurm", place, slurm | {"SLURM_STEP_ID": "2"})[1]
    given = {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    for starter in ("torchrun", "openmpi", "mpich", "slurm"):
        assert rendezvous(starter, place, slurm | given) == ("here", 1234)
    with pytest.raises(ValueError, match="MASTER_ADDR is not"):
        rendezvous("torchrun", place, {})


def test_mpirun_without_mpi4py_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match="pip install mpi4py"):
        rendezvous("openmpi", Place(0, 2, 0), {})


def test_one_process_joins_nothing(monkeypatch):
    for names in launch._STARTERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert launch.join(torch.device("cpu")) == Place(0, 1, 0)
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
        trainer.progress = replace(trainer.progress, step=1)
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
