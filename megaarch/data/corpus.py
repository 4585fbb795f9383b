"""Text from files, one document at a time: JSON lines, parquet, plain text, the embedded corpus.

Everything is lazy: a corpus larger than memory is read as a stream, as often as is needed.
"""

import glob
import gzip
import json
import platform
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megaarch.data import embedded

EMBEDDED = "embedded"
SEPARATOR = "<|endoftext|>"  # a line of its own between two documents of a plain text file
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst")
MANIFEST, HELD_OUT = ".manifest.json", ".heldout.jsonl"  # beside a .bin that was made of text
BLOCK = 1 << 20


class MalformedRecord(ValueError):
    """A record that cannot be read. number: of its line or row (`unit`) in what was read."""

    def __init__(self, file: Path, unit: str, number: int, what: str):
        super().__init__(file, unit, number, what)  # as it is pickled
        self.file, self.unit, self.number, self.what = file, unit, number, what

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}: {self.what}"


Malformed = Callable[[MalformedRecord], None]  # is told of one; if it returns, reading goes on


def stop(error: MalformedRecord) -> None:
    """The first malformed record ends the reading."""
    raise error


class _Place(NamedTuple):
    file: Path
    unit: str
    number: int


@dataclass(frozen=True)
class Shard:
    """A file, or a part of it: of plain JSON lines those that begin at a byte of start:end, of
    parquet the row groups start:end. end None is all of it."""

    file: Path
    start: int = 0
    end: int | None = None


def documents(path: str, text_field: str = "text") -> Iterator[str]:
    """The documents of a source, in a fixed order; blank ones are left out.

    path: "embedded", a file, a directory (every file of a known suffix below it, sorted) or a
        glob. JSON lines and parquet hold a document a record, in `text_field`. A plain text file
        is one document, unless form feeds or lines `<|endoftext|>` divide it.
    ValueError: a source that is missing or of no known format; a malformed record, a missing
        field or bad UTF-8, naming file and line.
    """
    for file in [Path(EMBEDDED)] if path == EMBEDDED else files(path):
        yield from shard_documents(Shard(file), text_field)


def shard_documents(
    shard: Shard, text_field: str = "text", malformed: Malformed = stop
) -> Iterator[str]:
    """The documents of a shard. Of a part of a JSON lines file, lines count from its start."""
    if str(shard.file) == EMBEDDED:
        texts = iter(embedded.documents())
    elif format_of(shard.file) == "text":
        texts = _text_documents(shard.file, malformed)
    else:
        texts = _fields(shard, text_field, malformed)
    yield from (text for text in texts if text.strip())


def pairs(path: str) -> Iterator[tuple[str, str]]:
    """The (input, target) pairs of supervised records `{"input": ..., "target": ...}`."""
    if path == EMBEDDED:
        raise ValueError("data.kind is supervised, but the embedded corpus holds plain text")
    for file in files(path):
        if format_of(file) == "text":
            raise ValueError(f"{file}: supervised data are JSON lines or parquet, not plain text")
        for at, record in _records(Shard(file), stop, "input", "target"):
            yield _field(record, "input", at), _field(record, "target", at)


def kind(path: str, text_field: str = "text") -> str:
    """What a source holds, from its name and first sound record: "text", "supervised" or "indexed"."""
    if indexed_prefix(path) is not None:
        return "indexed"
    first = None if path == EMBEDDED else files(path)[0]
    if first is None or format_of(first) == "text":
        return "text"
    _, record = next(_records(Shard(first), lambda error: None), (None, {}))
    supervised = {"input", "target"} <= record.keys() and text_field not in record
    return "supervised" if supervised else "text"


def indexed_prefix(path: str) -> str | None:
    """The prefix of a `.bin`/`.idx` pair, if `path` is the prefix or one of the two files."""
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    there = [Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")]
    if all(there) or (prefix != path and any(there)):
        return prefix
    return None


def files(path: str) -> list[Path]:
    """The files of a source, sorted. ValueError if there are none, or none of a known format."""
    known = f"known are {', '.join(FORMATS)} (also with {' or '.join(COMPRESSED)})"
    root = Path(path)
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.is_file() and format_of(file)]
        if not found:
            raise ValueError(f"data source {path} is a directory without a text file: {known}")
    elif root.is_file():
        found = [root]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]  # noqa: PTH207
        found = [file for file in found if file.is_file()]
        if not found:
            raise ValueError(
                f"data source {path} does not exist: give a file, a directory, a glob or "
                f"'{EMBEDDED}'"
            )
    for file in found:
        if format_of(file) is None:
            raise ValueError(f"data source {file} is of no known format: {known}")
    return sorted(found)


