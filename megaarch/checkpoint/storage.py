"""The state of a checkpoint on disk: torch.distributed.checkpoint's shards, and an index of our own.

state/__RANK_0.distcp   tensors, as torch.save writes them, read with weights_only; and plain values
                        (an optimizer's options) as JSON
state/metadata.json     of each tensor its type, size and chunks, of each chunk and value its place

Nothing that is read can execute. torch's own reader unpickles `.metadata` and loads values without
weights_only; both are never used here. A `.metadata` of version 0.1 is refused (interchange/upgrade.py brings
it to this version).
"""

import io
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

import torch
from pydantic import Field, GetPydanticSchema
from pydantic_core import core_schema
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megaarch.checkpoint.lazy import Lazy
from megaarch.errors import StorageError, UserError, in_brief
from megaarch.files import LARGEST, Schema, fit, inside, open_regular, parse_json, read_bytes
from megaarch.model.weight_transfer import Origins, renamed
from megaarch.parallel.gradients import local
from megaarch.parallel.parallelize import shard_of

INDEX, PICKLED = "metadata.json", ".metadata"
LARGEST_VALUE = 1 << 16  # bytes of a plain value
State = dict[str, dict[str, Any]]
Opened = Callable[[str], BinaryIO]  # a file of a state's folder, by its name

Whole = Annotated[int, Field(ge=0, lt=1 << 62)]
Shape = list[Whole]
File = Annotated[str, Field(pattern=r"^__\d{1,9}_\d{1,9}\.distcp$")]
Place = tuple[File, Whole, Whole]  # file, first byte, bytes
Chunk = tuple[Shape, Shape, File, Whole, Whole]  # offsets, sizes, and its place
DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_NAMES = core_schema.literal_schema(sorted(DTYPES))
DType = Annotated[str, GetPydanticSchema(lambda source, handler: _NAMES)]


class Tensor(Schema):
    dtype: DType
    size: Annotated[Shape, Field(max_length=16)]
    chunks: Annotated[list[Annotated[Chunk, Field(strict=False)]], Field(min_length=1)]


class Index(Schema):
    """What a state holds and where, by name ("model.NAME", "optimizer.NAME")."""

    format: Literal[1]
    tensors: dict[str, Tensor]
    values: dict[str, Annotated[Place, Field(strict=False)]]

    def renamed(self, origins: Origins) -> "Index":
        """The index with weights by the names of those that are read from them."""
        weights, others = {}, {}
        for name, tensor in self.tensors.items():
            own = name.removeprefix("model.")
            (others if own == name else weights)[own] = tensor
        named = {f"model.{name}": tensor for name, tensor in renamed(origins, weights).items()}
        return self.model_copy(update={"tensors": others | named})


class Writer(FileSystemWriter):
    """torch's writer of shards, with the index in place of its pickle."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        places = {}  # file, first byte, bytes
        for r in itertools.chain(*results):
            places[r.index.fqn, r.index.offset] = astuple(r.storage_data)[:3]
        tensors, values = {}, {}
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                values[name] = places[name, None]
                continue
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "size": list(entry.size),
                "chunks": [
                    [list(c.offsets), list(c.sizes), *places[name, c.offsets]] for c in entry.chunks
                ],
            }
        index = {"format": 1, "tensors": tensors, "values": values}
        (Path(self.path) / INDEX).write_text(json.dumps(index))


class SavePlanner(DefaultSavePlanner):
    """Plain values become JSON, where torch would pickle them. values: whether this process plans any: of those
    that have the same, one has to, and thousands would each send theirs to the one that joins the plans.
    read: gives the tensor of a name when it is written, where the state has it on "meta"."""

    def __init__(self, values: bool = True, read: Callable[[str], torch.Tensor] | None = None):
        super().__init__()
        self.values, self.read = values, read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.read(index.fqn) if self.read else super().lookup_object(index)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if self.values:
            return plan
        items = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self.plan = replace(plan, items=items)
        return self.plan

    def transform_object(self, write_item: Any, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        return io.BytesIO(json.dumps(object).encode())


def save(
    state: State,
    folder: Path,
    group: ProcessGroup | None = None,
    values: bool = True,
    read: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write tensors and plain values by name. group: its processes call this, each with its own.
    values, read: as SavePlanner's."""
    state_dict_saver.save(
        state,
        # torch holds what it has written until the file is closed
        storage_writer=Writer(folder, single_file_per_rank=read is None),
        planner=SavePlanner(values, read),
        process_group=group,
    )


