"""What lies beside an indexed dataset that `ingest/preprocess.py` made: its manifest, its held-out
documents."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megaarch.data.tokenizer import Tokenizer
from megaarch.errors import UserError
from megaarch.files import LARGEST, Schema, fit, read_json
from megaarch.ingest import corpus, shards
from megaarch.ingest.lines import Shard
from megaarch.ingest.sources import HELD_OUT, MANIFEST

NonNegative = Annotated[int, Field(ge=0)]


class _Request(Schema):
    tokenizer: str


class _Manifest(Schema):
    """What is read of a manifest; `digest` and `notes` are not in older ones."""

    request: _Request
    tokenizer_file: str
    checksum: dict[str, str | int]
    documents: NonNegative
    duplicates: NonNegative
    train_documents: NonNegative
    train_bytes: Annotated[int, Field(gt=0)]
    train_tokens: NonNegative
    heldout_documents: NonNegative
    heldout_bytes: NonNegative
    dropped_paragraphs: NonNegative
    malformed: NonNegative
    malformed_records: list[str]
    digest: str | None = None
    notes: list[str] = Field(default_factory=list)


def read(prefix: str) -> dict[str, Any] | None:
    """The manifest, or None where there is none. ValueError where it is damaged."""
    file = Path(prefix + MANIFEST)
    try:
        manifest = read_json(file, LARGEST)
        fit(manifest, _Manifest, file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; preprocess the text again") from error
    return {"notes": [], **manifest}


def check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """ValueError where the dataset is known to have been made with another tokenizer."""
    manifest = read(prefix)
    if manifest and manifest["request"]["tokenizer"] != tokenizer.text_fingerprint:
        raise UserError(
            f"{prefix}.bin was made with the tokenizer {manifest['tokenizer_file']}, and "
            f"data.tokenizer is another one: set data.tokenizer to that file"
        )


def check_digest(prefix: str, digest: str) -> None:
    """ValueError where the dataset is known to have been made of other tokens. digest: of all of
    the .bin (IndexedDataset.digest)."""
    manifest = read(prefix)
    if manifest and manifest.get("digest", digest) != digest:
        raise UserError(
            f"{prefix}.bin has changed since it was made: restore it, or delete it and preprocess "
            "the text again"
        )


def notes(prefix: str) -> list[str]:
    """What a person should know of the split."""
    manifest = read(prefix)
    return manifest["notes"] if manifest else []


def counts(prefixes: list[str], heldout: list[str]) -> dict[str, Any]:
    """Counts of the text that tokenized sources were made of, as far as their manifests know."""
    manifests = [read(prefix) for prefix in prefixes]
    size = sum(len(text.encode()) for text in heldout)
    counts: dict[str, Any] = {"heldout_documents": len(heldout), "heldout_bytes": size}
    if all(manifests):
        for name in ("documents", "duplicates", "train_bytes", "dropped_paragraphs"):
            counts[name] = sum(manifest[name] for manifest in manifests)
        counts["heldout_share"] = size / (size + counts["train_bytes"])
    return counts


def held_out(prefix: str) -> list[str]:
    """The held-out documents; none where there is no such file. ValueError where they are known to
    have been more or fewer."""
    file, manifest = Path(prefix + HELD_OUT), read(prefix)
    found = list(corpus.shard_documents(Shard(file))) if file.is_file() else []
    if manifest and len(found) != manifest["heldout_documents"]:
        raise UserError(
            f"{file} holds {len(found):,} documents, and {manifest['heldout_documents']:,} were held "
            "out when it was made: restore it, or preprocess the text again"
        )
    return found


def write(prefix: str, manifest: dict[str, Any]) -> None:
    """Puts the manifest in place, whole."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    content = text.encode(errors="backslashreplace")  # half a surrogate pair as JSON escapes it
    shards.replace(Path(prefix + MANIFEST), lambda file: file.write(content))
