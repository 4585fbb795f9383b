"""Every reader of a file, with a sound file that it reads: what the fuzz changes."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megaarch import cli, config
from megaarch.checkpoint import checkpoint, record
from megaarch.checkpoint.manifest import find_fault
from megaarch.cli import generate, report
from megaarch.cli.errors import user_sentence
from megaarch.engine import deepspeed_config
from megaarch.ingest.indexed_dataset import IndexedDataset
from megaarch.ingest.tasks.task import Task
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.interchange import files, pickled_metadata
from megaarch.interchange.convert import Conversion, convert
from megaarch.scaling import points
from megaarch.training.metrics import read_lines
from tests.fuzz import mutate

BOUND = 10.0  # seconds of processor time that one input may take


@dataclass(frozen=True)
class Reader:
    """file: in the folder that `read` is given. structured: JSON, whose values are changed too."""

    file: str
    read: Callable[[Path], object]
    structured: bool = False


def _yaml(folder: Path) -> object:
    return config.load_config(folder / "run.yaml")


def _report(folder: Path) -> object:
    options = cli.parser().parse_args(["report", str(folder), "--text"])
    return report.run(options)


def _progress(folder: Path) -> object:
    return record.read_record(folder / "step-00000003")


def _task(folder: Path) -> object:
    found = Task(folder / "tasks" / "pairs.task.yaml")
    asked = [found.questions(wording, 2, shots=1) for wording in found.wordings]
    return asked, list(found.pairs())


def _converted(folder: Path) -> object:
    output, silent = folder.with_name("converted"), lambda text: None
    shutil.rmtree(output, ignore_errors=True)
    return convert(Conversion(folder / "llama", output, "checkpoint", verify=False, say=silent))


READERS = {
    "configuration": Reader("run.yaml", _yaml),
    "configuration values": Reader("run.yaml", _yaml, structured=True),
    "progress.json": Reader("step-00000003/progress.json", _progress, structured=True),
    "manifest.json": Reader(
        "step-00000003/manifest.json",
        lambda folder: find_fault(folder / "step-00000003"),
        structured=True,
    ),
    "metadata.json": Reader(
        "step-00000003/state/metadata.json",
        lambda folder: dict(checkpoint.read_weights(folder / "step-00000003")),
        structured=True,
    ),
    "pickled metadata": Reader(
        "pickled", lambda folder: pickled_metadata.parse((folder / "pickled").read_bytes())
    ),
    "shard": Reader(
        "step-00000003/state/__0_0.distcp",
        lambda folder: dict(checkpoint.read_weights(folder / "step-00000003")),
    ),
    "results.json": Reader("results.json", _report, structured=True),
    "metrics.jsonl": Reader(
        "metrics.jsonl", lambda folder: list(read_lines(folder / "metrics.jsonl"))
    ),
    "SentencePiece": Reader("t.model", lambda folder: Tokenizer(folder / "t.model")),
    "tokenizer.json": Reader(
        "tokenizer.json", lambda folder: Tokenizer(folder / "tokenizer.json"), structured=True
    ),
    "idx": Reader("d.idx", lambda folder: IndexedDataset(folder / "d")),
    "safetensors": Reader(
        "model.safetensors",
        lambda folder: dict(files.read_safetensors(folder / "model.safetensors").weights),
    ),
    "safetensors index": Reader(
        "hf/model.safetensors.index.json",
        lambda folder: dict(files.read_hf(folder / "hf")[1]),
        structured=True,
    ),
    "deepspeed": Reader(
        "deepspeed.json",
        lambda folder: deepspeed_config.read(f"{folder}/deepspeed.json"),
        structured=True,
    ),
    "config.json": Reader("llama/config.json", _converted, structured=True),
    "task": Reader("tasks/pairs.task.yaml", _task),
    "task values": Reader("tasks/pairs.task.yaml", _task, structured=True),
    "promptsource": Reader("tasks/templates.yaml", _task),
    "items": Reader("tasks/items.jsonl", _task),
    "prompts": Reader(
        "prompts.jsonl", lambda folder: generate.read_prompts(f"{folder}/prompts.jsonl")
    ),
    "points": Reader("points.csv", lambda folder: points.read(folder / "points.csv")),
}


def tried(reader: Reader, sound: Path, folder: Path, seed: int) -> tuple[str, float]:
    """What an input of this seed gave ("accepted", "told", or the traceback's error), in seconds."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, symlinks=True)
    file = folder / reader.file
    content = file.read_bytes()
    if reader.structured and rng.random() < 0.75:
        if file.suffix == ".yaml":
            file.write_bytes(mutate.of_json(config.read_yaml(file), rng))
        else:
            file.write_bytes(mutate.of_json(json.loads(content), rng))
    else:
        file.write_bytes(mutate.of_bytes(content, rng))
    before = sorted(folder.rglob("*"))
    started, outcome = time.process_time(), "accepted"
    try:
        reader.read(folder)
    except Exception as error:
        sentence = user_sentence(error)
        outcome = f"{type(error).__name__}: {error}"[:200]  # a bug
        if sentence is not None:
            outcome = "told" if sentence else "told nothing"
    if sorted(folder.rglob("*")) != before:
        outcome = "wrote"
    return outcome, time.process_time() - started
