"""From a source to what training reads: split, tokenizer, indexed dataset, held-out documents.

The result lies under `data.cache`, in a directory named by everything that it depends on, and is
reused while none of that changes. It is made in a directory aside, which is then renamed: complete
or absent, also when several processes prepare the same data at once.
"""

import hashlib
import json
import logging
import multiprocessing
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megaarch.config.schema import Data
from megaarch.data.dataset import check_kind
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.files import LARGEST, check_regular, fit, read_json, write_json
from megaarch.ingest import corpus, shards, sources
from megaarch.ingest.indexed_dataset import IndexedDataset, IndexedDocuments
from megaarch.ingest.manifest import Counts, PreparedManifest
from megaarch.ingest.pipeline import Pipeline
from megaarch.ingest.prepared_data import HELD_OUT, Prepared, changed, checksum, damaged
from megaarch.ingest.shards import SHARD_BYTES, Job
from megaarch.ingest.split import Exclusion
from megaarch.ingest.tokenized import TokenizedSource
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece

log = logging.getLogger(__name__)

FORMAT = 4  # raise it when the same settings would give other files
TOKENIZER_BYTES = 1 << 25  # a larger corpus trains its tokenizer on a sample of this size
LEAST_BYTES = 1000  # of a corpus

Progress = Callable[[str], None]


def prepare(
    data: Data,
    vocabulary_size: int,
    progress: Progress | None = None,
    exclude: Exclusion | None = None,
) -> Prepared:
    """Prepares the data, or finds it prepared.

    vocabulary_size: ids of pieces, specials and sentinels together; Prepared.tokenizer's
        vocabulary has exactly that many.
    progress: is called with a few words on each stage.
    exclude: text that must not be trained on; what is dropped for it is counted.
    UserError: the source or the tokenizer file is missing, malformed or too small, or prepared
        data have changed since; nothing half done is left behind.
    """
    preparation = _Preparation(data, vocabulary_size, progress or (lambda words: None), exclude)
    if not preparation.directory.exists():
        preparation.make()
    prepared = preparation.load()
    if _is_first_process():
        for note in (
            sources.notes([source.path for source in data.sources]) + prepared.manifest.notes
        ):
            log.warning(note)
    return prepared


