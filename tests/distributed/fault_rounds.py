"""Fault rounds: a run is killed at random moments, restarted, and must end as the unbroken run.

    python -m tests.distributed.fault_rounds --rounds 30 --output benchmarks/DATE-fault-rounds.json

A round takes one preset in one layout. A rank of the job, drawn at random, gets SIGKILL: in half of the
rounds within a save, else at any moment from the job's start on. The other ranks have to end
by themselves; the same command is started again, killed again while the round asks for it, and then
left to its end. All losses and gradient norms of the run and every tensor of its last checkpoint,
optimizer state too, must be those of the unbroken run in the same layout, bit for bit.
"""

import argparse
import copy
import hashlib
import json
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaarch import config
from megaarch.checkpoint import checkpoint, storage
from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.distributed.heartbeat import LOST
from megaarch.study.environment import environment
from tests.distributed.jobs import Job

PRESETS = tuple(catalogue.PRESETS)
LAYOUTS = {
    "one process": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "fsdp2": {"data_parallel_shard": 2},
}
STEPS, SAVE_EVERY = 8, 2
HEARTBEAT = 8.0  # seconds; less is taken for death where many share a processor
BOUND = 180.0  # seconds, within which the other ranks of a killed one have to be gone
MOST = 600.0  # seconds that a run may take
TRIES = 6  # kills until one has cut off a save; starts until a run ends


@dataclass
class Kill:
    """One SIGKILL. step: the last one in metrics.jsonl then. trained: whether this start of the job
    had come to its training. cut: the step whose save it cut off. codes: exit codes in rank order;
    None where a rank had to be ended from outside, which may be so only before training."""

    rank: int
    seconds: float
    step: int
    trained: bool
    cut: int | None
    codes: list[int | None]


@dataclass
class Round:
    """One round, and how it ended."""

    number: int
    preset: str
    layout: str
    async_save: bool
    within_a_save: bool
    kills: list[Kill] = field(default_factory=list)
    continued_from: list[int] = field(default_factory=list)
    given_up: int = 0
    loss: float = 0.0
    unbroken_loss: float = 0.0
    checksum: str = ""
    unbroken_checksum: str = ""
    faults: list[str] = field(default_factory=list)


def play(raw: dict[str, Any], number: int, seed: int, folder: Path) -> Round:
    """Play round `number`. raw: a small run's configuration. folder: an empty one."""
    rng = random.Random(f"{seed} {number}")
    preset, layout = PRESETS[number % len(PRESETS)], list(LAYOUTS)[number % len(LAYOUTS)]
    # each layout meets all four: at once and in the background, within a save and anywhere
    within_a_save, async_save = number // 4 % 2 == 0, number // 8 % 2 == 0
    played = Round(number, preset, layout, async_save, within_a_save)
    given = {"preset": preset, "layout": layout, "async_save": async_save}
    unbroken = settings_of(raw, directory=folder / "unbroken", **given)
    started = time.monotonic()
    wanted, _ = finish(unbroken, folder)
    usual = time.monotonic() - started
    broken = settings_of(raw, directory=folder / "broken", **given)
    for _ in range(TRIES):
        kill = kill_once(broken, folder, played.within_a_save, usual, rng)
        if kill is None:  # too late: the run had ended
            shutil.rmtree(folder / "broken")
            usual /= 2
            continue
        played.kills.append(kill)
        played.continued_from.append(newest_step(folder / "broken"))
        # a rank that dies behind the last step may leave others that have ended well
        fine = (LOST, -signal.SIGKILL) + ((0,) if kill.step == STEPS else ())
        if kill.trained and not all(code in fine for code in kill.codes):
            played.faults.append(f"exit codes {kill.codes} after SIGKILL to rank {kill.rank}")
        if kill.cut is not None or (not played.within_a_save and rng.random() < 0.5):
            break
    found, played.given_up = finish(broken, folder)
    played.loss, played.unbroken_loss = found.lines[-1][1], wanted.lines[-1][1]
    played.checksum, played.unbroken_checksum = found.checksum, wanted.checksum
    if found != wanted:
        played.faults.append("it does not end as the unbroken run")
    if not played.kills or (played.within_a_save and played.kills[-1].cut is None):
        played.faults.append("no kill hit its window")
    return played


def settings_of(
    raw: dict[str, Any], *, preset: str, layout: str, async_save: bool, directory: Path
) -> Settings:
    """Settings of a round's run."""
    mine = copy.deepcopy(raw)
    mine["model"]["preset"] = preset
    mine["training"] |= {
        "steps": STEPS,
        "micro_batch_size": 2,
        "save_every": SAVE_EVERY,
        "async_save": async_save,
        "heartbeat_timeout": HEARTBEAT,
    }
    mine["parallel"] = dict(LAYOUTS[layout])
    mine["logging"] |= {"directory": str(directory)}
    return config.resolve(mine)


