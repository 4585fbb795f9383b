"""From a source to what training reads: split, tokenizer, indexed dataset, held-out documents.

The result lies under `data.cache`, in a directory named by everything that it depends on, and is
reused while none of that changes. It is written aside and renamed: complete or absent, also when
several processes prepare the same data at once.
"""

import hashlib
import json
import logging
import multiprocessing
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from megaarch.config.schema import Data, Source
from megaarch.data.indexed import IndexedDataset, IndexedDocuments, IndexedWriter, token_dtype
from megaarch.data.tokenizer import Tokenizer, train_sentencepiece
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.files import LARGEST, Schema, fit, parse_json, read_bytes, read_json
from megaarch.ingest import corpus, sidecar, sources, tokenized
from megaarch.ingest.documents import Documents
from megaarch.ingest.split import Exclusion, place

log = logging.getLogger(__name__)

FORMAT = 4  # raise it when the same settings would give other files
TOKENIZER_BYTES = 1 << 25  # a larger corpus trains its tokenizer on a sample of this size

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on.

    train: (documents, weight) of each blended source. Every document ends with eos, if it is made
        of text here. Of supervised sources (dataset, weight): the sequences alternate input,
        target, and each ends with eos.
    supervised: whether they do.
    heldout: held-out documents, less the paragraphs that also stand in train. Of supervised
        sources, input and target joined by a newline. Of tokenized sources, what lies beside them.
    heldout_pairs: (input, target) of supervised sources, else empty.
    manifest: the counts, as manifest.json has them.
    fingerprint: of the content (train and held-out text, all tokens of tokenized sources,
        tokenizer, weights), so it is the same wherever the same data are prepared.
    """

    tokenizer: Tokenizer
    train: list[tuple[IndexedDocuments | IndexedDataset, float]]
    supervised: bool
    heldout: list[str]
    heldout_pairs: list[tuple[str, str]]
    manifest: dict[str, Any]
    fingerprint: str


def prepare(
    data: Data,
    vocabulary_size: int,
    progress: Progress | None = None,
    exclude: Exclusion | None = None,
) -> Prepared:
    """Prepares the data, or finds it prepared.

    vocabulary_size: ids of pieces, specials and sentinels together; Prepared.tokenizer's
        vocabulary has exactly that many.
    progress: is told in a few words what is being done.
    exclude: text that must not be trained on; what is dropped for it is counted.
    ValueError: the source or the tokenizer file is missing, malformed or too small, or prepared
        data have changed since; nothing half done is left behind.
    """
    job = _Job(data, vocabulary_size, progress or (lambda words: None), exclude)
    if not job.directory.exists():
        job.build()
    prepared = job.load()
    if _speaks():
        for note in sources.notes(_paths(data)) + prepared.manifest["notes"]:
            log.warning(note)
    return prepared


class _Job:
    def __init__(
        self,
        data: Data,
        vocabulary_size: int,
        progress: Progress,
        exclude: Exclusion | None,
    ):
        self.data, self.vocabulary_size, self.progress = data, vocabulary_size, progress
        self.exclude = exclude
        self.sources = _sources(data)
        self.kind = kind_of(data)
        if self.kind == "indexed" and exclude is not None:
            raise UserError(
                f"data source {self.sources[0].path} is tokenized already, so that held-out text "
                "cannot be left out of it: give the text itself"
            )
        given = data.tokenizer and Tokenizer(data.tokenizer, data.sentinels, vocabulary_size)
        key = {
            "format": FORMAT,
            "sources": [[sources.identity(s.path), s.weight] for s in self.sources],
            "kind": self.kind,
            "text_field": data.text_field,
            "sentinels": data.sentinels,
            "held_out": data.held_out,
            "vocabulary_size": vocabulary_size,
            "tokenizer": given and given.fingerprint,
            "exclude": exclude and exclude.fingerprint,
        }
        self.key = hashlib.blake2b(json.dumps(key).encode(), digest_size=10).hexdigest()
        self.directory = Path(data.cache) / self.key

    def build(self) -> None:
        """Prepares everything in a directory aside and renames it to `self.directory`."""
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            aside = self.directory.parent / f".preparing-{uuid.uuid4().hex}"
            aside.mkdir()
        except OSError as error:
            raise UserError(f"data.cache {self.data.cache} cannot be written: {error}") from error
        try:
            manifest = self._build_indexed(aside) if self.kind == "indexed" else self._build(aside)
            tokens, text = manifest["train_tokens"], manifest["train_bytes"]
            manifest["bytes_per_token"] = text / tokens if text else None
            manifest["heldout_checksum"] = _checksum((aside / "heldout.jsonl").read_bytes())
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            try:
                aside.rename(self.directory)
            except OSError:
                if not self.directory.exists():  # where it does, another process was faster
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _build_indexed(self, aside: Path) -> dict[str, Any]:
        tokenizer = self._tokenizer(aside, iter(()))
        self.progress("checking token ids")
        datasets, mark = self._datasets(self.directory), hashlib.blake2b(digest_size=16)
        for dataset in datasets:
            mark.update(tokenized.check(dataset, tokenizer).encode())
        texts = dict.fromkeys(text for d in datasets for text in sidecar.held_out(d.path))
        _write_lines(aside / "heldout.jsonl", [{"text": text} for text in texts])
        mark.update((aside / "heldout.jsonl").read_bytes())
        manifest = self._manifest(tokenizer, datasets, mark.digest())
        given, eos = self.data.tokenizer, tokenizer.vocabulary.eos
        manifest["notes"] = [n for d in datasets for n in tokenized.notes(d, given, eos)]
        return manifest | sidecar.counts([d.path for d in datasets], list(texts))

    def _build(self, aside: Path) -> dict[str, Any]:
        self.progress("splitting the corpus")
        documents = Documents(self.sources, self.kind, self.data, self.exclude)
        if self.data.tokenizer is None:
            self.progress("training the tokenizer")
        tokenizer = self._tokenizer(aside, _sample(documents))
        self.progress("tokenizing")
        mark = self._write_train(aside, tokenizer, documents)
        rows = [
            {"text": h.text} if self.kind == "text" else list(h.parts) for h in documents.heldout
        ]
        _write_lines(aside / "heldout.jsonl", rows)
        mark.update((aside / "heldout.jsonl").read_bytes())
        manifest = self._manifest(tokenizer, self._datasets(aside), mark.digest())
        return manifest | documents.counts | {"notes": documents.notes}

    def _tokenizer(self, aside: Path, sample: Iterator[str]) -> Tokenizer:
        """The tokenizer, its file copied to or made in `aside`."""
        sentinels, file = self.data.sentinels, aside / "tokenizer"
        if self.data.tokenizer is None:
            return train_sentencepiece(sample, self.vocabulary_size, sentinels, file)
        shutil.copyfile(self.data.tokenizer, file)
        return Tokenizer(file, sentinels, self.vocabulary_size)

    def _write_train(self, aside: Path, tokenizer: Tokenizer, documents: Documents) -> Any:
        """Tokenizes train, a dataset a source. Returns the running hash of its text."""
        mark = hashlib.blake2b(digest_size=16)
        eos, dtype = [tokenizer.vocabulary.eos], token_dtype(tokenizer.vocabulary.size)
        with ExitStack() as stack:
            prefixes = (aside / f"train-{k}" for k in range(len(self.sources)))
            writers = [stack.enter_context(IndexedWriter(p, dtype)) for p in prefixes]
            for item in documents.train(count=True):
                for part in item.parts:
                    writers[item.source].add(np.append(tokenizer.encode(part), eos))
                writers[item.source].end_document()
                mark.update(item.key)
        return mark

    def _datasets(self, directory: Path) -> list[IndexedDataset]:
        if self.kind == "indexed":
            return [IndexedDataset(sources.indexed_prefix(s.path)) for s in self.sources]
        return [IndexedDataset(directory / f"train-{k}") for k in range(len(self.sources))]

    def _manifest(
        self, tokenizer: Tokenizer, datasets: list[IndexedDataset], text: bytes
    ) -> dict[str, Any]:
        for source, dataset in zip(self.sources, datasets, strict=True):
            if not dataset.tokens:
                raise UserError(
                    f"data source {source.path} has no train text that other sources do not have"
                    + (" and that is not held out" if self.exclude else "")
                )
        checksums = [dataset.checksum() for dataset in datasets]
        weights = [source.weight for source in self.sources]
        content = [checksums, weights, tokenizer.fingerprint, text.hex()]
        origin = "trained on train" if self.data.tokenizer is None else self.data.tokenizer
        documents = sum(len(IndexedDocuments(dataset)) for dataset in datasets)
        return {
            "key": self.key,
            "fingerprint": hashlib.blake2b(
                json.dumps(content).encode(), digest_size=10
            ).hexdigest(),
            "kind": self.kind,
            "source": ", ".join(source.path for source in self.sources),
            "sources": [sources.identity(source.path) for source in self.sources],
            "tokenizer": f"{tokenizer.description}, {origin}",
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "checksums": checksums,
            "documents": documents,
            "duplicates": 0,
            "train_documents": documents,
            "train_bytes": None,
            "train_tokens": sum(dataset.tokens for dataset in datasets),
            "heldout_documents": 0,
            "heldout_bytes": 0,
            "heldout_share": 0.0,
            "dropped_paragraphs": 0,
            "excluded_documents": 0,
            "excluded_paragraphs": 0,
        }

    def load(self) -> Prepared:
        """Opens what lies in `self.directory`. ValueError where it is not what was written."""
        file = self.directory / "manifest.json"
        try:
            manifest = read_json(file, LARGEST)
            fit(manifest, _Manifest, file)
            heldout = read_bytes(self.directory / "heldout.jsonl", limit=1 << 50)
        except (OSError, ValueError) as error:
            raise UserError(
                f"prepared data in {self.directory} are damaged ({error}): delete "
                "that directory to prepare them again"
            ) from error
        tokenizer = Tokenizer(
            self.directory / "tokenizer", self.data.sentinels, self.vocabulary_size
        )
        datasets = self._datasets(self.directory)
        changed = [
            d.path
            for d, was in zip(datasets, manifest["checksums"], strict=True)
            if d.checksum() != was
        ]
        if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
            changed.append(tokenizer.path)
        if _checksum(heldout) != manifest["heldout_checksum"]:
            changed.append(self.directory / "heldout.jsonl")
        if changed:
            raise UserError(
                f"{changed[0]} has changed since the data were prepared: restore it, or delete "
                f"{self.directory} to prepare them again"
            )
        supervised = self.kind == "supervised"
        train = datasets if supervised else map(IndexedDocuments, datasets)
        weights = [source.weight for source in self.sources]
        held = self.directory / "heldout.jsonl"
        rows = [parse_json(line, held) for line in heldout.decode().split("\n") if line]
        fit({"rows": rows}, _Pairs if supervised else _Texts, held)
        return Prepared(
            tokenizer=tokenizer,
            train=list(zip(train, weights, strict=True)),
            supervised=supervised,
            heldout=[_as_text(row) for row in rows],
            heldout_pairs=[tuple(row) for row in rows if supervised],
            manifest=manifest,
            fingerprint=manifest["fingerprint"],
        )


class _Manifest(Schema):
    """What is read of manifest.json."""

    key: str
    fingerprint: str
    checksums: list[dict[str, Any]]
    tokenizer_fingerprint: str
    heldout_checksum: str
    source: Any
    train_documents: int
    train_tokens: int
    heldout_documents: int
    dropped_paragraphs: int
    excluded_documents: int
    excluded_paragraphs: int
    notes: list[str]


class _Text(Schema):
    text: str


class _Texts(Schema):
    rows: list[_Text]


class _Pairs(Schema):
    rows: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


def _sample(documents: Documents) -> Iterator[str]:
    """Train text for the tokenizer: all of it, or of a larger corpus a sample by hash."""
    share = TOKENIZER_BYTES / documents.counts["train_bytes"]
    return (item.text for item in documents.train() if place(item.key[8:]) < share)


def kind_of(data: Data) -> str:
    """What the sources hold, as it is prepared: "text", "supervised" or "indexed". Records that are
    both text and pairs are what the objective takes. ValueError where they are not of one kind."""
    paths, wants_pairs = _paths(data), data.objective == "supervised"
    if not paths:
        raise UserError("data.source is an empty list: give at least one source")
    found = {path: corpus.kind(path, data.text_field, wants_pairs) for path in paths}
    if data.kind != "auto":
        found = {path: kind if kind == "indexed" else data.kind for path, kind in found.items()}
    kinds = sorted(set(found.values()))
    if len(kinds) > 1:
        raise UserError(f"data.source mixes {' and '.join(kinds)} sources: blend one kind only")
    if kinds == ["indexed"] and data.tokenizer is None:
        raise UserError(
            f"data source {paths[0]} is tokenized already: set data.tokenizer to the file that it "
            "was tokenized with"
        )
    return kinds[0]


def _sources(data: Data) -> list[Source]:
    return [Source(path=data.source)] if isinstance(data.source, str) else list(data.source)


def _paths(data: Data) -> list[str]:
    return [source.path for source in _sources(data)]


def _speaks() -> bool:
    """Whether notes are this process's to say: of a job's processes the first one's, and of a
    study's the one that started the others."""
    return launch.find()[1].rank == 0 and multiprocessing.parent_process() is None


def _as_text(row: Any) -> str:
    return row["text"] if isinstance(row, dict) else "\n".join(row)


def _write_lines(file: Path, rows: list[Any]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
