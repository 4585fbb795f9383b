"""The manifest of a checkpoint: size and checksum of its files, written as they are sealed and held against
them where the checkpoint is taken up."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megaarch.checkpoint import storage
from megaarch.checkpoint.record import PROGRESS, CheckpointRecord, Count, read_record
from megaarch.distributed.mesh import ALONE, Grid
from megaarch.errors import StorageError, UserError
from megaarch.files import Schema, fit, inside, naming, read_json, size_and_checksum, write_json

MANIFEST = "manifest.json"
Entry = tuple[Count, Count]  # size, checksum
Manifest = dict[str, Entry]  # by a file's name in its checkpoint


class _Manifest(Schema):
    files: dict[str, Annotated[Entry, Field(strict=False)]]


def read(path: Path) -> Manifest:
    """Maps each file of a checkpoint to its size and checksum. UserError where the manifest is
    damaged or lists what is not in the checkpoint's folder."""
    found = fit({"files": read_json(path / MANIFEST)}, _Manifest, path / MANIFEST).files
    for name in found:
        inside(path, name)
    return found


def digest(path: Path) -> str:
    """A short text of the sizes and checksums of a checkpoint's files, which tells it from others."""
    text = json.dumps(read(path), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def seal(aside: Path, grid: Grid = ALONE) -> Manifest:
    """Bring the files of a written state that this process wrote to the disk, and read them back.
    No other process is needed for it. OSError where they do not read as written."""
    there = sorted(file for file in aside.rglob("*") if file.is_file())
    files = [file for file in there if _writer(file) == grid.global_rank]
    manifest = {str(file.relative_to(aside)): size_and_checksum(file) for file in files}
    for file in files:
        flush(file)
    if fault := first_fault(aside, manifest.items()):
        raise StorageError(f"checkpoint {aside} does not read back as written: {fault}")
    return manifest


def bind(aside: Path, manifest: Manifest, record: CheckpointRecord) -> None:
    """Adds the record and the manifest to a state whose files are sealed."""
    write_json(aside / PROGRESS, record.raw())
    manifest = dict(sorted((manifest | {PROGRESS: size_and_checksum(aside / PROGRESS)}).items()))
    write_json(aside / MANIFEST, manifest)
    for written in (aside / "state", aside):
        flush(written)
    # of files that other machines wrote too: a folder that they do not share has not all of them
    if fault := first_fault(aside, manifest.items(), read=False):
        raise StorageError(f"checkpoint {aside} does not read back as written: {fault}")


def find_fault(path: Path, grid: Grid = ALONE) -> str | None:
    """What is wrong with a checkpoint, or None. grid: all its processes call this; each reads a
    share of the files, and all get the same."""
    listed: list[tuple[str, tuple[int, int]]] | str = []
    with grid.on_main() as main:
        if main:
            listed = _listed(path)
    listed = grid.share(listed, grid.host_group)
    if isinstance(listed, str):
        return listed
    with grid.on_main():
        fault = first_fault(path, listed[grid.global_rank :: grid.world_size])
    return next(filter(None, grid.gather(fault, grid.host_group)), None)


def _listed(path: Path) -> list[tuple[str, tuple[int, int]]] | str:
    """The entries of a checkpoint's manifest, or what is wrong with it."""
    try:
        manifest = read(path)
        read_record(path)
    except (OSError, ValueError) as error:
        return str(error)
    if not {PROGRESS, f"state/{storage.INDEX}"} <= manifest.keys():
        if f"state/{storage.PICKLED}" in manifest:
            raise UserError(
                f"{path} is of megaarch 0.1, whose index is a pickle: bring it to this version with "
                f"python tools/upgrade_checkpoint.py {path}"
            )
        return f"{MANIFEST} does not list what a checkpoint holds"
    return list(manifest.items())


def first_fault(
    path: Path, entries: Iterable[tuple[str, tuple[int, int]]], read: bool = True
) -> str | None:
    """What is wrong with these files of a checkpoint. read: look at more than their sizes."""
    for name, (size, checksum) in entries:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if read and size_and_checksum(file)[1] != checksum:
            return f"{name} has a wrong checksum"
    return None


def _writer(file: Path) -> int:
    """The rank that wrote a file of a state: torch calls shards __RANK_NUMBER.distcp, and the main
    process writes the rest."""
    found = re.match(r"__(\d+)_\d+\.distcp$", file.name)
    return int(found[1]) if found else 0


def flush(path: Path) -> None:
    """Brings a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # who reads it next reads the disk
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
