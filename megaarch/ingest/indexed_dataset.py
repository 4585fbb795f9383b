"""Megatron's indexed dataset: token sequences in a `.bin`, where they lie in an `.idx`.

The layout, all little-endian (megatron.core.datasets.indexed_dataset, version 1):

    .bin   the tokens of every sequence, one after the other
    .idx   9 bytes magic, uint64 version, uint8 dtype code, uint64 sequences n, uint64 documents d,
           int32 lengths [n], int64 byte pointers [n], int64 document boundaries [d],
           and, for multimodal data only, int8 modes [n]

Document k is the sequences document_index[k] up to document_index[k + 1]; so d counts one more
than there are documents.
"""

import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaarch.errors import UserError
from megaarch.files import replacing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
WHOLE = 1 << 30  # bytes of tokens that a checksum reads in full: a second or two
SPANS = 1 << 20  # sequences of an index that are checked at a time
SAMPLES, SAMPLE_BYTES = 4096, 1 << 16  # of more than that


def prefix_of(path: str | os.PathLike) -> str:
    """Returns the path without a trailing `.bin` or `.idx`."""
    name = os.fspath(path)
    return name[:-4] if name.endswith((".bin", ".idx")) else name


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns uint16 where every id fits below 65,500, else int32, as Megatron chooses."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


class _Indexed:
    """Items of tokens by index. A subclass sets `path` and `lengths` (int [items]), names its items, and
    has the places in the stream at which they begin, and the stream."""

    path: str
    lengths: np.ndarray
    item: str
    starts: Callable[[Any], Any]
    stream: Callable[[int, int], np.ndarray]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the tokens of an item, [length]. IndexError past either end."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Returns `length` tokens of an item from `offset`; None is up to its end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.item} {index} of {len(self)} in {self.path}")
        size = int(self.lengths[index])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset}:{offset + length} of {size} in {self.item} {index}")
        return self.stream(int(self.starts(index)) + offset, length)


