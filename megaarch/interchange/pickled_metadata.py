"""The metadata of checkpoints up to version 0.1, which torch wrote as a pickle (`state/.metadata`).

The instructions that it may have are listed, and so are the globals that it may name, in whose place stand
records of this module: no class of another is looked up and nothing else is called ("Restricting Globals" in
Python's documentation of pickle). All else is refused.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

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
    *(("torch", name) for name in DTYPES),
}
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET STACK_GLOBAL GLOBAL REDUCE NEWOBJ
    BUILD NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINFLOAT EMPTY_DICT
    EMPTY_LIST EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE APPEND APPENDS SETITEM SETITEMS
"""
INSTRUCTIONS = frozenset(_INSTRUCTIONS.split())


class Refused(UserError):
    """What a pickle has that is none of a checkpoint's metadata, in words."""


class _Record:
    """What stands for an object of the pickle: the arguments that it would have been made with, and its state.
    Its class has the name of the one in the pickle."""

    arguments: tuple = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> "_Record":
        record = object.__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _refuse(name: str, unpickler: Any) -> None:
    raise Refused(f"it has the instruction {name}, which no checkpoint needs")


def _set_items(name: str, keys: slice, unpickler: Any) -> None:
    """Sets items of names and records alone: the hash of tuples in tuples can end the process."""
    if not all(isinstance(key, str | _Record) for key in unpickler.stack[keys]):
        raise Refused("a key in it is no name")
    OWN[name](unpickler)


OWN = {of.name: pickle._Unpickler.dispatch[ord(of.code)] for of in pickletools.opcodes}
DONE = {name: OWN[name] for name in INSTRUCTIONS} | {
    "SETITEM": partial(_set_items, "SETITEM", slice(-2, -1)),
    "SETITEMS": partial(_set_items, "SETITEMS", slice(None, None, 2)),
}


class _Unpickler(pickle._Unpickler):
    """Has the listed instructions alone, looks up no class, and calls none but records' and tuple, which
    stands for torch.Size. It is pickle's own in Python, for that in C has no table of its instructions."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(of.code): DONE.get(of.name, partial(_refuse, of.name)) for of in pickletools.opcodes
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in LISTED:
            raise Refused(f"it names {module}.{name}, which no checkpoint needs")
        return tuple if name == "Size" else type(name, (_Record,), {})


def parse(content: bytes) -> dict[str, Any]:
    """What the pickle says, in the form of `storage.Index`. Refused where it is anything but the
    metadata of tensors and plain values."""
    try:
        return _index(_state(_Unpickler(io.BytesIO(content)).load(), "Metadata"))
    except Refused:
        raise
    except Exception as error:  # what is wrong with a foreign pickle shows in any of them
        raise Refused(f"it is no metadata of torch's ({type(error).__name__})") from None


def _state(record: Any, name: str) -> Any:
    if type(record).__name__ != name:
        raise Refused(f"it lacks {name}")
    return record.state


def _index(metadata: dict[str, Any]) -> dict[str, Any]:
    places: dict[str, dict[tuple | None, list]] = {}
    for key, info in metadata["storage_data"].items():
        where, at = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        if at.get("transform_descriptors"):
            raise Refused("its files are compressed or encrypted")
        offset = None if where.get("offset") is None else _size(where["offset"])
        places.setdefault(where["fqn"], {})[offset] = [
            at["relative_path"],
            at["offset"],
            at["length"],
        ]
    tensors, values = {}, {}
    for name, entry in metadata["state_dict_metadata"].items():
        if type(entry).__name__ == "BytesStorageMetadata":
            values[name] = places[name][None]
            continue
        tensor = _state(entry, "TensorStorageMetadata")
        dtype, layout, *_ = _state(tensor["properties"], "TensorProperties")
        if not isinstance(dtype, type) or layout.arguments != ("torch.strided",):
            raise Refused(f"{name} is no dense tensor")
        chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in tensor["chunks"]]
        tensors[name] = {
            "dtype": dtype.__name__,
            "size": list(tensor["size"]),
            "chunks": [
                [list(c["offsets"]), list(c["sizes"]), *places[name][_size(c["offsets"])]]
                for c in chunks
            ],
        }
    return {"format": 1, "tensors": tensors, "values": values}


def _size(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or not all(isinstance(number, int) for number in numbers):
        raise Refused("it lacks a size")
    return numbers
