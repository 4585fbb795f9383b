"""The manifests of data: of what `prepare` keeps in data.cache, and of a dataset that `preprocess`
made."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megaarch.errors import UserError
from megaarch.files import LARGEST, Schema, fit, read_json
from megaarch.ingest.sources import MANIFEST

Count = Annotated[int, Field(ge=0)]


class Counts(Schema):
    """Counts of documents, bytes and tokens. train_bytes: None for tokens whose text is not known.
    notes: warnings about the split."""

    documents: Count
    duplicates: Count
    train_documents: Count
    train_bytes: Count | None
    train_tokens: Count
    heldout_documents: Count
    heldout_bytes: Count
    dropped_paragraphs: Count
    notes: list[str] = Field(default_factory=list)  # not in older ones


class PreparedManifest(Counts):
    """manifest.json of prepared data. fingerprint: of the content. checksums: of each dataset."""

    key: str
    fingerprint: str
    kind: str
    source: str
    sources: list[Any]
    tokenizer: str
    tokenizer_fingerprint: str
    checksums: list[dict[str, str | int]]
    bytes_per_token: float | None
    heldout_share: float
    heldout_checksum: str
    excluded_documents: Count = 0
    excluded_paragraphs: Count = 0


class Plan(Schema):
    """The arguments that decide the files of `preprocess`. tokenizer: its text_fingerprint."""

    format: int = 0
    sources: list[Any] = Field(default_factory=list)
    tokenizer: str
    text_field: str = "text"
    held_out: float = 0.1
    append_eos: bool = True
    shard_bytes: int = 0


class DatasetManifest(Counts):
    """PREFIX.manifest.json. malformed: records that were skipped. digest: of all tokens."""

    request: Plan
    tokenizer: str = ""
    tokenizer_file: str
    checksum: dict[str, str | int]
    digest: str | None = None  # not in older ones
    # pyright takes fields for mutable; manifests are only read
    train_bytes: Annotated[int, Field(gt=0)]  # pyright: ignore[reportIncompatibleVariableOverride]
    malformed: Count
    malformed_records: list[str]

    @classmethod
    def read(cls, prefix: str) -> "DatasetManifest | None":
        """Returns the manifest, or None where there is none. UserError where it is damaged."""
        file = Path(prefix + MANIFEST)
        try:
            return fit(read_json(file, LARGEST), cls, file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{error}; preprocess the text again") from error
