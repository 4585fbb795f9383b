"""Text to an indexed dataset in a batch job: by many processes, shard by shard, resumable.

    shards in parallel ──> split of all documents ──> held-out texts in parallel ──> PREFIX.*

What comes out hangs on the text, the tokenizer and the options, never on who made which shard. It
is what `ingest/prepare.py` makes of the same text with the same tokenizer: the same train documents
in the same order, the same held-out documents.

    PREFIX.parts/           shards (ingest/shards.py), until the job is done
    PREFIX.bin, PREFIX.idx  train, a sequence a document
    PREFIX.heldout.jsonl    held-out documents, less the paragraphs that also stand in train
    PREFIX.manifest.json    what it was made of, and counts
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaarch.data.indexed import IndexedDataset, IndexedWriter, prefix_of
from megaarch.data.tokenizer import Tokenizer
from megaarch.errors import UserError
from megaarch.files import LARGEST, read_json
from megaarch.ingest import corpus, lines, shards, sidecar, sources
from megaarch.ingest.lines import Shard
from megaarch.ingest.shards import ABSENT, Job, Summary
from megaarch.ingest.sides import Sides

FORMAT = 3  # raise it when the same request would give other files
SHARD_BYTES = 1 << 25
LEAST_SHARD_BYTES = 256
LEAST_HELD_OUT = 1e-4  # as data.held_out
MOST_NAMED = 100  # malformed records in the manifest

Progress = Callable[[int, int, Summary | None, bool], None]  # done, of, the shard's, found finished


@dataclass(frozen=True)
class Request:
    """What is to be made of what. held_out: share of the text's bytes; 0 keeps all for train."""

    sources: tuple[str, ...]
    output: str
    tokenizer: str
    text_field: str = "text"
    held_out: float = 0.1
    append_eos: bool = True
    skip_malformed: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self):
        if self.held_out and not LEAST_HELD_OUT <= self.held_out < 1:
            raise UserError(
                f"--held-out is 0, or a share from {LEAST_HELD_OUT} to below 1, not {self.held_out}"
            )
        if self.shard_bytes < LEAST_SHARD_BYTES:
            raise UserError(
                f"--shard-bytes must be at least {LEAST_SHARD_BYTES}, not {self.shard_bytes}"
            )

    @property
    def prefix(self) -> str:
        return prefix_of(self.output)


