"""Every command with its flags, and command lines that a person could have meant by mistake."""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel

from megaarch import cli
from megaarch.config.schema import Settings
from megaarch.study import progress_bar
from megaarch.training import memory_check
from tests.fuzz.isolated import isolated
from tests.tools.run import module
from tools.planning import at_scale
from tools.throughput import arguments as benchmarks
from tools.throughput import command as benchmark
from tools.throughput import peers, pytest_cases

BOUND = 10  # seconds of processor time that one command line may take
LARGE, DEEP = 1 << 28, 64  # bytes and layers of a model beyond which it is checked and not built
BUSY = 3  # the same of a benchmark, whose work is as long as it is asked for: then it is accepted
PATIENCE = 300.0  # seconds by the clock, on a machine that others use
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "1000000", str(10**9), str(1 << 63), "9" * 40, "9" * 5000),
    *(
        "1e9",
        "1e308",
        "-1e308",
        "1e-300",
        "1e999",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "٣",
        "\uff11\uff12",
        "1_0",
        "0x10",
    ),
)
TEXTS = (
    *("", " ", "x", "a\0b", "\udcff", "é\u202e", "x" * 5000, "a=b", "-x", "--", "%j", "a,b", "~"),
    *(
        "true",
        "null",
        "[]",
        "{}",
        "[1, [2, {a: 3}]]",
        "{a: {b: {c: [1]}}}",
        "[" * 2000,
        "{a: " * 500,
    ),
    *("*a", "&a [*a]", "- a", "a: b", "'", "!!python/object:os.system x", "2026-11-28", ".nan"),
)
FILES = (
    *(
        "text.jsonl",
        "run.yaml",
        "study.yaml",
        "results.json",
        "t.model",
        "tokenizer.json",
        "d",
        "d.idx",
    ),
    *("points.csv", "prompts.jsonl", "tasks", "tasks/pairs.task.yaml", "tasks/templates.yaml"),
    *("run", "run/checkpoints", "hf", "made", "scale.json", "model.safetensors", ".", "..", "pipe"),
    *(
        "missing",
        "missing/below",
        "text.jsonl/below",
        "loop",
        "/dev/zero",
        "/dev/null",
        "/dev/stdin",
    ),
    *("/proc/self/mem", "/proc/none/out", "/dev/full", "/"),
)