@dataclass
class Outcome:
    """What two runs that are one and the same have in common."""

    lines: list[tuple[int, float, float]]  # step, loss, norm
    checksum: str


def finish(settings: Settings, folder: Path) -> tuple[Outcome, int]:
    """Start the run and let it come to its end; returns too how often it had to be started again,
    as its exit code asks for, because a rank had no turn for as long as the heartbeat allows."""
    starts, codes = 0, [LOST]
    while set(codes) == {LOST} and starts < TRIES:
        starts += 1
        with Job(settings, folder) as job:
            codes = job.wait(MOST)
    assert set(codes) == {0}, f"exit codes {codes}: {job.told}"
    directory = Path(settings.logging.directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    path = checkpoint.newest(directory)
    assert path.name.endswith(str(STEPS)), path
    kept = [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]
    return Outcome(kept, checksum_of(path)), starts - 1


def kill_once(
    settings: Settings, folder: Path, within_a_save: bool, usual: float, rng: random.Random
) -> Kill | None:
    """Start the run and kill a rank of it; None where the run had ended before.

    usual: seconds that the whole run takes.
    """
    directory = Path(settings.logging.directory)
    saves, metrics = directory / "checkpoints", directory / "metrics.jsonl"
    before = _changed(metrics)
    with Job(settings, folder) as job:
        started = time.monotonic()
        rank = rng.randrange(job.world_size)
        if within_a_save:
            due = [
                s for s in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY) if s > newest_step(directory)
            ]
            aside = checkpoint.place(directory, rng.choice(due)).with_suffix(".writing")
            while job.alive and not aside.exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
        else:
            moment = rng.uniform(0, usual)
            while job.alive and time.monotonic() - started < moment:
                time.sleep(0.001)
        step, trained = job.step(), _changed(metrics) != before
        job.kill(rank, signal.SIGKILL)
        seconds = time.monotonic() - started
        # while a job is starting, ranks may wait for each other as long as the rendezvous lets them
        codes = job.wait(BOUND if trained else HEARTBEAT)
    if codes[rank] != -signal.SIGKILL:
        return None
    cut = [int(p.stem.removeprefix("step-")) for p in saves.glob("step-*.writing")]
    return Kill(rank, round(seconds, 3), step, trained, cut[0] if cut else None, codes)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def newest_step(run: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0 where there is none."""
    path = checkpoint.newest(run)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def checksum_of(path: Path) -> str:
    """SHA-256 of every tensor of a checkpoint, weights and optimizer, by name."""
    tensors = dict(sorted(storage.read_whole(path / "state").items()))
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def small(folder: Path) -> dict[str, Any]:
    """The configuration of the rounds' runs, with a text of its own."""
    from tests.conftest import made_up_text

    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": made_up_text(i, 24)}) + "\n" for i in range(80)))
    return {
        "model": {
            "layers": 2,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "feed_forward_size": 48,
            "sequence_length": 48,
            "vocabulary_size": 512,
        },
        "data": {"source": str(text), "sentinels": 16, "cache": str(folder / "cache")},
        "training": {"global_batch_size": 8, "learning_rate": 3e-3, "device": "cpu"},
        "logging": {"tensorboard": False},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    rounds, where = [], environment()
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(play(small(Path(folder)), number, options.seed, Path(folder)))
        show(rounds[-1])
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result_of(rounds, where), indent=1) + "\n")
    equal = result_of(rounds, where)["equal"]
    print(f"{equal} of {options.rounds} rounds ended as the unbroken run")
    return 0 if equal == options.rounds else 1


def show(played: Round) -> None:
    """Print a round as a line."""
    kills = "; ".join(
        f"rank {kill.rank} after step {kill.step}"
        + (f" in the save of step {kill.cut}" if kill.cut else "")
        for kill in played.kills
    )
    state = ", ".join(played.faults) or "as unbroken"
    place = f"{played.number + 1:3} {played.preset:<10}{played.layout:<12}"
    print(f"{place}{kills}: {state}", flush=True)


def result_of(rounds: list[Round], where: dict[str, Any]) -> dict[str, Any]:
    """What is written of rounds: how they came about, their count, and each."""
    return {
        "command": shlex.join(["python", "-m", "tests.distributed.fault_rounds", *sys.argv[1:]]),
        "environment": where,
        "played": len(rounds),
        "equal": sum(not played.faults for played in rounds),
        "kills": sum(len(played.kills) for played in rounds),
        "kills_within_a_save": sum(kill.cut is not None for p in rounds for kill in p.kills),
        "rounds": [asdict(played) for played in rounds],
    }


if __name__ == "__main__":
    sys.exit(main())