def identity(path: str) -> list[list[Any]]:
    """What tells whether a source has changed, without reading it: (name, size, time) a file."""
    if path == EMBEDDED:
        return [[EMBEDDED, platform.python_version()]]
    prefix = indexed_prefix(path)
    found = files(path) if prefix is None else [Path(prefix + ".idx"), Path(prefix + ".bin")]
    if prefix is not None:
        beside = [Path(prefix + suffix) for suffix in (MANIFEST, HELD_OUT)]
        found += [file for file in beside if file.is_file()]
    for file in found:
        if not file.exists():
            raise ValueError(f"indexed dataset {prefix}: {file} is missing")
    stats = [(file, file.stat()) for file in found]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def format_of(file: Path) -> str | None:
    """json, parquet or text, by the file's name; None for any other."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and FORMATS.get(suffixes[-1]) == "parquet":
            return None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def _blocks(shard: Shard) -> Iterator[bytes]:
    """The decompressed bytes of a shard. ValueError if it cannot be read or is cut short."""
    import zstandard

    file = shard.file
    try:
        if file.suffix.lower() == ".zst":
            yield from _zstandard_blocks(file)
            return
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as stream:
            if shard.end is not None:
                yield from _range_blocks(stream, shard.start, shard.end)
                return
            while block := stream.read(BLOCK):
                yield block
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _range_blocks(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in start:end, whole."""
    if start:  # the line before may end here, or reach into the range
        stream.seek(start - 1)
        stream.readline()
    at, block = stream.tell(), b"\n"
    while at < end and (block := stream.read(min(BLOCK, end - at))):
        at += len(block)
        yield block
    if not block.endswith(b"\n"):
        yield stream.readline()


def _zstandard_blocks(file: Path) -> Iterator[bytes]:
    # zstandard's own stream reader takes a cut frame for the end of the file.
    import zstandard

    frame = None
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = b""
                if frame.eof:
                    frame, block = None, frame.unused_data
    if frame is not None:
        raise EOFError("the compressed file ended before its last frame did")


def _lines(shard: Shard, malformed: Malformed) -> Iterator[tuple[_Place, str]]:
    """Lines without their newline; one that is not UTF-8 is malformed."""
    number, rest = 0, b""
    encoding = "utf-8" if shard.start else "utf-8-sig"  # of the first line

    def lines() -> Iterator[bytes]:
        nonlocal rest
        for block in _blocks(shard):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
        yield rest

    for number, line in enumerate(lines(), start=1):
        place = _Place(shard.file, "line", number)
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            malformed(MalformedRecord(*place, f"not UTF-8 ({error.reason})"))
        else:
            yield place, text
        encoding = "utf-8"


def _text_documents(file: Path, malformed: Malformed) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(Shard(file), malformed):
        if line.strip() == SEPARATOR:
            yield "\n".join([*document, ""])
            document = []
            continue
        before, *after = line.split("\f")
        document.append(before)
        for piece in after:
            yield "\n".join(document)
            document = [piece]
    yield "\n".join(document)


def _fields(shard: Shard, name: str, malformed: Malformed) -> Iterator[str]:
    for place, record in _records(shard, malformed, name):
        try:
            text = _field(record, name, place)
        except MalformedRecord as error:
            malformed(error)
        else:
            yield text


def _records(
    shard: Shard, malformed: Malformed, *columns: str
) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """(where, record) of each record; `columns` are what a parquet file is read for."""
    if format_of(shard.file) == "parquet":
        yield from _parquet_records(shard, columns)
        return
    for place, line in _lines(shard, malformed):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"malformed JSON ({error.msg}, column {error.colno})"
        except (ValueError, RecursionError) as error:
            what = f"JSON that cannot be read ({error})"
        else:
            if isinstance(record, dict):
                yield place, record
                continue
            what = f"one JSON object a line is expected, not {line[:20]!r}"
        malformed(MalformedRecord(*place, what))


def _parquet_records(
    shard: Shard, columns: tuple[str, ...]
) -> Iterator[tuple[_Place, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    file = shard.file
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            read = [name for name in columns if name in table.schema_arrow.names]
            if columns and len(read) < len(columns):
                missing = next(name for name in columns if name not in read)
                raise ValueError(f"{file}: {_missing(missing, table.schema_arrow.names)}")
            groups = range(table.num_row_groups)[shard.start : shard.end]
            number = sum(table.metadata.row_group(g).num_rows for g in range(groups.start))
            for batch in table.iter_batches(1024 if columns else 1, groups, columns=read or None):
                for record in _parquet_rows(batch, file, number):
                    number += 1
                    yield _Place(file, "row", number), record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _parquet_rows(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a record batch. ValueError names the one that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                what = f"not UTF-8 ({error.reason})"
                raise MalformedRecord(file, "row", before + row + 1, what) from error
        raise


def _field(record: dict[str, Any], name: str, place: _Place) -> str:
    if name not in record:
        raise MalformedRecord(*place, _missing(name, record))
    text = record[name]
    if not isinstance(text, str):
        what = f"field {name!r} is not a string but {type(text).__name__}"
        raise MalformedRecord(*place, what)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"field {name!r} holds half a surrogate pair"
            raise MalformedRecord(*place, what) from error
    return text


def _missing(name: str, names: Any) -> str:
    hint = "" if name in ("input", "target") else "; set data.text_field, or --text-field of a tool"
    return f"no field {name!r} (there are: {', '.join(map(str, names)) or 'none'}){hint}"