@dataclass(frozen=True)
class Command:
    """main: takes arguments, returns the exit code. parser: of the flags of this command. sound:
    arguments that work. writes: what they may make in the folder. codes: exit codes that are told."""

    main: Callable[[list[str]], int]
    parser: argparse.ArgumentParser
    sound: tuple[str, ...]
    writes: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0, 2)

    @property
    def measures(self) -> bool:
        return "benchmark" in self.parser.prog


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _commands() -> Iterator[tuple[str, Command]]:
    run, small = "run.yaml", ("--set", "training.precision=bf16")
    cluster = ("--gpus", "2", "--gpus-per-node", "2", *small)
    sound = {
        "train": ((run,), ("out", "cache")),
        "compare": (("study.yaml", "--output", "made"), ("made", "cache")),
        "evaluate": (("run",), ("cache",)),
        "generate": (("run", "--prompt", "The river", "--max-tokens", "4"), ()),
        "report": ((".", "--text"), ("report.html",)),
        "probe": (("position", "run", "--rows", "4"), ("cache",)),
        "fit": (("--points", "points.csv", "--resamples", "20"), ()),
        "describe": ((run,), ()),
        "plan": ((run, *cluster), ()),
        "plan-inference": ((run, "--prompt", "8", "--answer", "4", *small), ()),
        "dry-run": ((run, *small), ()),
        "submit": (
            *(("study.yaml", "--nodes", "1", "--time", "10", "--launch", "launch", "--dry-run"),),
            ("runs", "cache"),
        ),
        "status": (("run",), ()),
    }
    for name, parser in _below(cli.parser()).items():
        if name == "lm-eval":  # its flags are another program's
            continue
        given, writes = sound[name]
        yield f"megaarch {name}", Command(cli.main, parser, (name, *given), writes)
    tools = {
        "convert": (("run", "converted"), ("converted",)),
        "preprocess": (
            ("--input", "text.jsonl", "--tokenizer", "t.model", "--output", "new"),
            tuple(
                f"new{end}"
                for end in (".bin", ".idx", ".manifest.json", ".heldout.jsonl", ".parts")
            ),
        ),
        "tokenizer": (
            ("--input", "text.jsonl", "--output", "new.model", "--vocabulary-size", "400"),
            ("new.model",),
        ),
        "benchmark_preprocess": (
            ("--input", "text.jsonl", "--tokenizer", "t.model", "--pairs", "1"),
            (),
        ),
    }
    for name, (given, writes) in tools.items():
        found = module(name)
        yield f"{name}.py", Command(found.main, found.parser(), given, writes)
    few = ("--output", "made", "--repetitions", "1")
    sound = {
        "attention": (
            "--tokens",
            "64",
            "--lengths",
            "32",
            "--head-sizes",
            "16",
            "--masks",
            "causal",
        ),
        "plans": ("--lengths", "64", "--rows", "2"),
        "fused": ("--tokens", "32", "--length", "16", "--width", "32", "--vocabulary-size", "64"),
        "train": (run, "--presets", "gpt", "--warm-up", "1"),
        "scaling": (run, "--presets", "gpt", "--warm-up", "1"),
        "data": (run, "--presets", "gpt"),
        "peers": (
            *(
                "--families",
                "llama",
                "--precisions",
                "fp32",
                "--hidden-size",
                "32",
                "--layers",
                "1",
            ),
            *(
                "--feed-forward-size",
                "48",
                "--vocabulary-size",
                "64",
                "--rows",
                "2",
                "--length",
                "16",
            ),
        ),
        "inference": (
            *("--presets", "gpt", "--families", "llama", "--batches", "1", "--turns", "2"),
            *("--hidden-size", "32", "--layers", "1", "--heads", "2", "--feed-forward-size", "48"),
            *("--vocabulary-size", "1024", "--length", "8", "--answer", "3"),
        ),
        "tests": ("missing.py",),
    }
    for name, parser in _below(benchmarks.parser()).items():
        arguments = (name, *sound[name], *few)
        written = ("made", "cache", "out")
        yield (
            f"benchmark.py {name}",
            Command(benchmark.main, parser, arguments, written, (0, 1, 2, 3)),
        )
    yield "at_scale", Command(at_scale.main, at_scale.parser(), ("scale.json",))


COMMANDS = dict(_commands())


