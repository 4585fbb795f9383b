"""The shards of a corpus, and what is made of one: digests for the split, and tokens.

A shard is cut by the files alone, never by the number of processes. What is made of shard 7 lies in
the job's folder as

    00000007.documents    a row of DOCUMENT for each distinct document of the shard
    00000007.paragraphs   a row of PARAGRAPH for each paragraph of these, for the split
    00000007.bin          the tokens of its documents, one after the other
    00000007.json         counts, malformed records, size and checksum of the others; written last
"""

import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from pydantic import Field

from megaarch.files import Schema, fit, read_json, size_and_checksum
from megaarch.ingest import corpus, sources, split
from megaarch.ingest.indexed_dataset import mapped, token_dtype
from megaarch.ingest.lines import RecordError, Shard, lines_between
from megaarch.ingest.tokenizer import Tokenizer

ABSENT = -1  # tokens of a document that is held out for certain, and so was not tokenized
EXCLUDED = -1  # train_size of a document that Job.exclude leaves nothing of

# key: digest of the document. place: in the split. size: in bytes. ordinal: among all documents
# of the shard. paragraphs: rows of PARAGRAPH. tokens: of each sequence, of which a pair has two.
# train_key, train_size: of what is left for train once Job.exclude is left out; dropped: how many
# paragraphs that takes.
DOCUMENT = np.dtype(
    [
        ("key", "V16"),
        ("train_key", "V16"),
        ("place", "<f8"),
        *((name, "<i8") for name in ("size", "ordinal", "paragraphs")),
        ("tokens", "<i8", 2),
        *((name, "<i8") for name in ("train_size", "dropped")),
    ]
)
# span: bytes of the paragraph and of the blank lines after it.
PARAGRAPH = np.dtype([("digest", "<u8"), ("span", "<i8")])
DOCUMENT_ROW, PARAGRAPH_ROW = struct.Struct("<16s16sd7q"), struct.Struct("<8sq")
SUFFIXES = (".documents", ".paragraphs", ".bin")
SHARD_BYTES = 1 << 25


@dataclass(frozen=True)
class Job:
    """The settings that a shard's files depend on, and the folder that they go to.

    tokenizer: None makes digests only. fields: of a record, corpus.PAIR for supervised data.
    exclude: text that must not be trained on.
    """

    folder: Path
    tokenizer: Tokenizer | None
    fields: tuple[str, ...] = corpus.TEXT
    held_out: float = 0.1
    append_eos: bool = True
    skip_malformed: bool = False
    exclude: split.Exclusion | None = None

    @property
    def paired(self) -> bool:
        return len(self.fields) > 1

    @property
    def dtype(self) -> np.dtype:
        """The type of every id that a text can give, the end of the document included."""
        assert self.tokenizer is not None
        return token_dtype(self.tokenizer.vocabulary.size).newbyteorder("<")

    def file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:08d}{suffix}"

    def documents(self, number: int) -> np.ndarray:
        """The rows of DOCUMENT of a shard, memory-mapped."""
        return mapped(self.file(number, ".documents"), DOCUMENT)

    def paragraphs(self, number: int) -> np.ndarray:
        """The rows of PARAGRAPH of a shard, memory-mapped."""
        return mapped(self.file(number, ".paragraphs"), PARAGRAPH)


class Summary(Schema):
    """A finished shard's .json. malformed: (line of the shard or row of the file, what is wrong) of each
    record that was skipped. files: size and checksum of each of SUFFIXES."""

    documents: int
    duplicates: int
    bytes: int
    malformed: list[Annotated[tuple[int, str], Field(strict=False)]]  # JSON has no tuples
    files: dict[str, list[int]]


def cut(path: str, shard_bytes: int) -> Iterator[Shard]:
    """Yields the shards of a source in order: about `shard_bytes` of a plain JSON lines file, as
    many whole row groups of a parquet file, any other file whole."""
    for file in sources.files(path):
        kind = sources.format_of(file)
        if kind == "parquet":
            yield from _row_groups(file, shard_bytes)
        elif kind == "json" and sources.compression_of(file) is None:
            size = file.stat().st_size
            for at in range(0, size, shard_bytes):
                yield Shard(file, at, min(at + shard_bytes, size))
        else:
            yield Shard(file)


def _row_groups(file: Path, shard_bytes: int) -> Iterator[Shard]:
    with corpus.open_parquet(file) as table:
        groups = [table.metadata.row_group(g) for g in range(table.num_row_groups)]
    start, size = 0, 0
    for number, group in enumerate(groups, start=1):
        size += group.total_byte_size
        if size >= shard_bytes or number == len(groups):
            yield Shard(file, start, number)
            start, size = number, 0


def make(number: int, shard: Shard, job: Job) -> Summary:
    """Makes the files of shard `number`. UserError for a malformed record, unless they are to be
    skipped: its line is the one in the file."""
    malformed: list[tuple[int, str]] = []

    def on_error(error: RecordError) -> None:
        if not job.skip_malformed:
            line = error.location.number + lines_before(shard)
            raise RecordError(error.location._replace(number=line), error.what)
        malformed.append((error.location.number, sources.printable(error.what)))

    with ExitStack() as stack:
        files = [stack.enter_context(job.file(number, end).open("wb")) for end in SUFFIXES]
        writer = _Writer(job, *files)
        for ordinal, parts in enumerate(corpus.read(shard, job.fields, on_error)):
            writer.add(ordinal, parts)
    summary = Summary(
        documents=len(writer.seen),
        duplicates=writer.duplicates,
        bytes=writer.bytes,
        malformed=malformed,
        files=_checksums(number, job),
    )
    job.file(number, ".json").write_text(json.dumps(summary.model_dump()))
    return summary