def read_index(folder: Path) -> Index:
    """What a state holds. UserError where it is damaged, or not a plain list of tensors and values
    whose bytes lie in the folder."""
    file = folder / INDEX
    index = fit(parse_json(read_bytes(file, LARGEST), file), Index, file)
    check(index, folder, file)
    return index


def read(wanted: State, folder: Path, index: Index) -> State:
    """Fill what this process holds of the tensors of `wanted` in place; return its plain values, as the state has
    them. UserError where the state has not what is wanted, OSError where a tensor cannot be read."""
    found: State = {part: {} for part in wanted}
    with _files(folder) as opened:
        for part, named in wanted.items():
            for name, value in named.items():
                full = f"{part}.{name}"
                if isinstance(value, torch.Tensor):
                    _fill(value, folder, full, index, opened)
                    continue
                if full not in index.values:
                    raise UserError(f"{folder} has no plain value {full}")
                file, start, length = index.values[full]
                opened(file).seek(start)
                found[part][name] = _value(opened(file).read(length), f"{full} in {folder}")
    return found


@contextmanager
def _files(folder: Path) -> Iterator[Opened]:
    """Yields what opens a file of the folder by its name. It stays open until another one is asked for: a rank
    reads thousands of chunks of few files, and each opening is a question to a cluster's file server."""
    with ExitStack() as stack:
        held: dict[str, BinaryIO] = {}

        def opened(file: str) -> BinaryIO:
            if file not in held:
                stack.close()
                held.clear()
                held[file] = stack.enter_context(open_regular(folder / file))
            return held[file]

        yield opened


def _fill(tensor: torch.Tensor, folder: Path, name: str, index: Index, opened: Opened) -> None:
    stored = _stored(folder, name, index)
    if stored.size != list(tensor.shape):
        raise UserError(f"{folder} has {name} of size {stored.size}, not {list(tensor.shape)}")
    held = shard_of(tensor) or tuple(map(range, tensor.shape))
    for place, found in _read(folder, name, stored, held, opened):
        local(tensor).detach()[place] = found


def _stored(folder: Path, name: str, index: Index) -> Tensor:
    if name not in index.tensors:
        raise UserError(f"{folder} has no tensor {name}")
    return index.tensors[name]


def read_whole(folder: Path, prefix: str = "") -> Lazy:
    """Whole tensors on the CPU whose names start with `prefix`, by the rest of the name."""
    index = read_index(folder)
    there = {n.removeprefix(prefix): t for n, t in index.tensors.items() if n.startswith(prefix)}
    shapes = {name: _empty(tensor, "meta") for name, tensor in there.items()}
    return Lazy(shapes, lambda name: read_tensor(folder, prefix + name, index))


def read_tensor(folder: Path, name: str, index: Index) -> torch.Tensor:
    """A whole tensor on the CPU. index: the folder's. UserError where it has no such tensor, OSError where that
    cannot be read."""
    stored = _stored(folder, name, index)
    whole = _empty(stored)
    with _files(folder) as opened:
        for place, found in _read(folder, name, stored, tuple(map(range, whole.shape)), opened):
            if (found.shape, found.dtype) == (whole.shape, whole.dtype):
                return found
            whole[place] = found
    return whole