class _Preparation:
    def __init__(
        self, data: Data, vocabulary_size: int, progress: Progress, exclude: Exclusion | None
    ):
        self.data, self.vocabulary_size, self.progress = data, vocabulary_size, progress
        self.exclude = exclude
        self.sources = data.sources
        self.kind = kind_of(data)
        if self.kind == "indexed" and exclude is not None:
            raise UserError(
                f"data source {self.sources[0].path} is tokenized already, so that held-out text "
                "cannot be left out of it: give the text itself"
            )
        given = data.tokenizer and Tokenizer(data.tokenizer, data.sentinels, vocabulary_size)
        self.identities = [sources.identity(source.path) for source in self.sources]
        key = {
            "format": FORMAT,
            "sources": [[i, s.weight] for i, s in zip(self.identities, self.sources, strict=True)],
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

    def make(self) -> None:
        """Prepares everything in a directory aside and renames it to `self.directory`."""
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            aside = self.directory.parent / f".preparing-{uuid.uuid4().hex}"
            aside.mkdir()
        except OSError as error:
            raise UserError(f"data.cache {self.data.cache} cannot be written: {error}") from error
        try:
            made = self._check_tokens(aside) if self.kind == "indexed" else self._tokenize(aside)
            sources.check_unchanged((s.path for s in self.sources), self.identities)
            write_json(aside / "manifest.json", made.model_dump())
            try:
                aside.rename(self.directory)
            except OSError:
                if not self.directory.exists():  # where it does, another process was faster
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _tokenize(self, aside: Path) -> PreparedManifest:
        """Makes the datasets of text sources."""
        data, tokenizer = self.data, self._given_tokenizer(aside)
        fields = corpus.PAIR if self.kind == "supervised" else (data.text_field,)
        job = Job(aside / "parts", tokenizer, fields, data.held_out, exclude=self.exclude)
        job.folder.mkdir()
        self.progress("tokenizing" if tokenizer else "reading the text")
        cut = [list(shards.cut(source.path, SHARD_BYTES)) for source in self.sources]
        pipeline = Pipeline(job, [shard for of_source in cut for shard in of_source])
        pipeline.make()
        self.progress("splitting the corpus")
        self._split(pipeline)
        if tokenizer is None:
            self.progress("training the tokenizer")
            sample = pipeline.sample(TOKENIZER_BYTES / pipeline.split.train_side_bytes)
            file = aside / "tokenizer"
            tokenizer = train_sentencepiece(sample, self.vocabulary_size, data.sentinels, file)
            self.progress("tokenizing")
            pipeline.job = replace(job, tokenizer=tokenizer)
            pipeline.make()
        numbers = iter(range(len(pipeline.shards)))
        for k, of_source in enumerate(cut):
            pipeline.write_train(aside / f"train-{k}", [next(numbers) for _ in of_source])
        pipeline.write_held_out(aside / HELD_OUT)
        keys = hashlib.blake2b(digest_size=16)
        for of_shard in pipeline.train_keys():
            keys.update(of_shard)
        shutil.rmtree(job.folder)
        datasets, split = self._datasets(aside), pipeline.split
        counts = pipeline.counts(sum(dataset.tokens for dataset in datasets))
        share = counts.heldout_bytes / (counts.heldout_bytes + split.train_side_bytes)
        made = self._manifest(aside, tokenizer, datasets, keys, counts, share)
        made.excluded_documents = split.excluded_documents
        made.excluded_paragraphs = split.excluded_paragraphs
        return made

    def _split(self, pipeline: Pipeline) -> None:
        split = pipeline.open_split()
        if not split.total:
            raise UserError(f"data source {self.sources[0].path} holds no text")
        if split.total < LEAST_BYTES:
            raise UserError(
                f"the corpus holds only {split.total} bytes of text: at least {LEAST_BYTES} are "
                "needed"
            )
        split.choose(self.data.held_out)

    def _check_tokens(self, aside: Path) -> PreparedManifest:
        """Checks tokenized sources and gathers their held-out documents."""
        tokenizer = self._given_tokenizer(aside)
        assert tokenizer is not None, "kind_of asks for one"
        self.progress("checking token ids")
        datasets, digests = self._datasets(self.directory), hashlib.blake2b(digest_size=16)
        found = [TokenizedSource(dataset) for dataset in datasets]
        for source in found:
            digests.update(source.check(tokenizer).encode())
        texts = dict.fromkeys(text for source in found for text in source.heldout)
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (aside / HELD_OUT).write_bytes("".join(rows).encode())
        documents, eos = sum(len(source.documents) for source in found), tokenizer.vocabulary.eos
        counts = Counts(
            documents=documents,
            duplicates=0,
            train_documents=documents,
            train_bytes=None,
            train_tokens=sum(dataset.tokens for dataset in datasets),
            heldout_documents=len(texts),
            heldout_bytes=sum(len(text.encode()) for text in texts),
            dropped_paragraphs=0,
            notes=[n for source in found for n in source.notes(self.data.tokenizer, eos)],
        )
        shares = {source.manifest.request.held_out if source.manifest else None for source in found}
        if texts and len(shares) > 1:
            counts.notes.append(
                "these datasets hold out different shares of their documents: one that stands in several "
                "is trained on as well as scored, unless all are preprocessed with one --held-out"
            )
        share, known = 0.0, [source.manifest for source in found if source.manifest]
        if len(known) == len(found):
            for name in ("documents", "duplicates", "train_bytes", "dropped_paragraphs"):
                setattr(counts, name, sum(getattr(made, name) for made in known))
            share = counts.heldout_bytes / (counts.heldout_bytes + (counts.train_bytes or 0))
        return self._manifest(aside, tokenizer, datasets, digests, counts, share)

    def _given_tokenizer(self, aside: Path) -> Tokenizer | None:
        """Opens data.tokenizer, its file copied to `aside`; None where one is to be trained."""
        if self.data.tokenizer is None:
            return None
        file = shutil.copyfile(self.data.tokenizer, aside / "tokenizer")
        return Tokenizer(file, self.data.sentinels, self.vocabulary_size)

    def _datasets(self, directory: Path) -> list[IndexedDataset]:
        if self.kind == "indexed":
            return [IndexedDataset(source.path) for source in self.sources]
        return [IndexedDataset(directory / f"train-{k}") for k in range(len(self.sources))]

    def _manifest(
        self,
        aside: Path,
        tokenizer: Tokenizer,
        datasets: list[IndexedDataset],
        text: hashlib.blake2b,
        counts: Counts,
        share: float,
    ) -> PreparedManifest:
        """text: of train, to which held-out text is added. share: of the text, held out."""
        for source, dataset in zip(self.sources, datasets, strict=True):
            if not dataset.tokens:
                raise UserError(
                    f"data source {source.path} has no train text that other sources do not have"
                    + (" and that is not held out" if self.exclude else "")
                )
        heldout = (aside / HELD_OUT).read_bytes()
        text.update(heldout)
        checksums = [dataset.checksum() for dataset in datasets]
        weights = [source.weight for source in self.sources]
        content = json.dumps([checksums, weights, tokenizer.fingerprint, text.hexdigest()])
        origin = self.data.tokenizer or "trained on train"
        tokens, train_bytes = counts.train_tokens, counts.train_bytes
        return PreparedManifest(
            key=self.key,
            fingerprint=hashlib.blake2b(content.encode(), digest_size=10).hexdigest(),
            kind=self.kind,
            source=", ".join(source.path for source in self.sources),
            sources=self.identities,
            tokenizer=f"{tokenizer.description}, {origin}",
            tokenizer_fingerprint=tokenizer.fingerprint,
            checksums=checksums,
            heldout_share=share,
            heldout_checksum=checksum(heldout),
            bytes_per_token=train_bytes / tokens if train_bytes else None,
            **dict(counts),
        )

    def load(self) -> Prepared:
        """Opens what lies in `self.directory`. UserError where it is not what was written."""
        file = self.directory / "manifest.json"
        try:
            made = fit(read_json(file, LARGEST), PreparedManifest, file)
            check_regular(self.directory / HELD_OUT)
        except (OSError, ValueError) as error:
            raise damaged(self.directory, error) from error
        tokenizer = Tokenizer(
            self.directory / "tokenizer", self.data.sentinels, self.vocabulary_size
        )
        datasets = self._datasets(self.directory)
        now = zip(datasets, made.checksums, strict=True)
        others = [dataset.path for dataset, before in now if dataset.checksum() != before]
        if tokenizer.fingerprint != made.tokenizer_fingerprint:
            others.append(tokenizer.path)
        if others:
            raise changed(others[0], self.directory)
        supervised = self.kind == "supervised"
        weights = [source.weight for source in self.sources]
        train = datasets if supervised else [IndexedDocuments(dataset) for dataset in datasets]
        return Prepared(
            tokenizer=tokenizer,
            train=list(zip(train, weights, strict=True)),
            supervised=supervised,
            directory=self.directory,
            manifest=made,
        )


def kind_of(data: Data) -> str:
    """Returns what the sources hold: "text", "supervised" or "indexed". Records that are both text
    and pairs count as what the objective takes. UserError where they are not of one kind, and where
    the objective wants pairs and they are text."""
    paths = [source.path for source in data.sources]
    wants_pairs = data.objective == "supervised"
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
    if wants_pairs:  # before a later record is told that it lacks text
        check_kind(data, kinds[0] == "supervised")
    return kinds[0]


def _is_first_process() -> bool:
    """Whether this process shows notes: of a job's processes the first one, of a study's the one
    that started the others."""
    return launch.find()[1].rank == 0 and multiprocessing.parent_process() is None