def _settings(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The dotted name of every setting, with values that are its own: names, bounds, and a bit more."""
    for name, field in section.model_fields.items():
        own: list[str] = []
        yield f"{above}{name}", own
        for kind in _kinds(Annotated[field.annotation, field]):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _settings(kind, f"{above}{name}.")
            elif kind is bool:
                own += ["true", "false"]
            elif isinstance(kind, str):
                own.append(kind)
            elif isinstance(kind, int):
                own += [str(kind), str(kind + 1), str(kind - 1)]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types, names and bounds that an annotation has."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _kinds(inner)
        for rule in (rule for field in more for rule in getattr(field, "metadata", [field])):
            yield from getattr(rule, "names", ())
            yield from (
                getattr(rule, name) for name in ("gt", "ge", "lt", "le") if hasattr(rule, name)
            )
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


SETTINGS = {name: own for name, own in _settings(Settings) if "." in name}
KEYS = ("", ".", "a..b", "model", "model.", "model.layers.x", "study.cells.0", "__class__", "x.y.z")


def command_line(command: Command, rng: random.Random) -> list[str]:
    """The sound arguments with one to three mistakes."""
    given = list(command.sound)
    first = 1 if command.parser.prog.split()[-1] == next(iter(given), None) else 0  # its own name
    flags = [
        action
        for action in command.parser._actions
        if action.option_strings and action.dest not in ("help", "debug")
    ]
    sets = any(action.dest == "set" for action in flags)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        if sets and kind < 3:
            given += ["--set", _setting(rng)]
        elif flags and kind < 6:
            given += _flag(rng.choice(flags), rng)
        elif len(given) > first:
            at = rng.randrange(first, len(given))
            given[at : at + 1] = rng.choice(([], [given[at]] * 2, [_odd(rng)], [_odd(rng)]))
    return given


def _setting(rng: random.Random) -> str:
    if rng.random() < 0.05:
        return f"{rng.choice(KEYS)}={_odd(rng)}"
    name, own = rng.choice(list(SETTINGS.items()))
    return f"{name}={rng.choice(own) if own and rng.random() < 0.7 else _odd(rng)}"


def _flag(action: argparse.Action, rng: random.Random) -> list[str]:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [rng.choice(action.option_strings)]
    value = _odd(rng)
    if action.choices and rng.random() < 0.5:
        value = str(rng.choice(list(action.choices)))
    elif action.type not in (None, Path) and rng.random() < 0.7:
        value = rng.choice(NUMBERS)
    return [f"{action.option_strings[0]}={value}"]


def _odd(rng: random.Random) -> str:
    return rng.choice(rng.choice((NUMBERS, TEXTS, FILES)))


def tried(command: Command, sound: Path, folder: Path, seed: int) -> tuple[str, float, list[str]]:
    """What a command line of this seed gave ("accepted", "told", or the fault), in seconds of
    processor time, and the command line."""
    given = command_line(command, random.Random(seed))
    return *outcome_of(command, given, sound, folder), given


def outcome_of(command: Command, given: list[str], sound: Path, folder: Path) -> tuple[str, float]:
    """What these arguments give in `folder`, a fresh copy of the sound files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, symlinks=True)
    os.mkfifo(folder / "pipe")
    before = _look(folder)
    bound = BUSY if command.measures else BOUND
    found = isolated(lambda: _begun(command.main, given), folder, bound, PATIENCE)
    if command.measures and found.code == -signal.SIGKILL and found.seconds > bound - 0.5:
        return "accepted", found.seconds
    changed = {name for name, what in _look(folder).items() if before.get(name) != what}
    allowed = (
        *command.writes,
        *(
            part
            for word in given
            for part in (word, word.partition("=")[2], word.rpartition("=")[2])
        ),
    )
    outside = [
        n
        for n in sorted(changed | (before.keys() - _look(folder).keys()))
        if not _asked(n, allowed)
    ]
    if found.code < 0:
        return f"ended by signal {-found.code} after {found.seconds:.0f} s", found.seconds
    if "Traceback" in found.error or found.code not in command.codes:
        return f"code {found.code}: {found.error.strip()[-300:]}", found.seconds
    if found.code == 2 and not found.error.strip():
        return "told nothing", found.seconds
    if outside:
        return f"wrote {', '.join(outside[:5])}", found.seconds
    return "told" if found.code == 2 else "accepted", found.seconds


def _asked(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a file is one of these, or below one. What lies before a suffix counts."""
    return any(
        known
        and (Path(name).is_relative_to(os.path.normpath(known)) or name.startswith(known + "."))
        for known in allowed
        if "\0" not in known
    )


def _look(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if not path.is_dir() or path.is_symlink():
            found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    return found


def warm(sound: Path, folder: Path) -> None:
    """Imports here what the sound commands import, so that no fork of this process has to."""
    for command in COMMANDS.values():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder, symlinks=True)
        isolated(lambda given=command: _listed(given), folder, BOUND, PATIENCE)
        for name in (folder / "modules").read_text().split():
            if name not in sys.modules and not name.startswith("tools_"):
                with suppress(Exception):
                    importlib.import_module(name)


def _listed(command: Command) -> int:
    try:
        return _begun(command.main, list(command.sound))
    finally:
        Path("modules").write_text("\n".join(sys.modules))


class _Begun(BaseException):
    """A command has found its input right, and would work long from here."""


def _begun(main: Callable[[list[str]], int], given: list[str]) -> int:
    """Exit code of the command; 0 where a run has taken its first step, or starts with a model that
    is sound and large."""

    def stop(*_: object) -> None:
        raise _Begun

    def checked(settings: Settings, there: float, holder: str) -> None:
        check(settings, there, holder)
        need = memory_check.least_bytes(settings) + memory_check.activation_bytes(settings)
        if need > LARGE or settings.model.layers > DEEP:
            raise _Begun

    check, memory_check.check_training = memory_check.check_training, checked
    progress_bar.ProgressBar.update = peers.Apart.__init__ = pytest_cases.run = (
        stop  # the latter start processes
    )
    torch.compile = lambda function, **_: function
    benchmark.isolated = lambda run, problem, deadline: run(*problem, {}, deadline)
    try:
        return main(given)
    except _Begun:
        return 0
