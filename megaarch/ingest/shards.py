"""Shards of a corpus, and the tokens of one: what a process of a preprocessing job makes.

A shard is cut by the files alone, never by the number of processes. What is made of shard 7 lies in
the job's folder as

    00000007.bin    the tokens of its documents, one after the other
    00000007.npz    a row a document and a row a paragraph, for the split
    00000007.json   counts, malformed records, size and checksum of the other two; written last
"""

import json
import os
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from megaarch.data.example import SPECIALS
from megaarch.data.indexed import token_dtype
from megaarch.data.tokenizer import Tokenizer
from megaarch.errors import UserError
from megaarch.files import Schema, fit, read_json
from megaarch.ingest import corpus, lines, sources, split
from megaarch.ingest.lines import MalformedRecord, Shard

ABSENT = -1  # tokens of a document that is held out for certain, and so was not tokenized


@dataclass(frozen=True)
class Job:
    """What a shard's files depend on beside its text, and where they go."""

    folder: Path
    tokenizer: str
    text_field: str
    held_out: float
    append_eos: bool
    skip_malformed: bool


@dataclass(frozen=True)
class Summary:
    """What is known of a finished shard. malformed: (line or row, what is wrong) of each record
    that was skipped. lines: of a JSON lines shard, so that later shards' lines can be counted on."""

    documents: int
    bytes: int
    tokens: int
    duplicates: int
    lines: int
    malformed: list[tuple[int, str]]


def cut(paths: tuple[str, ...], shard_bytes: int) -> list[Shard]:
    """The shards of all sources in order: about `shard_bytes` of a plain JSON lines file, as many
    whole row groups of a parquet file, any other file whole."""
    found: list[Shard] = []
    for path in paths:
        if path == sources.EMBEDDED:
            found.append(Shard(Path(path)))
            continue
        for file in sources.files(path):
            kind = sources.format_of(file)
            if kind == "parquet":
                found += _row_groups(file, shard_bytes)
            elif kind == "json" and sources.compression_of(file) is None:
                size = file.stat().st_size
                starts = range(0, size, shard_bytes)
                found += [Shard(file, at, min(at + shard_bytes, size)) for at in starts]
            else:
                found.append(Shard(file))
    return found