def lines_before(shard: Shard, start: int = 0) -> int:
    """Counts the lines of a shard's file that begin at a byte of start:shard.start. Rows of parquet are
    numbered by the file: 0."""
    if sources.format_of(shard.file) != "json":
        return 0
    return lines_between(shard.file, start, shard.start)


def finished(number: int, job: Job) -> Summary | None:
    """Returns the summary of a shard whose files are as they were written, else None."""
    file = job.file(number, ".json")
    try:
        summary = fit(read_json(file), Summary, file)
        return summary if summary.files == _checksums(number, job) else None
    except (OSError, ValueError):
        return None


def _checksums(number: int, job: Job) -> dict[str, list[int]]:
    return {suffix: list(size_and_checksum(job.file(number, suffix))) for suffix in SUFFIXES}


def read_rows(shard: Shard, job: Job, ordinals: np.ndarray) -> Iterator[tuple[str, ...]]:
    """Yields the parts of the documents of these ordinals, int64 [n]."""
    wanted = set(ordinals.tolist())
    for ordinal, parts in enumerate(corpus.read(shard, job.fields, lambda error: None)):
        if ordinal in wanted:
            yield parts


def write_held_out(
    number: int, shard: Shard, job: Job, ordinals: np.ndarray, overlap: np.ndarray
) -> tuple[int, int, int]:
    """Writes the documents of these ordinals, less their paragraphs in `overlap`, as JSON lines.

    ordinals: int64 [n]. overlap: uint64 digests. Returns how many documents and bytes are left and
    how many paragraphs were dropped.
    """
    raw = overlap.tobytes()
    drop = {raw[at : at + 8] for at in range(0, len(raw), 8)}
    documents = size = dropped = 0
    with job.file(number, ".heldout.jsonl").open("wb") as file:
        for parts in read_rows(shard, job, ordinals):
            record: list[str] | dict[str, str] = list(parts)
            if not job.paired:
                text, paragraphs = split.drop_paragraphs(parts[0], drop)
                dropped += paragraphs
                if paragraphs and not any(split.paragraphs(text)):
                    continue
                parts, record = (text,), {"text": text}
            documents, size = documents + 1, size + sum(map(split.size_of, parts))
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    return documents, size, dropped


class _Writer:
    """Writes the rows and the tokens of a shard's distinct documents."""

    def __init__(self, job: Job, documents: BinaryIO, paragraphs: BinaryIO, tokens: BinaryIO):
        self.job, self.seen = job, set[bytes]()
        self.duplicates = self.bytes = 0
        self._documents, self._paragraphs, self._tokens = documents, paragraphs, tokens
        self._certain = split.first_threshold(job.held_out)

    def add(self, ordinal: int, parts: tuple[str, ...]) -> None:
        key = split.digest("\0".join(parts))
        if key in self.seen:
            self.duplicates += 1
            return
        self.seen.add(key)
        job, size = self.job, sum(map(split.size_of, parts))
        self.bytes += size
        # A pair's side of the split depends on its input alone, so that no held-out input is
        # trained on with another target.
        place = split.place(split.digest(parts[0]) if job.paired else key)
        kept, dropped = job.exclude.strip(parts) if job.exclude else (parts, 0)
        train_key, train_size = key, EXCLUDED if kept is None else size
        if kept and dropped:
            train_key, train_size = split.digest(kept[0]), split.size_of(kept[0])
        first = second = ABSENT
        if job.tokenizer and kept is not None and self._may_be_train(place, size):
            first = self._encode(job.tokenizer, kept[0])
            second = self._encode(job.tokenizer, kept[1]) if job.paired else 0
        count = 0 if job.paired or not job.held_out else self._add_paragraphs(parts[0])
        row = (key, train_key, place, size, ordinal, count, first, second, train_size, dropped)
        self._documents.write(DOCUMENT_ROW.pack(*row))

    def _may_be_train(self, place: float, size: int) -> bool:
        """Whether the split may put a document into train: it lies above the first threshold, or
        has so much of the shard's text so far that it may be large of the corpus. Pairs of one input
        may be large together."""
        if self.job.paired or place >= self._certain:
            return True
        return split.is_large(size, self.job.held_out, self.bytes)

    def _encode(self, tokenizer: Tokenizer, text: str) -> int:
        ids = tokenizer.encode(text)
        if self.job.append_eos:
            ids = np.append(ids, tokenizer.vocabulary.eos)
        self._tokens.write(ids.astype(self.job.dtype).data)
        return len(ids)

    def _add_paragraphs(self, text: str) -> int:
        size_of, pack = split.size_of, PARAGRAPH_ROW.pack  # looked up once: this loop is hot
        rows = [
            pack(digest, size_of(paragraph) + size_of(space))
            for paragraph, space in split.spaced_paragraphs(text)
            if (digest := split.paragraph_digest(paragraph))
        ]
        self._paragraphs.write(b"".join(rows))
        return len(rows)