def _read(
    folder: Path, name: str, stored: Tensor, held: tuple[range, ...], opened: Opened
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Yields what each chunk of a tensor has of its ranges `held`, with the place in them."""
    for offsets, sizes, file, start, length in stored.chunks:
        axes = zip(offsets, sizes, held, strict=True)
        common = [range(max(o, own.start), min(o + n, own.stop)) for o, n, own in axes]
        if not all(common):
            continue
        try:
            chunk = _create_file_view(cast(io.IOBase, opened(file)), start, length)
            found = _read_part(chunk, _slices(common, offsets))
        except Exception as error:  # of many kinds, by what torch.load finds
            raise StorageError(f"{name} of {folder} could not be read: {refusal(error)}") from error
        yield _slices(common, [own.start for own in held]), found


def refusal(error: Exception) -> str:
    """Returns why torch.load has not loaded what it was given, without torch's advice to load it with
    weights_only off, which would execute it."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "its bytes are not those of plain tensors"
    return in_brief(error)


def _empty(tensor: Tensor, device: str = "cpu") -> torch.Tensor:
    return torch.empty(tensor.size, dtype=getattr(torch, tensor.dtype), device=device)


def _slices(parts: Sequence[range], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(p.start - o, p.stop - o) for p, o in zip(parts, origin, strict=True))


def _read_part(chunk: Any, part: tuple[slice, ...]) -> torch.Tensor:
    """Returns a part of the tensor that a chunk (a file) holds, and reads the part's rows alone."""
    whole = torch.load(chunk, map_location="meta", weights_only=True)
    if len(part) != whole.ndim or any(p.stop > n for p, n in zip(part, whole.shape)):
        raise ValueError(f"a tensor of {list(whole.shape)} has no {part}")
    first = getattr(whole.untyped_storage(), "_checkpoint_offset", None)
    if not part or first is None or not whole.is_contiguous():
        chunk.seek(0)
        return torch.load(chunk, map_location="cpu", weights_only=True)[part]
    wanted = whole[part[:1]]
    rows = torch.empty(wanted.shape, dtype=wanted.dtype)
    content = rows.reshape(-1).view(torch.uint8).numpy().data
    chunk.seek(first + wanted.storage_offset() * wanted.itemsize)
    if chunk.readinto(content) != len(content):
        raise EOFError("a file of the checkpoint ends within a tensor")
    return rows[(slice(None), *part[1:])]


def _value(content: bytes, name: str) -> Any:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is no plain value and was not loaded: {error}") from None
    return tuple(plain(value, name)) if isinstance(value, list) else plain(value, name)


def plain(value: Any, name: str) -> Any:
    """Returns a plain value, or a list of them. UserError for anything else; it calls it by `name`."""
    items = value if isinstance(value, list | tuple) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise UserError(f"{name} is no plain value: {type(value).__name__}")
    return value


def check(index: Index, folder: Path, where: Path) -> None:
    """UserError where chunks do not make up their tensors, or bytes are not there."""
    sizes: dict[str, int] = {}

    def holds(name: str, least: int, file: str, start: int, length: int) -> None:
        if file not in sizes:
            path = inside(folder, file)
            if not path.is_file():
                raise UserError(f"{where} is damaged: {file} is missing")
            sizes[file] = path.stat().st_size
        if length < least or start + length > sizes[file]:
            raise UserError(f"{where} is damaged: {name} does not fit into {file}")

    for name, (file, start, length) in index.values.items():
        if length > LARGEST_VALUE:
            raise UserError(f"{where} is damaged: {name} is too large for a plain value")
        holds(name, 1, file, start, length)
    for name, tensor in index.tensors.items():
        item, volume = getattr(torch, tensor.dtype).itemsize, 0
        for offsets, shape, file, start, length in tensor.chunks:
            if not len(offsets) == len(shape) == len(tensor.size) or any(
                o + n > whole for o, n, whole in zip(offsets, shape, tensor.size)
            ):
                raise UserError(f"{where} is damaged: {name} has a chunk outside of it")
            volume += math.prod(shape)
            holds(name, math.prod(shape) * item, file, start, length)
        if volume != math.prod(tensor.size):
            raise UserError(f"{where} is damaged: the chunks of {name} do not make it up")