def _row_groups(file: Path, shard_bytes: int) -> Iterator[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            groups = [table.metadata.row_group(g) for g in range(table.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error
    start, size = 0, 0
    for number, group in enumerate(groups, start=1):
        size += group.total_byte_size
        if size >= shard_bytes or number == len(groups):
            yield Shard(file, start, number)
            start, size = number, 0


def tokenize(number: int, shard: Shard, job: Job) -> Summary:
    """Makes the files of shard `number`. ValueError for a malformed record, unless they are to be
    skipped: its line is the one in the file."""
    tokenizer = _tokenizer(job.tokenizer)
    table, malformed = Table(job.held_out), _Malformed(shard, job.skip_malformed)
    texts = corpus.shard_documents(shard, job.text_field, malformed)
    dtype = dtype_of(tokenizer)
    end = [tokenizer.vocabulary.eos] if job.append_eos else []
    certain, text_bytes = split.first_threshold(job.held_out), 0
    path = job.folder / f"{number:08d}"
    aside = Path(f"{path}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as file:
            for ordinal, text in enumerate(texts):
                key = split.digest(text)
                if key in table.seen:
                    table.duplicates += 1
                    continue
                tokens, size = ABSENT, split.size_of(text)
                text_bytes += size
                large = split.is_large(size, job.held_out, text_bytes)  # and so may stay in train
                if large or split.place(key) >= certain:
                    ids = np.append(tokenizer.encode(text), end).astype(dtype)
                    tokens = len(ids)
                    file.write(ids.data)
                table.add(ordinal, key, text, size, tokens)
        aside.replace(f"{path}.bin")
    finally:
        aside.unlink(missing_ok=True)
    replace(Path(f"{path}.npz"), lambda file: np.savez(file, **table.arrays()))
    summary = table.summary(malformed)
    record = {"summary": asdict(summary), "files": {}}
    for suffix in (".bin", ".npz"):
        record["files"][suffix] = _mark(Path(f"{path}{suffix}"))
    replace(Path(f"{path}.json"), lambda file: file.write(json.dumps(record).encode()))
    return summary


class _Summary(Schema):
    documents: int
    bytes: int
    tokens: int
    duplicates: int
    lines: int
    malformed: list[Annotated[list[int | str], Field(min_length=2, max_length=2)]]


class _Record(Schema):
    """What is read of a shard's .json."""

    summary: _Summary
    files: dict[str, list[int]]


def finished(number: int, folder: Path) -> Summary | None:
    """The summary of a shard whose files are all there and as they were written, else None."""
    path = folder / f"{number:08d}"
    try:
        record = fit(read_json(f"{path}.json"), _Record, f"{path}.json")
        for suffix in (".bin", ".npz"):
            if _mark(Path(f"{path}{suffix}")) != record.files.get(suffix):
                return None
    except (OSError, ValueError):
        return None
    given = record.summary.model_dump()
    return Summary(**given | {"malformed": [tuple(row) for row in given["malformed"]]})


def read_table(number: int, folder: Path, *names: str) -> dict[str, np.ndarray]:
    """These arrays of `Table.arrays`."""
    with np.load(folder / f"{number:08d}.npz") as file:
        return {name: file[name] for name in names}


def held_out_texts(
    number: int, shard: Shard, job: Job, ordinals: np.ndarray, shared: np.ndarray
) -> tuple[int, int, int]:
    """Writes the documents of these ordinals, less their paragraphs in `shared`, as JSON lines.

    ordinals: int64 [n], ascending. shared: uint64 digests, ascending. Returns how many documents
    and bytes are left and how many paragraphs were dropped.
    """
    wanted, raw = set(ordinals.tolist()), shared.astype(">u8").tobytes()
    drop = {raw[at : at + 8] for at in range(0, len(raw), 8)}
    documents = size = dropped = 0
    rows = []
    texts = corpus.shard_documents(shard, job.text_field, malformed=lambda error: None)
    for ordinal, text in enumerate(texts):
        if ordinal not in wanted:
            continue
        text, paragraphs = split.drop_paragraphs(text, drop)
        dropped += paragraphs
        if not paragraphs or any(True for _ in split.paragraphs(text)):
            documents, size = documents + 1, size + len(text.encode())
            rows.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    path = job.folder / f"{number:08d}.heldout.jsonl"
    replace(path, lambda file: file.write("".join(rows).encode()))
    return documents, size, dropped


class Table:
    """A row a distinct document of a shard, and a row a paragraph of each."""

    def __init__(self, held_out: float):
        self.seen: set[bytes] = set()
        self.duplicates = 0
        self._held_out = held_out
        self._digests, self._paragraphs = bytearray(), bytearray()
        self._ordinals, self._sizes, self._tokens = array("q"), array("q"), array("q")
        self._counts, self._spans = array("q"), array("q")

    def add(self, ordinal: int, key: bytes, text: str, size: int, tokens: int) -> None:
        """ordinal: of the document among all that the shard's text has. size: its bytes."""
        self.seen.add(key)
        self._digests += key
        self._ordinals.append(ordinal)
        self._sizes.append(size)
        self._tokens.append(tokens)
        before = len(self._spans)
        if self._held_out:
            for paragraph, space in split.spaced_paragraphs(text):
                if digest := split.paragraph_digest(paragraph):
                    self._paragraphs += digest
                    self._spans.append(split.size_of(paragraph) + split.size_of(space))
        self._counts.append(len(self._spans) - before)

    def arrays(self) -> dict[str, np.ndarray]:
        """digests uint8 [n, 16]; ordinals, sizes (bytes), tokens, counts (paragraphs): int64 [n].
        Of paragraphs, in the same order: uint64 digests [p], spans int64 [p]: their bytes with the
        blank lines after them."""
        return {
            "digests": np.frombuffer(self._digests, np.uint8).reshape(-1, 16),
            "ordinals": np.array(self._ordinals, np.int64),
            "sizes": np.array(self._sizes, np.int64),
            "tokens": np.array(self._tokens, np.int64),
            "counts": np.array(self._counts, np.int64),
            "paragraphs": np.frombuffer(self._paragraphs, ">u8").astype(np.uint64),
            "spans": np.array(self._spans, np.int64),
        }

    def summary(self, malformed: "_Malformed") -> Summary:
        tokens = sum(n for n in self._tokens if n != ABSENT)
        return Summary(
            documents=len(self._sizes),
            bytes=sum(self._sizes),
            tokens=tokens,
            duplicates=self.duplicates,
            lines=malformed.lines(),
            malformed=malformed.found,
        )


class _Malformed:
    """Gathers malformed records, or raises the first one."""

    def __init__(self, shard: Shard, skip: bool):
        self.shard, self.skip = shard, skip
        self.found: list[tuple[int, str]] = []

    def __call__(self, error: MalformedRecord) -> None:
        if not self.skip:
            number = error.number + self._lines_before()
            raise MalformedRecord(self.shard.file, error.unit, number, error.what)
        self.found.append((error.number, error.what))

    def _lines_before(self) -> int:
        return _begun(self.shard.file, 0, self.shard.start) if self._cut else 0

    def lines(self) -> int:
        shard = self.shard
        return _begun(shard.file, shard.start, shard.end) if self._cut else 0

    @property
    def _cut(self) -> bool:
        shard = self.shard
        return bool(shard.end) and sources.format_of(shard.file) == "json"


def _begun(file: Path, start: int, end: int) -> int:
    """How many lines begin at a byte of start:end: at 0, and after each newline."""
    count = int(start == 0 < end)
    with file.open("rb") as stream:
        at = max(start - 1, 0)
        stream.seek(at)
        while at < end - 1 and (block := stream.read(min(lines.BLOCK, end - 1 - at))):
            at += len(block)
            count += block.count(b"\n")
    return count


@cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path, sentinels=0)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The type of every id that a text can give, the end of the document included."""
    return token_dtype(tokenizer.base_size + len(SPECIALS)).newbyteorder("<")


def _mark(path: Path) -> list[int]:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return [path.stat().st_size, value]


def replace(path: Path, write: Any) -> None:
    """Puts a file in place whole: `write(stream)` fills it aside."""
    aside = Path(f"{path}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
