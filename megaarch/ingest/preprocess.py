"""Text to an indexed dataset in a batch job: the pipeline by many processes, resumable.

The dataset is what `ingest/prepare.py` makes of the same text with the same tokenizer.

    PREFIX.parts/           shards (ingest/shards.py), until the job is done
    PREFIX.bin, PREFIX.idx  train, a sequence a document
    PREFIX.heldout.jsonl    held-out documents, less the paragraphs that also stand in train
    PREFIX.manifest.json    what it was made of, and counts
"""

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaarch.errors import UserError
from megaarch.files import LARGEST, check_regular, read_json, take_lock, write_json, writing
from megaarch.ingest import corpus, shards, sources
from megaarch.ingest.indexed_dataset import IndexedDataset, prefix_of
from megaarch.ingest.manifest import DatasetManifest, Plan
from megaarch.ingest.pipeline import Pipeline, Progress
from megaarch.ingest.shards import SHARD_BYTES, Job
from megaarch.ingest.sources import HELD_OUT, MANIFEST, PARTS
from megaarch.ingest.tokenizer import Tokenizer

FORMAT = 4  # raise it when the same request would give other files
LEAST_SHARD_BYTES = 256
LEAST_HELD_OUT = 1e-4  # as data.held_out
MOST_NAMED = 100  # malformed records in the manifest
LOCK, PLAN = "lock", "plan.json"
SHARD = re.compile(r"\d{8}\.json")  # of a finished one, of which there may be none yet
# What a job writes into PREFIX.parts.
OWN = re.compile(
    r"lock|plan\.json|train\.(bin|idx|heldout\.jsonl)|\d{8}\.(documents|paragraphs|bin|json|heldout\.jsonl)"
    r"|.*\.\d+\.aside"
)


@dataclass(frozen=True)
class Request:
    """The arguments of a job. held_out: share of the text's bytes; 0 keeps all for train."""

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
        if self.prefix.rpartition("/")[2] in ("", ".", ".."):
            raise UserError(
                f"--output {self.output!r} names no files: end it with a name for them, as data/corpus"
            )
        with suppress(FileNotFoundError):
            check_regular(self.output)
        if self.shard_bytes < LEAST_SHARD_BYTES:
            raise UserError(
                f"--shard-bytes must be at least {LEAST_SHARD_BYTES}, not {self.shard_bytes}"
            )

    @property
    def prefix(self) -> str:
        return prefix_of(self.output)


def preprocess(
    request: Request, executor: Executor | None = None, progress: Progress = lambda *_: None
) -> DatasetManifest:
    """Makes the dataset, going on where an earlier job of the same request ended.

    executor: of the processes that work; None works here.
    UserError: a source or the tokenizer is missing or malformed; the output exists, or another
    job's parts do; PREFIX.parts has other files, or a source; another process is at work on them.
    """
    tokenizer = Tokenizer(request.tokenizer, sentinels=0)
    plan = _plan(request, tokenizer)
    folder = Path(request.prefix + PARTS)
    if made := _made(request.prefix, plan):
        if _plan_in(folder) == plan.model_dump():
            _clear(folder)
        return made
    with writing(folder), _claimed(request.prefix, folder, plan):
        job = Job(
            folder,
            tokenizer,
            (request.text_field,),
            request.held_out,
            request.append_eos,
            request.skip_malformed,
        )
        cut = [s for source in request.sources for s in shards.cut(source, request.shard_bytes)]
        pipeline = Pipeline(job, cut, executor)
        pipeline.make(progress, resume=True)
        made = _finish(request, plan, pipeline)
        _clear(folder)
    return made


def _plan(request: Request, tokenizer: Tokenizer) -> Plan:
    for source in request.sources:
        kind = corpus.kind(source, request.text_field)
        if kind != "text":
            raise UserError(
                f"data source {source} is {kind}, not text: megaarch train reads it as it is"
            )
    return Plan(
        format=FORMAT,
        sources=[sources.identity(source) for source in request.sources],
        tokenizer=tokenizer.text_fingerprint,
        text_field=request.text_field,
        held_out=request.held_out,
        append_eos=request.append_eos,
        shard_bytes=request.shard_bytes,
    )


def _made(prefix: str, plan: Plan) -> DatasetManifest | None:
    """Returns the manifest, where an earlier job of this plan has finished."""
    made = DatasetManifest.read(prefix)
    if made is None or made.request != plan or not Path(prefix + ".idx").exists():
        return None
    if IndexedDataset(prefix).checksum() != made.checksum:
        raise UserError(f"{prefix}.bin has changed since it was made: delete it to make it again")
    return made


