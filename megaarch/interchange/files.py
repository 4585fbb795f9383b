"""Models on disk, in three formats: a megaarch checkpoint, one safetensors file, Hugging Face's.

Reading gives a `Saved`, writing takes one. The first two hold the same: weights whole and by global
name, whatever layout trained them, and the record of the run (settings, tokenizer, totals). A tensor is
read when it is looked up, and written before the next is. No pickle is ever read.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megaarch.checkpoint import checkpoint
from megaarch.checkpoint.lazy import Lazy, Weights, changed, like
from megaarch.checkpoint.record import CheckpointRecord, read_record
from megaarch.errors import UserError
from megaarch.files import (
    Schema,
    fit,
    open_regular,
    parse_json,
    read_json,
    replacing,
    write_json,
    writing,
)
from megaarch.training.open_run import run_folder

KEY = "megaarch"  # of the record in a safetensors file's metadata
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
SHARD = 5_000_000_000  # bytes of a file of weights, as transformers divides them
TRAINED = ("tokenizer.megaarch.json", "tokenizer.megaarch.model")  # of `tokenizer_files`
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")


class _Index(Schema):
    weight_map: dict[str, str]


class Saved(NamedTuple):
    """weights: by parameter name. record: what a checkpoint's progress.json holds."""

    weights: Weights
    record: CheckpointRecord


@contextmanager
def placed(output: Path) -> Iterator[Path]:
    """Yields a path to write and to read back; at the end of the block what is there becomes `output`.

    An error leaves nothing. UserError where `output` exists by then, and where the disk is full.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    own = tempfile.TemporaryDirectory(
        prefix=".convert-", dir=output.parent, ignore_cleanup_errors=True
    )
    with writing(output), own as folder:
        aside = Path(folder, output.name)
        try:
            yield aside
        except UserError as error:  # a reader knows the output by its own name
            raise UserError(str(error).replace(str(aside), str(output))) from error
        check_new(output)
        aside.rename(output)


def check_new(output: Path) -> None:
    """UserError where a file, a folder or a link, be it a broken one, has this name."""
    if os.path.lexists(output):
        raise UserError(f"{output} exists: give another output, or delete it")


def read_checkpoint(path: Path) -> Saved:
    """A checkpoint, or the newest complete one of a run or of STUDY/CELL. UserError where there is none."""
    found = checkpoint.find(run_folder(path))
    return Saved(checkpoint.read_weights(found), read_record(found))


def write_checkpoint(run: Path, saved: Saved) -> Path:
    """The folder of a run with one checkpoint, without the optimizer's state."""
    return checkpoint.save_weights(run, *saved)


def read_safetensors(file: Path) -> Saved:
    """UserError where it is none of ours."""
    with _opened(file) as tensors:
        metadata = tensors.metadata() or {}
        if KEY not in metadata:
            raise UserError(
                f"{file} has no megaarch record in its metadata: if it is Hugging Face's, give the "
                "folder that it lies in, with its config.json"
            )
        where = f"{file}: the megaarch record"
        record = fit(parse_json(metadata[KEY], where), CheckpointRecord, where)
        names = tensors.keys()
    return Saved(_stored(dict.fromkeys(names, file)), record)


def _stored(owners: dict[str, Path]) -> Lazy:
    """Tensors by the files that they are in, which are opened anew for each: no page of one is kept."""
    shapes: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(owners.values()):
        with _opened(file) as tensors:
            for name in (name for name, owner in owners.items() if owner == file):
                slices = tensors.get_slice(name)
                dtype = slices[:0].dtype if slices.get_shape() else tensors.get_tensor(name).dtype
                shapes[name] = torch.empty(slices.get_shape(), dtype=dtype, device="meta")

    def read(name: str) -> torch.Tensor:
        with _opened(owners[name]) as tensors:
            return tensors.get_tensor(name)

    return Lazy(shapes, read)


def write_safetensors(file: Path, saved: Saved) -> None:
    """One file: the weights, and the record in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        _save(saved.weights, aside, {"format": "pt", KEY: json.dumps(saved.record.raw())})


def _save(weights: Weights, file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, tensor by tensor: the library's own writer takes all of them at once."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(like(weights).items()):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(weights):
            stream.write(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_hf(folder: Path) -> tuple[dict[str, Any], Lazy]:
    """(config.json, tensors) of a Hugging Face folder, from one safetensors file or several."""
    try:
        config = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"{folder} is no Hugging Face model: it has no {CONFIG}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} holds no JSON object")
    owners: dict[str, Path] = {}
    for name, wanted in _files(folder):
        with _opened(folder / name) as tensors:
            there = tensors.keys()
            missing = sorted(set(wanted or ()) - set(there))
            if missing:
                raise UserError(f"{folder / name} lacks {missing[0]}, which {INDEX} says it has")
        owners |= dict.fromkeys(wanted or there, folder / name)
    return config, _stored(owners)


def _files(folder: Path) -> Iterable[tuple[str, list[str] | None]]:
    """(file, names of its tensors, or None for all that it has)."""
    if (folder / SINGLE).exists():
        return [(SINGLE, None)]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = (
            f"{pickles[0]} is a pickle, which can run any code and is not read: save the model "
            "with safetensors"
            if pickles
            else "the weights are missing"
        )
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: {why}")
    owners = fit(read_json(folder / INDEX), _Index, folder / INDEX).weight_map
    tensors: dict[str, list[str]] = {}
    for key, name in sorted(owners.items(), key=lambda item: item[1]):
        # a link may lead on, as the hub's cache has them
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no file of its folder")
        tensors.setdefault(name, []).append(key)
    return list(tensors.items())


def write_hf(
    folder: Path,
    config: dict[str, Any],
    weights: Weights,
    beside: dict[str, bytes],
    dtype: torch.dtype = torch.float32,
) -> None:
    """A new folder: config.json, the weights in `dtype` and what stands beside them, by name. Of tied
    tensors the first is written, as `from_pretrained` expects; more than `SHARD` bytes lie in several files."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shapes = like(weights)
    kept = {id(tensor): name for name, tensor in reversed(shapes.items())}.values()
    shards = _shards({name: shapes[name] for name in kept}, dtype)
    rounded = changed(weights, lambda _, tensor: tensor.to(dtype))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True):
        own = {name: rounded.like[name] for name in shard}
        _save(Lazy(own, rounded.__getitem__), folder / file, {"format": "pt"})
    if len(shards) > 1:
        size = sum(tensor.numel() for shard in shards for tensor in shard.values()) * dtype.itemsize
        owners = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": owners})
    for name, content in beside.items():
        (folder / name).write_bytes(content)


def _shards(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Divides tensors, in their order, among files of at most `SHARD` bytes; a larger one has its own."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = tensor
        room -= size
    return shards


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a Hugging Face folder."""
    for name in (*TRAINED, *TOKENIZERS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has no tokenizer that is read here ({', '.join(TOKENIZERS)}): give --tokenizer "
        "FILE, for a run that starts from these weights needs it"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        open_regular(file).close()  # safe_open takes what may not be read for what is not there
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
