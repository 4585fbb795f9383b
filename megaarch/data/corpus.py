"""Text from files, one document at a time: JSON lines, parquet, plain text, the embedded corpus.

Everything is lazy: a corpus larger than memory is read as a stream, as often as is needed.
"""

import glob
import gzip
import json
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
BLOCK = 1 << 20


def documents(path: str, text_field: str = "text") -> Iterator[str]:
    """The documents of a source, in a fixed order; blank ones are left out.

    path: "embedded", a file, a directory (every file of a known suffix below it, sorted) or a
        glob. JSON lines and parquet hold a document a record, in `text_field`. A plain text file
        is one document, unless form feeds or lines `<|endoftext|>` divide it.
    ValueError: a source that is missing or of no known format; a malformed record, a missing
        field or bad UTF-8, naming file and line.
    """
    if path == EMBEDDED:
        yield from embedded.documents()
        return
    for file in files(path):
        if _format(file) == "text":
            texts = _text_documents(file)
        else:
            texts = (_field(record, text_field, at) for at, record in _records(file, text_field))
        yield from (text for text in texts if text.strip())


def pairs(path: str) -> Iterator[tuple[str, str]]:
    """The (input, target) pairs of supervised records `{"input": ..., "target": ...}`."""
    if path == EMBEDDED:
        raise ValueError("data.kind is supervised, but the embedded corpus holds plain text")
    for file in files(path):
        if _format(file) == "text":
            raise ValueError(f"{file}: supervised data are JSON lines or parquet, not plain text")
        for at, record in _records(file, "input", "target"):
            yield _field(record, "input", at), _field(record, "target", at)


def kind(path: str, text_field: str = "text") -> str:
    """What a source holds, from its name and first record: "text", "supervised" or "indexed"."""
    if indexed_prefix(path) is not None:
        return "indexed"
    first = None if path == EMBEDDED else files(path)[0]
    if first is None or _format(first) == "text":
        return "text"
    _, record = next(_records(first), ("", {}))
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
        found = [file for file in root.rglob("*") if file.is_file() and _format(file)]
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
        if _format(file) is None:
            raise ValueError(f"data source {file} is of no known format: {known}")
    return sorted(found)


def identity(path: str) -> list[list[Any]]:
    """What tells whether a source has changed, without reading it: (name, size, time) a file."""
    if path == EMBEDDED:
        return [[EMBEDDED, platform.python_version()]]
    prefix = indexed_prefix(path)
    found = files(path) if prefix is None else [Path(prefix + ".idx"), Path(prefix + ".bin")]
    for file in found:
        if not file.exists():
            raise ValueError(f"indexed dataset {prefix}: {file} is missing")
    stats = [(file, file.stat()) for file in found]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and FORMATS.get(suffixes[-1]) == "parquet":
            return None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _blocks(file: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file. ValueError if it cannot be read or is cut short."""
    import zstandard

    try:
        if file.suffix.lower() == ".zst":
            yield from _zstandard_blocks(file)
            return
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as stream:
            while block := stream.read(BLOCK):
                yield block
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


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


def _lines(file: Path) -> Iterator[str]:
    """Lines without their newline. ValueError where one is not UTF-8."""
    number, rest = 0, b""

    def decode(line: bytes) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: not UTF-8 ({error.reason})") from error

    for block in _blocks(file):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            yield decode(line)
    number += 1
    yield decode(rest)


def _text_documents(file: Path) -> Iterator[str]:
    document: list[str] = []
    for line in _lines(file):
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


def _records(file: Path, *columns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each record; `columns` are what a parquet file is read for."""
    if _format(file) == "parquet":
        yield from _parquet_records(file, columns)
        return
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        at = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{at}: malformed JSON ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{at}: JSON that cannot be read ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{at}: one JSON object a line is expected, not {line[:20]!r}")
        yield at, record


def _parquet_records(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            read = [name for name in columns if name in table.schema_arrow.names]
            if columns and len(read) < len(columns):
                missing = next(name for name in columns if name not in read)
                raise ValueError(f"{file}: {_missing(missing, table.schema_arrow.names)}")
            number = 0
            for batch in table.iter_batches(1024 if columns else 1, columns=read or None):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _field(record: dict[str, Any], name: str, at: str) -> str:
    if name not in record:
        raise ValueError(f"{at}: {_missing(name, record)}")
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"{at}: field {name!r} is not a string but {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{at}: field {name!r} holds half a surrogate pair") from error
    return text


def _missing(name: str, names: Any) -> str:
    hint = "" if name in ("input", "target") else "; set data.text_field"
    return f"no field {name!r} (there are: {', '.join(map(str, names)) or 'none'}){hint}"
