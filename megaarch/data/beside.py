"""What lies beside an indexed dataset that `data/preprocess.py` made: its manifest, its held-out
documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaarch.data import corpus, shards
from megaarch.data.corpus import HELD_OUT, MANIFEST
from megaarch.data.tokenizer import Tokenizer
from megaarch.reading import read_json

__all__ = ["HELD_OUT", "MANIFEST", "check_digest", "check_tokenizer", "held_out", "read", "write"]


def read(prefix: str) -> dict[str, Any] | None:
    """The manifest, or None where there is none. ValueError where it is damaged."""
    file = Path(prefix + MANIFEST)
    try:
        manifest = read_json(file)
        manifest["request"]["tokenizer"], manifest["checksum"], manifest["tokenizer_file"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): preprocess the text again"
        ) from error
    return manifest


def check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """ValueError where the dataset is known to have been made with another tokenizer."""
    manifest = read(prefix)
    if manifest and manifest["request"]["tokenizer"] != tokenizer.text_fingerprint:
        raise ValueError(
            f"{prefix}.bin was made with the tokenizer {manifest['tokenizer_file']}, and "
            f"data.tokenizer is another one: set data.tokenizer to that file"
        )


def check_digest(prefix: str, digest: str) -> None:
    """ValueError where the dataset is known to have been made of other tokens. digest: of all of
    the .bin (IndexedDataset.digest)."""
    manifest = read(prefix)
    if manifest and manifest.get("digest", digest) != digest:
        raise ValueError(
            f"{prefix}.bin has changed since it was made: restore it, or delete it and preprocess "
            "the text again"
        )


def held_out(prefix: str) -> Iterator[str]:
    """The held-out documents; none where there is no such file."""
    file = Path(prefix + HELD_OUT)
    if file.is_file():
        yield from corpus.shard_documents(corpus.Shard(file))


def write(prefix: str, manifest: dict[str, Any]) -> None:
    """Puts the manifest in place, whole."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    shards.replace(Path(prefix + MANIFEST), lambda file: file.write(text.encode()))