class IndexedDataset(_Indexed):
    """Sequences of token ids, memory-mapped.

    path: the prefix of both files. Indexing and slices give int32 copies (int64 if the file
    holds int64). Pickles as its path.

    lengths: int32 [n], tokens of each sequence. document_index: int64 [documents + 1].
    dtype: as stored. tokens: number in all.
    UserError names the file that is missing, truncated or no indexed dataset.
    """

    item = "sequence"

    def __init__(self, path: str | os.PathLike):
        self.path = prefix_of(path)
        for suffix in (".idx", ".bin"):
            if not Path(self.path + suffix).is_file():
                raise UserError(f"indexed dataset {self.path}: {self.path}{suffix} is missing")
        self._read_index()
        self._read_tokens()

    def _read_index(self) -> None:
        file = self.path + ".idx"
        raw = mapped(file, np.dtype(np.uint8))
        if raw[:9].tobytes() != MAGIC:
            raise UserError(f"{file} is not an indexed dataset: it does not begin with MMIDIDX")
        if len(raw) < HEADER.size:
            raise UserError(f"{file} is truncated: {len(raw)} bytes, less than its header")
        _, version, code, sequences, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
        if version != VERSION:
            raise UserError(f"{file} has version {version}: only version {VERSION} is known")
        if code not in CODES or CODES[code][0] == "f":
            raise UserError(f"{file} has dtype code {code}, which is no integer type of tokens")
        need = HEADER.size + 12 * sequences + 8 * documents
        if len(raw) not in (need, need + sequences):
            what = "is truncated" if len(raw) < need else "does not match its header"
            raise UserError(
                f"{file} {what}: {len(raw)} bytes, where {sequences} sequences and {documents} "
                f"document boundaries take {need}"
            )
        body = raw[HEADER.size :]
        self.dtype = np.dtype("<" + CODES[code])
        self.lengths = body[: 4 * sequences].view("<i4")
        self._pointers = body[4 * sequences : 12 * sequences].view("<i8")
        self.document_index = body[12 * sequences : 12 * sequences + 8 * documents].view("<i8")
        self.tokens = int(self.lengths.sum(dtype=np.int64))

    def _read_tokens(self) -> None:
        file, index = self.path + ".bin", self.path + ".idx"
        size, item = Path(file).stat().st_size, self.dtype.itemsize
        starts, lengths = self._pointers, self.lengths
        for other in {1, 2, 4, 8} - {item}:
            if self.tokens and self.tokens * other == size and self._end_to_end(other):
                raise UserError(
                    f"{index} is damaged: its dtype {self.dtype.name} is not that of its pointers "
                    f"and of {file}, whose tokens have {other} bytes each"
                )
        if len(starts) and (
            lengths.min() < 0 or starts.min() < 0 or np.bitwise_or.reduce(starts) % item
        ):
            raise UserError(f"{index} is damaged: a length or a pointer is impossible")
        end = max((ends.max() for _, ends in self._spans(item)), default=0)
        if end > size:
            raise UserError(
                f"{file} is truncated: {size} bytes, but {index} points up to byte {end}"
            )
        bounds = self.document_index
        if len(bounds) and (
            bounds[0] < 0 or bounds[-1] > len(self) or (bounds[1:] < bounds[:-1]).any()
        ):
            raise UserError(f"{index} is damaged: its document boundaries are out of order")
        self._contiguous = self._end_to_end(item)
        self._tokens = mapped(file, np.dtype(np.uint8))[: size - size % item].view(self.dtype)
        self._given = np.int64 if item == 8 else np.int32

    def _spans(self, item: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields where sequences begin and end in the .bin if tokens have `item` bytes, SPANS at a time."""
        size = Path(self.path + ".bin").stat().st_size
        for i in range(0, len(self), SPANS):
            starts, lengths = self._pointers[i : i + SPANS], self.lengths[i : i + SPANS]
            # a wild pointer must not overflow
            yield starts, np.minimum(starts, size + 1) + lengths.astype(np.int64) * item

    def _end_to_end(self, item: int) -> bool:
        end = 0
        for starts, ends in self._spans(item):
            if starts[0] != end or not np.array_equal(starts[1:], ends[:-1]):
                return False
            end = ends[-1]
        return True

    def starts(self, sequences: int | np.ndarray) -> np.ndarray:
        """Returns the places in the stream at which these sequences begin."""
        if self._contiguous:
            return self._pointers[sequences] // self.dtype.itemsize
        return self._ends[sequences] - self.lengths[sequences]

    def __reduce__(self):
        return IndexedDataset, (self.path,)

    def stream(self, start: int, length: int) -> np.ndarray:
        """Returns tokens start : start + length of all sequences laid end to end, [length]."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start}:{start + length} of {self.tokens} in {self.path}")
        if self._contiguous:
            return self._tokens[start : start + length].astype(self._given)
        return self.at(np.arange(start, start + length))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Returns the tokens at these places of the stream, [places]."""
        if not self._contiguous:
            sequence = np.searchsorted(self._ends, places, side="right")
            left = self._ends[sequence] - places
            item = self.dtype.itemsize
            places = self._pointers[sequence] // item + self.lengths[sequence] - left
        return self._tokens[places].astype(self._given)

    def blocks(self, tokens: int = 1 << 24) -> Iterator[np.ndarray]:
        """Yields all tokens of the .bin as stored, in views of up to `tokens`."""
        for start in range(0, len(self._tokens), tokens):
            yield self._tokens[start : start + tokens]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths, dtype=np.int64)

    def checksum(self) -> dict[str, str | int]:
        """Returns hashes that change with the files: of the whole index, and of the tokens, all
        in files up to 1 GiB, in larger ones 4,096 pieces of 64 KiB, evenly spread.
        """
        raw = self._tokens.view(np.uint8)
        tokens = hashlib.sha256()
        if len(raw) <= WHOLE:
            tokens.update(raw.data)
        else:
            for start in np.linspace(0, len(raw) - SAMPLE_BYTES, SAMPLES).astype(np.int64):
                tokens.update(raw[start : start + SAMPLE_BYTES].data)
        index = hashlib.sha256(mapped(self.path + ".idx", np.dtype(np.uint8)).data)
        return {
            "index": index.hexdigest()[:32],
            "bytes": Path(self.path + ".bin").stat().st_size,
            "tokens": tokens.hexdigest()[:32],
        }

    def digest(self, look: Callable[[np.ndarray], None] = lambda block: None) -> str:
        """Returns the hash of all tokens of the .bin, whatever its size: it reads the whole file.

        look: called with each of `blocks` on the way.
        """
        found = hashlib.sha256()
        for block in self.blocks():
            look(block)
            found.update(block.data)
        return found.hexdigest()[:32]


class IndexedDocuments(_Indexed):
    """The documents of an indexed dataset, each the tokens of its sequences end to end.

    Sequences of no document are documents of their own. Pickles as its dataset.

    path, tokens: of the dataset. lengths: int32 or int64 [documents], tokens of each; those of the dataset,
    memory-mapped, where each document is a sequence.
    """

    item = "document"

    def __init__(self, dataset: IndexedDataset):
        self.dataset, self.path, self.tokens = dataset, dataset.path, dataset.tokens
        bounds = dataset.document_index if len(dataset.document_index) else np.zeros(1, np.int64)
        before, behind = np.arange(bounds[0]), np.arange(bounds[-1], len(dataset)) + 1
        if len(before) or len(behind):
            bounds = np.concatenate([before, bounds, behind])
        self.lengths, self.starts, self.stream = dataset.lengths, dataset.starts, dataset.stream
        if len(bounds) <= len(dataset) or (bounds[1:] == bounds[:-1]).any():  # not a sequence each
            starts = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])[bounds]
            self.lengths, self.starts = np.diff(starts), starts[:-1].__getitem__

    def __reduce__(self):
        return IndexedDocuments, (self.dataset,)

    def last_tokens(self, documents: np.ndarray) -> np.ndarray:
        """Returns the last token of each of these documents, all non-empty, [documents]."""
        return self.dataset.at(self.starts(documents) + self.lengths[documents] - 1)

    def blocks(self, tokens: int = 1 << 24) -> Iterator[np.ndarray]:
        """Yields all tokens of the .bin as stored, in views of up to `tokens`."""
        return self.dataset.blocks(tokens)


class IndexedWriter:
    """Writes the tokens of sequences to a stream, and the index that goes with them. path: for errors."""

    def __init__(self, path: str, dtype: np.dtype, stream: BinaryIO):
        self.path, self.dtype, self._stream = path, dtype, stream
        self._lengths = array("i")
        self._documents = array("q", [0])

    def add(self, tokens: np.ndarray) -> None:
        """Adds a sequence, int [length]. UserError for an id that the dtype cannot hold."""
        tokens = np.asarray(tokens)
        assert tokens.ndim == 1, tokens.shape
        limits = np.iinfo(self.dtype)
        if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise UserError(f"{self.path}: token ids do not fit into {self.dtype.name}")
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(tokens.size)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents laid end to end in `tokens`, which has this dtype.

        lengths: int [documents, sequences], the tokens of each sequence.
        """
        assert tokens.dtype == self.dtype and len(tokens) == lengths.sum(), "tokens as stored"
        self._stream.write(np.ascontiguousarray(tokens).data)
        ends = len(self._lengths) + np.arange(1, len(lengths) + 1) * lengths.shape[1]
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._documents.frombytes(ends.astype("q").tobytes())

    def end_document(self) -> None:
        """Ends a document of the sequences since the last call."""
        self._documents.append(len(self._lengths))

    def index(self) -> Iterator[bytes]:
        """Yields the content of the .idx."""
        code = {v: k for k, v in CODES.items()}[self.dtype.kind + str(self.dtype.itemsize)]
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        pointers = (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8")
        documents = np.array(self._documents, dtype="<i8")
        yield HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
        for values in (lengths, pointers, documents):
            yield values.tobytes()


@contextmanager
def writing_dataset(
    path: str | os.PathLike, dtype: np.dtype | type = np.int32
) -> Iterator[IndexedWriter]:
    """Writes an indexed dataset, complete or not at all.

    with writing_dataset(prefix, dtype) as writer:
        writer.add(tokens)       # a sequence
        writer.end_document()
    """
    prefix, stored = prefix_of(path), np.dtype(dtype).newbyteorder("<")
    assert stored.kind in "iu", "tokens are integers"
    # The index goes last: without it a .bin is no dataset, so a half replaced pair is never read.
    with replacing(prefix + ".idx") as index, replacing(prefix + ".bin") as tokens:
        with tokens.open("wb") as stream:
            writer = IndexedWriter(prefix, stored, stream)
            yield writer
        with index.open("wb") as file:
            file.writelines(writer.index())
        Path(prefix + ".idx").unlink(missing_ok=True)


def mapped(file: str | os.PathLike, dtype: np.dtype) -> np.ndarray:
    """Maps the content of a file as a read-only array."""
    # An empty file cannot be mapped. The view sheds np.memmap, whose slices are slow.
    if Path(file).stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r").view(np.ndarray)
