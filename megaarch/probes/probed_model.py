"""What a probe looks at: a trained model in fp64, and rows of held-out text in its own form."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.data import conditional_forms
from megaarch.data.batch import Batch
from megaarch.data.example import Converted, RowShape, Vocabulary
from megaarch.data.feature_converters import converter_of
from megaarch.data.packing import pack
from megaarch.data.row_lengths import spans_of
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.model.transformer import Transformer
from megaarch.study.evaluate_run import text_of
from megaarch.study.results import CellRecord
from megaarch.training.open_run import open_run

IN_EVERY_PROBE = {"compile": False, "float8": None, "float8_emulate": False, "precision": "fp32"}


@dataclass(frozen=True)
class Rows:
    """Windows of held-out documents: tokens int64 [N, S], all text; documents int [N], whose each is."""

    tokens: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, some: slice) -> "Rows":
        return Rows(self.tokens[some], self.documents[some])


@dataclass(frozen=True)
class Subject:
    """A trained model and what it reads. name: what runs that differ in their seed alone share. digest: of a
    study's cell (`CellRecord.digest`).

    model: in evaluation mode, in fp64 where `open_subject` made it. documents: held-out text.
    """

    name: str
    model: Transformer
    settings: Settings
    tokenizer: Tokenizer
    documents: list[str]
    digest: str | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    def rows(self, length: int, count: int) -> Rows:
        """Returns as many windows of `length` text tokens as there are, `count` at most: the first of each
        document, then the second, ... UserError where no document is so long."""
        by_document = []
        for document in self.documents:
            tokens = self.tokenizer.encode(document).astype(np.int64)
            whole = tokens[: len(tokens) // length * length].reshape(-1, length)
            by_document.append([row for row in whole if self.vocabulary.text[row].all()])
        most = max(map(len, by_document), default=0)
        found = [(w[r], d) for r in range(most) for d, w in enumerate(by_document) if r < len(w)]
        if not found:
            raise UserError(
                f"no held-out document has {length} tokens for a row: give --length, or other text with "
                "--set data.source=FILE"
            )
        tokens, of = zip(*found[:count], strict=True)
        return Rows(np.stack(tokens), np.array(of))

    def batch(self, rows: Rows, prefix: int) -> Batch:
        """Returns rows whose first `prefix` tokens condition the rest, in the model's own form."""
        return batch_of(self.settings, self.vocabulary, rows.tokens, prefix)


def open_subject(run: Path, overrides: Sequence[str] = ()) -> Subject:
    """Opens a run in one process. overrides: `--set` settings, e.g. data.source for other text.

    UserError where it is no run, or has no held-out text.
    """
    if launch.find()[1].world_size > 1:
        raise UserError(
            "probes look inside a model that one process holds: start one process, which reads a "
            "checkpoint of any layout"
        )
    found = open_run(run, overrides, IN_EVERY_PROBE)
    prepared = text_of(found)
    if not prepared.heldout:
        raise UserError(f"{run}: data.source: this data has no held-out text to probe with")
    model = found.engine.model.double().eval()
    model.compute_dtype = None
    model.requires_grad_(False)
    record, settings = CellRecord.read(found.run), found.settings
    name, digest = _name(found.run, record), record.digest if record else None
    return Subject(name, model, settings, prepared.tokenizer, prepared.heldout, digest)


def _name(run: Path, record: CellRecord | None) -> str:
    """The run's folder, or of a study's cell its key without the seed."""
    folder = run.resolve()
    if record is None:
        return folder.name
    return f"{folder.parent.name}/{folder.name.rpartition('-seed')[0]}"


def batch_of(
    settings: Settings, vocabulary: Vocabulary, texts: Iterable[np.ndarray], prefix: int
) -> Batch:
    """Returns a row for each text, in the form in which its tokens behind the first `prefix` are scored.

    prefix: as Python slices it. Where that form takes an example for each token, it is the last one's, which holds the
    whole row.
    """
    objective, architecture = settings.data.objective, settings.model.architecture
    convert = converter_of(architecture)
    converted: list[Converted] = []
    for tokens in texts:
        given, scored = tokens[:prefix], tokens[prefix:]
        examples = conditional_forms.continuation(
            objective, architecture, given, scored, vocabulary, spans_of(settings.data)
        )
        converted.append(convert(examples[-1], vocabulary))
    model, most = settings.model, max(max(each.positions) for each in converted)
    if model.position_encoding == "learned" and most > model.position_rows:
        raise UserError(
            f"a row takes {most} positions in the form of {objective}, and the model knows "
            f"{model.position_rows}: lower --length"
        )
    return packed(converted, vocabulary, catalogue.position_axes(objective))


def packed(converted: Sequence[Converted], vocabulary: Vocabulary, axes: int) -> Batch:
    """Returns a row for each example. axes: of positions."""
    shape = RowShape.largest([each.shape for each in converted])
    rows = [[one] for one in converted]
    return pack(rows, shape, pad=vocabulary.pad, axes=axes, sample_index=range(len(rows)))