def preprocess(
    request: Request, executor: Executor | None = None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Makes the dataset, going on where an earlier job of the same request ended.

    executor: of the processes that work; None works here. Returns the manifest.
    ValueError: a source or the tokenizer is missing or malformed; the output exists, or another
    job's parts do; another process is at work on them.
    """
    tokenizer = Tokenizer(request.tokenizer, sentinels=0)
    plan = _plan(request, tokenizer)
    folder = Path(request.prefix + ".parts")
    if made := _made(request, plan):
        shutil.rmtree(folder, ignore_errors=True)
        return made
    with _claimed(request, folder, plan):
        job = Job(
            folder,
            request.tokenizer,
            request.text_field,
            request.held_out,
            request.append_eos,
            request.skip_malformed,
        )
        cut = shards.cut(request.sources, request.shard_bytes)
        summaries = _tokenize(cut, job, executor, progress)
        manifest = _join(request, plan, tokenizer, cut, job, summaries, executor)
    shutil.rmtree(folder)
    return manifest


def _plan(request: Request, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the files, as JSON holds it."""
    for source in request.sources:
        kind = corpus.kind(source, request.text_field)
        if kind != "text":
            raise UserError(
                f"data source {source} is {kind}, not text: megaarch train reads it as it is"
            )
    return {
        "format": FORMAT,
        "sources": [sources.identity(source) for source in request.sources],
        "tokenizer": tokenizer.text_fingerprint,
        "text_field": request.text_field,
        "held_out": request.held_out,
        "append_eos": request.append_eos,
        "shard_bytes": request.shard_bytes,
    }


def _made(request: Request, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, where an earlier job of this plan has finished."""
    prefix = request.prefix
    made = sidecar.read(prefix)
    if made is None or made["request"] != plan or not Path(prefix + ".idx").exists():
        return None
    if IndexedDataset(prefix).checksum() != made["checksum"]:
        raise UserError(f"{prefix}.bin has changed since it was made: delete it to make it again")
    return made


@contextmanager
def _claimed(request: Request, folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """The job's folder is this process's alone, and holds shards of this plan only."""
    if not (folder / "plan.json").exists():
        for suffix in (".bin", ".idx", sidecar.MANIFEST, sidecar.HELD_OUT):
            if Path(request.prefix + suffix).exists():
                raise UserError(
                    f"{request.prefix}{suffix} exists and is not what this command makes: give "
                    "another --output, or delete it"
                )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is at work in it") from None
        file = folder / "plan.json"
        try:
            before = read_json(file, LARGEST) if file.exists() else plan
        except ValueError:
            before = {}
        before = before if isinstance(before, dict) else {}
        changed = [key for key in plan if before.get(key) != plan[key]]
        if changed:
            raise UserError(
                f"{folder} holds part of a job with another {' and '.join(changed)}: finish it "
                "with its own arguments and unchanged sources, or delete that folder"
            )
        shards.replace(file, lambda stream: stream.write(json.dumps(plan).encode()))
        yield


def _tokenize(
    cut: list[Shard], job: Job, executor: Executor | None, progress: Progress
) -> list[Summary]:
    """The summaries of all shards; those that are finished are verified and kept."""
    found = {}
    for number in range(len(cut)):
        if summary := shards.finished(number, job.folder):
            found[number] = summary
            progress(len(found), len(cut), summary, True)
    tasks = {n: (n, shard, job) for n, shard in enumerate(cut) if n not in found}
    for number, summary in each(executor, shards.tokenize, tasks):
        found[number] = summary
        progress(len(found), len(cut), summary, False)
    return [found[number] for number in range(len(cut))]


def each(
    executor: Executor | None, function: Callable, tasks: dict[int, tuple]
) -> Iterator[tuple[int, Any]]:
    """(key, function(*task)) of every task, as they end. The first error ends them all."""
    if executor is None:
        for key, task in tasks.items():
            yield key, function(*task)
        return
    futures = {executor.submit(function, *task): key for key, task in tasks.items()}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def _join(
    request: Request,
    plan: dict[str, Any],
    tokenizer: Tokenizer,
    cut: list[Shard],
    job: Job,
    summaries: list[Summary],
    executor: Executor | None,
) -> dict[str, Any]:
    """The output, from finished shards."""
    malformed = _malformed(cut, summaries)
    if malformed and not request.skip_malformed:
        raise UserError(f"{malformed[0]} (and {len(malformed) - 1} more)")
    sides = Sides(job.folder, len(cut), request.held_out)
    held_out = _held_out(request, sides, cut, job, executor)
    aside = f"{job.folder}/train"
    _write(aside, tokenizer, job.folder, sides.train)
    train = IndexedDataset(aside)
    manifest = {
        "request": plan,
        "tokenizer": tokenizer.description,
        "tokenizer_file": str(Path(request.tokenizer).resolve()),
        "checksum": train.checksum(),
        "digest": train.digest(),
        "documents": sides.documents,
        "duplicates": sum(s.documents + s.duplicates for s in summaries) - sides.documents,
        "train_documents": len(train),
        "train_bytes": sides.train_bytes,
        "train_tokens": train.tokens,
        **held_out,
        "notes": sides.notes,
        "malformed": len(malformed),
        "malformed_records": malformed[:MOST_NAMED],
    }
    # The index goes last: without it there is no dataset, and the same command makes it again.
    Path(f"{aside}.bin").replace(request.prefix + ".bin")
    sidecar.write(request.prefix, manifest)
    Path(f"{aside}.idx").replace(request.prefix + ".idx")
    return manifest


def _held_out(
    request: Request, sides: Sides, cut: list[Shard], job: Job, executor: Executor | None
) -> dict[str, int]:
    """Writes the held-out documents; returns their counts."""
    tasks = {}
    for n, rows in enumerate(sides.held_out):
        if len(rows):
            ordinals = shards.read_table(n, job.folder, "ordinals")["ordinals"][rows]
            tasks[n] = (n, cut[n], job, ordinals, sides.shared[n])
    counts = dict(each(executor, shards.held_out_texts, tasks))
    if request.held_out:
        files = [job.folder / f"{n:08d}.heldout.jsonl" for n in sorted(counts)]
        target = Path(request.prefix + sidecar.HELD_OUT)
        shards.replace(target, lambda out: _concatenate(files, out))
    names = ("heldout_documents", "heldout_bytes", "dropped_paragraphs")
    return {name: sum(row[k] for row in counts.values()) for k, name in enumerate(names)}


def _malformed(cut: list[Shard], summaries: list[Summary]) -> list[str]:
    """Every record that was skipped: file, line or row, what is wrong with it."""
    found, lines = [], 0
    for k, (shard, summary) in enumerate(zip(cut, summaries, strict=True)):
        lines = 0 if k == 0 or cut[k - 1].file != shard.file else lines
        unit = "row" if sources.format_of(shard.file) == "parquet" else "line"
        found += [f"{shard.file}, {unit} {lines + n}: {what}" for n, what in summary.malformed]
        lines += summary.lines
    return [sources.printable(record) for record in found]


def _write(path: str, tokenizer: Tokenizer, folder: Path, train: list[np.ndarray]) -> None:
    """Writes the train documents of all shards."""
    dtype = shards.dtype_of(tokenizer)
    with IndexedWriter(path, dtype) as writer:
        for number, rows in enumerate(train):
            if not len(rows):
                continue
            lengths = shards.read_table(number, folder, "tokens")["tokens"]
            kept = np.zeros(len(lengths), dtype=bool)
            kept[rows] = True
            there = lengths != ABSENT
            assert there[rows].all(), "what is in train was tokenized"
            tokens = np.memmap(folder / f"{number:08d}.bin", dtype, mode="r")
            if not kept[there].all():
                tokens = tokens[np.repeat(kept[there], lengths[there])]
            writer.add_documents(tokens, lengths[rows])


def _concatenate(files: list[Path], out: Any) -> None:
    for file in files:
        with file.open("rb") as stream:
            shutil.copyfileobj(stream, out, lines.BLOCK)
