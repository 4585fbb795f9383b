"""What tests of sources share: files of one document each, and a folder as people have them."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import zstandard

PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


def write(path, text=None):
    """A file that holds one document: its own name, unless another text is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.name if text is None else text
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if {".parquet", ".pq"} & set(suffixes):
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        return path
    plain = bool({".txt", ".text", ".md", ".markdown"} & set(suffixes))
    content = (text if plain else json.dumps({"text": text})).encode()
    path.write_bytes(PACKED.get(path.suffix.lower(), bytes)(content))
    return path


def messy(root):
    """A folder as people have them. Returns the names of what is to be read."""
    for name in (
        ".git/info.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "sub/.ipynb_checkpoints/b-checkpoint.jsonl",
        ".hidden.jsonl",
        "._a.txt",
        "a.txt~",
        "#a.txt#",
        "~$a.txt",
        "a.txt.swp",
        "a.jsonl.bak",
        "a.bak.jsonl",
        "b.orig.txt.gz",
        "b.txt.orig",
        "a.tmp.jsonl",
        "table.csv",
        "a.parquet.gz",
        "LICENSE",
        "old.heldout.jsonl",
        "old.manifest.json",
    ):
        write(root / name, "must not be read")
    write(root / "old.parts" / "00000000.json", "must not be read")
    write(root / "old.parts" / "plan.json", "must not be read")
    for name in ("heldout.jsonl", "manifest.json", "tokenizer"):
        write(root / "cached" / name, "must not be read")
    write(root / "lost+found" / "a.txt", "must not be read")
    write(root / "__MACOSX" / "a.txt", "must not be read")
    kept = ["a.txt", "a.original.txt", "sub/b.jsonl", "v1.0/text.jsonl", "x.parts/c.txt"]
    for name in kept:
        write(root / name, name)
    for name in ("b.txt", "c.jsonl.gz"):
        (root / name).touch()
    (root / ".#a.txt").symlink_to("user@host.1234")
    (root / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(root / "pipe.txt")
    return kept
