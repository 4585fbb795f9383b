"""What a probe looks at: a trained model in fp64, and rows of held-out text in its own form."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.data.example import Converted, RowShape, Vocabulary
from megaarch.data.feature_converters import converted_continuation
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


class Rows(NamedTuple):
    """Windows of held-out documents: tokens int64 [N, S], all text; documents int [N], whose each is."""

    tokens: np.ndarray
    documents: np.ndarray


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

    def continuation(self, given: np.ndarray, scored: np.ndarray) -> list[Converted]:
        """Returns the examples that score tokens behind those that are given, in the model's own form."""
        data, architecture = self.settings.data, self.settings.model.architecture
        return converted_continuation(
            data.objective, architecture, given, scored, self.vocabulary, spans_of(data)
        )

    def batch(self, texts: Iterable[np.ndarray], prefix: int) -> Batch:
        """Returns a row for each text, in the form in which its tokens behind the first `prefix` are scored.

        prefix: as Python slices it. Where that form takes an example for each token, it is the last one's, which
        holds the whole row. UserError where a row takes more positions than the model knows.
        """
        rows = [self.continuation(tokens[:prefix], tokens[prefix:])[-1] for tokens in texts]
        model, most = self.settings.model, max(max(each.positions) for each in rows)
        if model.position_encoding == "learned" and most > model.position_rows:
            raise UserError(
                f"a row takes {most} positions in the form of {self.settings.data.objective}, and the model knows "
                f"{model.position_rows}: lower --length"
            )
        return self.packed(rows)

    def packed(self, examples: Sequence[Converted]) -> Batch:
        """Returns a row for each example."""
        return pack(
            [[example] for example in examples],
            RowShape.largest([example.shape for example in examples]),
            pad=self.vocabulary.pad,
            axes=self.model.position_axes,
            sample_index=range(len(examples)),
        )


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
    record, folder = CellRecord.read(found.run), found.run.resolve()
    name, digest = folder.name, None
    if record is not None:  # a study's cell is known by its key without the seed
        name = f"{folder.parent.name}/{folder.name.rpartition('-seed')[0]}"
        digest = record.digest
    return Subject(name, model, found.settings, prepared.tokenizer, prepared.heldout, digest)
