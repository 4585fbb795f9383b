"""The metadata of checkpoints up to version 0.1, which torch wrote as a pickle (`state/.metadata`).

The pickle is not loaded. Its instructions are read one by one: the few that torch's metadata takes
build containers and records of (name, arguments, state), and the globals that it may name are listed.
No class is looked up, nothing is called, and all else is refused.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

from megaarch.checkpoint.storage import DTYPES
from megaarch.errors import UserError

METADATA = "torch.distributed.checkpoint.metadata"
LISTED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((METADATA, name) for name in ("TensorProperties", "ChunkStorageMetadata")),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}


class Refused(UserError):
    """What a pickle has that is none of a checkpoint's metadata, in words."""


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(eq=False)
class _Record:
    """An object of the pickle: what would have been called, with what, and its state."""

    name: str
    arguments: tuple
    state: Any = None


class _Machine:
    """The pickle machine without its calls."""

    def __init__(self):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks that a mark has put aside
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("STACK_GLOBAL", "GLOBAL"):
            self._global(name, argument)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, _Global) or not isinstance(arguments, tuple):
                raise Refused("it calls what is no listed class")
            stack.append(_Record(called.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Record):
                raise Refused("it sets the state of what is no object of its own")
            stack[-1].state = state
        else:
            self._container(name)

    def _global(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            module, _, called = argument.partition(" ")
        else:
            called, module = self.stack.pop(), self.stack.pop()
        if (module, called) not in LISTED and not (module == "torch" and called in DTYPES):
            raise Refused(f"it names {module}.{called}, which no checkpoint needs")
        self.stack.append(_Global(module, called))

    def _container(self, name: str) -> None:
        stack = self.stack
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise Refused("it ends early")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, self.stack = stack, self.below.pop()
            if name == "TUPLE":
                self.stack.append(tuple(items))
            elif name == "APPENDS":
                self.stack[-1].extend(items)
            else:
                self._set(zip(items[::2], items[1::2], strict=True))
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set([(key, value)])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"it has the instruction {name}, which no checkpoint needs")

    def _set(self, items: Any) -> None:
        for key, value in items:
            if not isinstance(key, str | _Record):
                raise Refused("a key in it is no name")
            self.stack[-1][key] = value


def parse(content: bytes) -> dict[str, Any]:
    """What the pickle says, in the form of `storage.Index`. Refused where it is anything but the
    metadata of tensors and plain values."""
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            machine.step(instruction.name, argument)
        (root,) = machine.stack
        return _index(_state(root, "Metadata"))
    except Refused:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"it is no metadata of torch's ({type(error).__name__})") from None


def _state(record: Any, name: str) -> Any:
    if not isinstance(record, _Record) or record.name != name:
        raise Refused(f"it lacks {name}")
    return record.state


def _index(metadata: dict[str, Any]) -> dict[str, Any]:
    places: dict[str, dict[tuple | None, list]] = {}
    for key, info in metadata["storage_data"].items():
        where, at = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        if at.get("transform_descriptors"):
            raise Refused("its files are compressed or encrypted")
        offset = None if where.get("offset") is None else tuple(_size(where["offset"]))
        places.setdefault(where["fqn"], {})[offset] = [
            at["relative_path"],
            at["offset"],
            at["length"],
        ]
    tensors, values = {}, {}
    for name, entry in metadata["state_dict_metadata"].items():
        if isinstance(entry, _Record) and entry.name == "BytesStorageMetadata":
            values[name] = places[name][None]
            continue
        tensor = _state(entry, "TensorStorageMetadata")
        dtype, layout, *_ = _state(tensor["properties"], "TensorProperties")
        if not isinstance(dtype, _Global) or layout.arguments != ("torch.strided",):
            raise Refused(f"{name} is no dense tensor")
        chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in tensor["chunks"]]
        tensors[name] = {
            "dtype": dtype.name,
            "size": _size(tensor["size"]),
            "chunks": [
                [_size(c["offsets"]), _size(c["sizes"]), *places[name][tuple(_size(c["offsets"]))]]
                for c in chunks
            ],
        }
    return {"format": 1, "tensors": tensors, "values": values}


def _size(record: Any) -> list:
    if not isinstance(record, _Record) or record.name != "Size":
        raise Refused("it lacks a size")
    (numbers,) = record.arguments
    return list(numbers)
