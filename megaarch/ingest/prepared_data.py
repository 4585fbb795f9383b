"""Data that `prepare` has made, as training and scoring read them."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megaarch.errors import UserError
from megaarch.files import Schema, fit, open_regular, parse_json, read_bytes
from megaarch.ingest.indexed_dataset import IndexedDataset, IndexedDocuments
from megaarch.ingest.manifest import PreparedManifest
from megaarch.ingest.tokenizer import Tokenizer

HELD_OUT = "heldout.jsonl"


class _Text(Schema):
    text: str


class _Rows(Schema):
    """The rows of heldout.jsonl."""

    rows: list[_Text] | list[Annotated[tuple[str, str], Field(strict=False)]]  # JSON has no tuples


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, or all that was read of it."""

    rows: Sequence[_Text | tuple[str, str]]

    @cached_property
    def documents(self) -> list[str]:
        """The held-out documents, less the paragraphs that also stand in train. For supervised sources, input
        and target joined by a newline. For tokenized sources, those of the file next to them."""
        return [row.text if isinstance(row, _Text) else "\n".join(row) for row in self.rows]

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """(input, target) of supervised sources, else empty."""
        return [row for row in self.rows if not isinstance(row, _Text)]


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on.

    train: (documents, weight) of each blended source. Every document ends with eos, if it is made
        of text here. For supervised sources (dataset, weight): the sequences alternate input,
        target, and each ends with eos.
    supervised: whether they do.
    directory: where they lie.
    """

    tokenizer: Tokenizer
    train: list[tuple[IndexedDocuments | IndexedDataset, float]]
    supervised: bool
    directory: Path
    manifest: PreparedManifest

    @property
    def fingerprint(self) -> str:
        """The hash of the content (train and held-out text, all tokens of tokenized sources, tokenizer, weights),
        which is the same wherever the same data are prepared."""
        return self.manifest.fingerprint

    @property
    def heldout(self) -> list[str]:
        """The held-out documents, as `HeldOut.documents`."""
        return self._held.documents

    @property
    def heldout_pairs(self) -> list[tuple[str, str]]:
        """The held-out pairs, as `HeldOut.pairs`."""
        return self._held.pairs

    @cached_property
    def _held(self) -> HeldOut:
        """What heldout.jsonl holds, read when something scores it: it may be far larger than what a process that
        trains needs. UserError where it is not what was written."""
        file = self.directory / HELD_OUT
        try:
            content = read_bytes(file, limit=1 << 50)
        except OSError as error:
            raise damaged(self.directory, error) from error
        if checksum(content) != self.manifest.heldout_checksum:
            raise changed(file, self.directory)
        return self._parsed(content.split(b"\n"))

    def some_heldout(self, count: int) -> HeldOut:
        """Returns up to `count` of the held-out documents or pairs, from places that divide their file evenly (its
        sources stand one after the other), read without the others and so without the checksum of all. UserError
        where they cannot be read."""
        lines: dict[int, bytes] = {}
        try:
            with open_regular(self.directory / HELD_OUT) as file:
                size = file.seek(0, os.SEEK_END)
                for i in range(count):
                    file.seek(size * i // count)
                    if i:
                        file.readline()
                    lines.setdefault(file.tell(), file.readline())
        except OSError as error:
            raise damaged(self.directory, error) from error
        return self._parsed(lines.values())

    def _parsed(self, lines: Iterable[bytes]) -> HeldOut:
        file = self.directory / HELD_OUT
        try:
            rows = [parse_json(line, file) for line in lines if line.strip()]
            return HeldOut(fit({"rows": rows}, _Rows, file).rows)
        except ValueError as error:
            raise damaged(self.directory, error) from error


def damaged(directory: Path, error: Exception) -> UserError:
    """Returns the error for files that cannot be read."""
    return UserError(
        f"prepared data in {directory} are damaged ({error}): delete that directory to prepare them again"
    )


def changed(file: str | Path, directory: Path) -> UserError:
    """Returns the error for a file that is not what was written or read."""
    return UserError(
        f"{file} has changed since the data were prepared: restore it, or delete {directory} to prepare "
        "them again"
    )


def checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
