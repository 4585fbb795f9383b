"""A folder of sound files, one for each reader, and what commands need."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch.distributed.checkpoint as dcp
import yaml
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megaarch import config
from megaarch.checkpoint import checkpoint
from megaarch.ingest.indexed_dataset import writing_dataset
from megaarch.ingest.prepare import prepare
from megaarch.interchange import files
from megaarch.interchange.convert import Conversion, convert
from megaarch.training.trainer import Trainer
from tests.conftest import tiny_raw, write_corpus
from tests.study.example_results import example_results

ROOT = Path(__file__).parents[2]


def make(folder: Path) -> Path:
    """Trains a tiny run of three steps; returns the folder with its files and all others. Every path
    in them is relative to that folder, so that a copy of it is one of its own."""
    sound = folder / "sound"
    sound.mkdir()
    with contextlib.chdir(sound):
        trainer = _trained()
        path = Path("run/checkpoints/step-00000003")
        shutil.copytree(path, path.name)
        shutil.copyfile("run/metrics.jsonl", "metrics.jsonl")
        shutil.copyfile(trainer.tokenizer.path, "t.model")
        dcp.save(
            checkpoint.state_of(trainer.engine, trainer.optimizer), checkpoint_id=folder / "old"
        )
        shutil.copyfile(folder / "old" / ".metadata", "pickled")
        files.write_safetensors(Path("model.safetensors"), files.read_checkpoint(path))
        backend = Backend(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = Whitespace()
        backend.save("tokenizer.json")
        with writing_dataset("d", np.dtype(np.uint16)) as writer:
            writer.add(np.arange(8, dtype=np.uint16))
        _hugging_face(path)
        Path("results.json").write_text(json.dumps(example_results()))
        shutil.copyfile(ROOT / "benchmarks" / "2026-12-01-scale.json", "scale.json")
        shutil.copyfile(ROOT / "tests" / "scaling" / "chinchilla_points.csv", "points.csv")
        _tasks(Path("tasks"))
        Path("deepspeed.json").write_text(
            '{"optimizer": {"params": {}}, "zero_optimization": {"stage": 1}}'
        )
        Path("prompts.jsonl").write_text('{"prompt": "The river"}\n{"prompt": "A stone", "n": 1}\n')
        (Path("launch")).mkdir()
        shutil.copyfile(ROOT / "launch" / "site.example.sh", "launch/site.sh")
        Path("loop").symlink_to("loop")
    return sound


def _trained() -> Trainer:
    raw = tiny_raw(write_corpus(Path()), Path("cache"))
    raw["training"]["steps"] = 3
    raw["logging"]["directory"] = "out"
    Path("run.yaml").write_text(yaml.safe_dump(raw))
    settings = config.load_config("run.yaml", ["logging.directory=run"])
    trainer = Trainer(settings, prepare(settings.data, settings.model.vocabulary_size))
    trainer.run()
    del raw["training"]["steps"]
    raw["study"] = {
        "name": "tiny",
        "budgets": [1e8],
        "cells": [{"name": "gpt", "preset": "gpt"}, {"name": "t5", "preset": "t5"}],
        "evaluation": {"documents": 2, "curve_documents": 2, "choices": 4, "middles": 2}
        | {"prefix_tokens": 8, "continuation_tokens": 4},
    }
    Path("study.yaml").write_text(yaml.safe_dump(raw))
    return trainer


def _tasks(folder: Path) -> None:
    """A task with a wording of its own and one of promptsource."""
    folder.mkdir()
    items = ({"text": f"{n} stones", "label": n % 2, "names": ["odd", "even"]} for n in range(4))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    prompt = "{% for name in names %}{{ name | upper }}, {% endfor %}{{ text }}? ||| {{ answer_choices[label] }}"
    task = {
        "summary": "Odd or even?",
        "data": {"train": "items.jsonl", "test": "items.jsonl"},
        "wordings": [{"name": "own", "prompt": prompt, "choices": "{{ names | join(' ||| ') }}"}],
        "promptsource": "templates.yaml",
    }
    (folder / "pairs.task.yaml").write_text(yaml.safe_dump(task))
    lines = (
        *("templates:", "  a: !Template", "    answer_choices: null"),
        *("    jinja: '{{ text }}? ||| {{ names[label] }}'", "    metadata: !TemplateMetadata {}"),
        "    name: theirs",
    )
    (folder / "templates.yaml").write_text("\n".join(lines) + "\n")


def _hugging_face(path: Path) -> None:
    """An index over one file; and a folder that transformers reads."""
    hf = Path("hf")
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "llama"}')
    shutil.copyfile("model.safetensors", hf / "one.safetensors")
    names = files.read_checkpoint(path).weights
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    job = Conversion(Path("run"), Path("llama"), "hf", verify=False, say=lambda text: None)
    convert(job)
