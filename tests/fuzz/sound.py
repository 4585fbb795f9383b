"""A folder of sound files, one for each reader."""

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
from megaarch.data.indexed import IndexedWriter
from megaarch.data.prepare import prepare
from megaarch.interchange import files
from megaarch.training import checkpoint
from megaarch.training.trainer import Trainer
from tests.conftest import tiny_raw, write_corpus
from tests.study.example_results import example_results


def make(folder: Path) -> Path:
    """Trains a tiny run of three steps; returns the folder with its files and all others."""
    work, sound = folder / "work", folder / "sound"
    work.mkdir()
    sound.mkdir()
    raw = tiny_raw(write_corpus(work), work / "cache")
    raw["training"]["steps"] = 3
    raw["logging"]["directory"] = str(work / "run")
    (sound / "run.yaml").write_text(yaml.safe_dump(raw))
    settings = config.load(sound / "run.yaml")
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    trainer = Trainer(settings, prepared)
    trainer.run()
    path = work / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(path, sound / path.name)
    shutil.copyfile(work / "run" / "metrics.jsonl", sound / "metrics.jsonl")
    shutil.copyfile(prepared.tokenizer.path, sound / "t.model")
    dcp.save(checkpoint.state_of(trainer.replica, trainer.optimizer), checkpoint_id=work / "old")
    shutil.copyfile(work / "old" / ".metadata", sound / "pickled")
    files.write_safetensors(sound / "model.safetensors", files.read_checkpoint(path))
    backend = Backend(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(sound / "tokenizer.json"))
    with IndexedWriter(sound / "d", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(8, dtype=np.uint16))
    hf = sound / "hf"
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "llama"}')
    shutil.copyfile(sound / "model.safetensors", hf / "one.safetensors")
    names = files.read_checkpoint(path).weights
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    (sound / "results.json").write_text(json.dumps(example_results()))
    return sound