@contextmanager
def _claimed(prefix: str, folder: Path, plan: Plan) -> Iterator[None]:
    """Keeps other processes out of the job's folder, which holds shards of this plan alone."""
    file = folder / PLAN
    for name in (str(name) for source in plan.sources for name, *_ in source):
        if Path(name).is_relative_to(folder.resolve()):
            raise UserError(
                f"source {name} lies in {folder}, which is this command's own: give another --output"
            )
    if not file.exists():
        for suffix in (".bin", ".idx", MANIFEST, HELD_OUT):
            if Path(prefix + suffix).exists():
                raise UserError(
                    f"{prefix}{suffix} exists and is not what this command makes: give another "
                    "--output, or delete it"
                )
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        foreign = [name for name in names if name != LOCK and not name.startswith(f"{PLAN}.")]
        if foreign:
            raise UserError(
                f"{folder} holds {foreign[0]}, and no {PLAN} of this command: give another --output, "
                "or move it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        if not take_lock(lock):
            raise UserError(f"{folder}: another process is at work in it")
        asked = plan.model_dump()
        before = _plan_in(folder) if file.exists() else asked
        changed = [key for key in asked if before.get(key) != asked[key]]
        begun = any(SHARD.fullmatch(path.name) for path in folder.iterdir())
        if changed and (begun or before.keys() != asked.keys()):
            raise UserError(
                f"{folder} holds part of a job with another {' and '.join(changed)}: finish it "
                "with its own arguments and unchanged sources, or delete that folder"
            )
        write_json(file, asked)
        yield


def _plan_in(folder: Path) -> dict[str, Any]:
    """Returns what plan.json of a folder says; {} where there is none or it is damaged."""
    try:
        found = read_json(folder / PLAN, LARGEST)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _clear(folder: Path) -> None:
    """Removes the job's own files and, where nothing else is in it, their folder. The plan goes last
    but one: a folder without it is not the job's."""
    found = (path for path in folder.iterdir() if path.is_file())
    own = [path for path in found if OWN.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: (path.name == LOCK, path.name == PLAN)):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _finish(request: Request, plan: Plan, pipeline: Pipeline) -> DatasetManifest:
    """Makes the output of finished shards."""
    malformed = _malformed(pipeline)
    if malformed and not request.skip_malformed:
        raise UserError(f"{malformed[0]} (and {len(malformed) - 1} more)")
    split, tokenizer = pipeline.open_split(), pipeline.job.tokenizer
    assert tokenizer is not None
    if not split.documents:
        raise UserError("the sources hold no text")
    split.choose(request.held_out)
    aside = f"{pipeline.job.folder}/train"
    pipeline.write_held_out(Path(aside + HELD_OUT))
    pipeline.write_train(aside, range(len(pipeline.shards)))
    train = IndexedDataset(aside)
    made = DatasetManifest(
        request=plan,
        tokenizer=tokenizer.description,
        tokenizer_file=sources.printable(str(Path(request.tokenizer).resolve())),
        checksum=train.checksum(),
        digest=train.digest(),
        malformed=len(malformed),
        malformed_records=malformed[:MOST_NAMED],
        **dict(pipeline.counts(train.tokens)),
    )
    sources.check_unchanged(request.sources, plan.sources)
    # The index goes last: without it there is no dataset, and the same command makes it again.
    for suffix in (HELD_OUT, ".bin") if request.held_out else (".bin",):
        Path(aside + suffix).replace(request.prefix + suffix)
    write_json(request.prefix + MANIFEST, made.model_dump())
    Path(f"{aside}.idx").replace(request.prefix + ".idx")
    return made


def _malformed(pipeline: Pipeline) -> list[str]:
    """Lists the records that were skipped: file, line or row, and the fault."""
    found, lines, file, start = [], 0, None, 0  # lines of the file before a byte of it
    for shard, summary in zip(pipeline.shards, pipeline.summaries, strict=True):
        if not summary.malformed:
            continue
        if shard.file != file or shard.start < start:  # a source may be given twice
            lines = start = 0
        lines += shards.lines_before(shard, start)
        file, start = shard.file, shard.start
        unit = "row" if sources.format_of(shard.file) == "parquet" else "line"
        found += [f"{shard.file}, {unit} {lines + n}: {what}" for n, what in summary.malformed]
    return [sources.printable(record) for record in found]
