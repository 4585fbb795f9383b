"""Text from files, one document at a time: JSON lines, parquet, plain text, the embedded corpus.

Everything is lazy: a corpus larger than memory is read as a stream, as often as is needed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaarch.errors import UserError
from megaarch.files import check_regular
from megaarch.ingest import embedded_corpus
from megaarch.ingest.lines import Location, OnError, RecordError, Shard, read_lines
from megaarch.ingest.sources import EMBEDDED, files, format_of, indexed_prefix
from megaarch.ingest.tasks.task import Task

NAMED = 20  # fields that a sentence names
SEPARATOR = "<|endoftext|>"  # a line of its own between two documents of a plain text file
TEXT, PAIR = ("text",), ("input", "target")  # the fields of a document, of a supervised record


def stop(error: RecordError) -> None:
    """Ends the reading at the first malformed record."""
    raise error


def documents(path: str, text_field: str = "text") -> Iterator[str]:
    """Yields the documents of a source, in a fixed order.

    path: "embedded", a file, a directory or a glob: what sources.files finds.
    UserError: a source that is missing or of no known format; `read`'s.
    """
    for file in files(path):
        yield from (text for (text,) in read(Shard(file), (text_field,)))


def read(
    shard: Shard, fields: tuple[str, ...] = TEXT, on_error: OnError = stop
) -> Iterator[tuple[str, ...]]:
    """Yields the documents of a shard, each the texts of its fields: one, or those of PAIR.

    Documents of one field that are blank are left out. JSON lines and parquet hold a document a
    record, a task the pairs that it trains on. A plain text file is one document, unless form feeds or
    lines `<|endoftext|>` divide it; one with a malformed line is left out whole. Lines of a part
    of a JSON lines file count from its start.
    UserError: a malformed record, a missing field or bad UTF-8, naming file and line; pairs that
    are asked of plain text.
    """
    paired, plain = len(fields) > 1, format_of(shard.file) == "text"
    if paired and str(shard.file) == EMBEDDED:
        raise UserError("data.kind is supervised, but the embedded corpus holds plain text")
    if paired and plain:
        raise UserError(f"{shard.file}: supervised data are JSON lines or parquet, not plain text")
    if format_of(shard.file) == "task":
        if not paired:
            raise UserError(f"{shard.file} is a task, whose items are pairs: leave data.kind out")
        rows = Task(shard.file).pairs()
    elif str(shard.file) == EMBEDDED:
        rows = ((text,) for _, text in embedded_corpus.documents())
    elif plain:
        rows = ((text,) for text in _text_documents(shard, on_error) if _is_utf8(text))
    else:
        rows = _fields(shard, fields, on_error)
    for row in rows:
        if paired or row[0].strip():
            yield row


def kind(path: str, text_field: str = "text", prefer_pairs: bool = False) -> str:
    """Returns what a source holds, by its names and its first sound record: "text", "supervised"
    or "indexed".

    prefer_pairs: whether records with `input`, `target` and `text_field` are supervised, and so
    are those with none of them, of which a reader then says what they lack.
    """
    if indexed_prefix(path) is not None:
        return "indexed"
    for file in files(path):
        if format_of(file) == "task":
            return "supervised"
        if format_of(file) == "text" or path == EMBEDDED:
            continue
        for _, record in _records(Shard(file), lambda error: None):
            paired = record.keys() >= set(PAIR)
            if text_field in record:
                return "supervised" if paired and prefer_pairs else "text"
            return "supervised" if paired or prefer_pairs else "text"
    return "text"


def _is_utf8(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _text_documents(shard: Shard, on_error: OnError) -> Iterator[str]:
    """Yields the documents of plain text, those with malformed lines as `read_lines` keeps them."""
    document: list[str] = []
    for _, line in read_lines(shard, on_error, keep=True):
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


def _fields(shard: Shard, names: tuple[str, ...], on_error: OnError) -> Iterator[tuple[str, ...]]:
    for location, record in _records(shard, on_error, *names):
        try:
            row = tuple([_field(record, name, location) for name in names])
        except RecordError as error:
            on_error(error)
        else:
            yield row


def _records(
    shard: Shard, on_error: OnError, *columns: str
) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Yields (location, record) of each record. columns: those to read of a parquet file."""
    if format_of(shard.file) == "parquet":
        yield from _parquet_records(shard, columns)
        return
    for location, line in read_lines(shard, on_error):
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
                yield location, record
                continue
            what = f"one JSON object a line is expected, not {line[:20]!r}"
        on_error(RecordError(location, what))


def _parquet_records(
    shard: Shard, columns: tuple[str, ...]
) -> Iterator[tuple[Location, dict[str, Any]]]:
    with open_parquet(shard.file) as table:
        there = table.schema_arrow.names
        for name in columns:
            if name not in there:
                raise UserError(f"{shard.file}: {_missing(name, there)}")
        groups = range(table.num_row_groups)[shard.start : shard.end]
        number = sum(table.metadata.row_group(g).num_rows for g in range(groups.start))
        size, columns_read = (1024, list(columns)) if columns else (1, None)
        for batch in table.iter_batches(size, groups, columns=columns_read):
            for record in _parquet_rows(batch, shard.file, number):
                number += 1
                yield Location(shard.file, "row", number), record


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """Yields an open pyarrow.parquet.ParquetFile. UserError where what is read of it cannot be."""
    import pyarrow
    import pyarrow.parquet

    check_regular(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error


def _parquet_rows(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    """Returns the rows of a record batch. UserError names the one that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                what = f"not UTF-8 ({error.reason})"
                raise RecordError(Location(file, "row", before + row + 1), what) from error
        raise


def _field(record: dict[str, Any], name: str, location: Location) -> str:
    if name not in record:
        raise RecordError(location, _missing(name, record))
    text = record[name]
    if not isinstance(text, str):
        what = f"field {name!r} is not a string but {type(text).__name__}"
        raise RecordError(location, what)
    if not _is_utf8(text):
        raise RecordError(location, f"field {name!r} holds half a surrogate pair")
    return text


def _missing(name: str, names: Any) -> str:
    if name in PAIR:
        hint = "; a supervised record has the texts input and target"
    else:
        hint = "; set data.text_field, or --text-field of a tool"
    there = [str(other) for other in names]
    there[NAMED:] = ["..."] if len(there) > NAMED else []
    return f"no field {name!r} (there are: {', '.join(there) or 'none'}){hint}"
