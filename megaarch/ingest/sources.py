"""The files of a data source: a file, a folder or a glob, and what is left out of it.

A folder is searched through links too, each folder once. Hidden files, copies by editors and file
managers and what megaarch writes are skipped there, and `notes` says so. corpus.py reads what a file holds.
"""

import glob
import os
import platform
import re
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from megaarch.errors import UserError
from megaarch.ingest.indexed_dataset import prefix_of
from megaarch.ingest.tasks.task import ENDING, Task

EMBEDDED = "embedded"
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstandard", ".zstd": "zstandard"}
MANIFEST, HELD_OUT, PARTS = ".manifest.json", ".heldout.jsonl", ".parts"  # of preprocess.py
SYSTEM = ("lost+found", "__MACOSX")  # folders
COPIES = ("*~", "~$*", "#*#", "*.bak", "*.orig", "*.swp", "*.swo", "*.tmp")  # of editors
# What file managers write into the name of a copy, beside its original.
DUPLICATES = re.compile(r"^copy of |( -)? copy( \d+)?(?=\.)| \((another )?(copy|\d+)\)(?=\.)", re.I)
NAMED = 3  # skipped files that a note names of each sort

HIDDEN, EMPTY, COPY, MADE, UNKNOWN, IRREGULAR = (
    "hidden",
    "empty",
    "copies by an editor or file manager",
    "written by megaarch",
    "of no known format",
    "broken links, pipes or devices",
)


class Found(NamedTuple):
    """files: sorted. skipped: (what it is, its path) of each file and folder that is left out."""

    files: list[Path]
    skipped: list[tuple[str, Path]]


def files(path: str) -> list[Path]:
    """Returns the files of a source, sorted. UserError as `find`."""
    return find(path).files


def find(path: str) -> Found:
    """Finds the files of a source. UserError if there are none, one that is named is of no known
    format, or a folder cannot be read."""
    if path == EMBEDDED:
        return Found([Path(EMBEDDED)], [])
    if not path:  # for Path, the folder that one is in
        raise UserError("data source '' is no name of a file")
    try:
        mode = Path(path).stat().st_mode
    except ValueError:  # a name with a NUL
        raise UserError(f"data source {path!r} is no name of a file") from None
    except PermissionError as error:
        raise UserError(f"data source {path} cannot be read: {error.strerror}") from error
    except OSError:
        return _matches(path)
    if stat.S_ISDIR(mode):
        found = _below(Path(path))
        if not found.files:
            raise UserError(
                f"data source {path} is a directory without a text file: {_known()}"
                + (f"; skipped were {_listed(found.skipped)}" if found.skipped else "")
            )
        return found
    if not stat.S_ISREG(mode):
        raise UserError(f"data source {path} is a pipe or a device: give a regular file")
    _check_format(Path(path))
    return Found([Path(path)], [])


def notes(paths: list[str]) -> list[str]:
    """Returns a sentence on each source with skipped files."""
    found = []
    for path in paths:
        if indexed_prefix(path) is None and (skipped := find(path).skipped):
            found.append(f"data source {path}: skipped {_listed(skipped)}")
    return [printable(note) for note in found]


def printable(text: str) -> str:
    """Returns the text in one line, with characters that cannot be printed spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_of(file: Path) -> str | None:
    """Returns json, parquet, text or task, by the file's name; None for any other."""
    if file.name.endswith(ENDING):
        return "task"
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and FORMATS.get(suffixes[-1]) == "parquet":
            return None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def compression_of(file: Path) -> str | None:
    """Returns gzip, bz2, xz or zstandard, by the file's name; None where it is plain."""
    return COMPRESSED.get(file.suffix.lower())


def indexed_prefix(path: str) -> str | None:
    """Returns the prefix of a `.bin`/`.idx` pair, if `path` is that or one of the two files."""
    prefix = prefix_of(path)
    there = [Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")]
    if all(there) or (prefix != path and any(there)):
        return prefix
    return None


def identity(path: str) -> list[list[Any]]:
    """Returns (name, size, time) of each file, which change when a source does."""
    if path == EMBEDDED:
        return [[EMBEDDED, platform.python_version()]]
    prefix = indexed_prefix(path)
    found = files(path) if prefix is None else [Path(prefix + ".idx"), Path(prefix + ".bin")]
    if prefix is not None:
        more = [Path(prefix + suffix) for suffix in (MANIFEST, HELD_OUT)]
        found += [file for file in more if file.is_file()]
    for file in found:
        if not file.exists():
            raise UserError(f"indexed dataset {prefix}: {file} is missing")
    tasks = [Task(file) for file in found if format_of(file) == "task"]
    found += [file for task in tasks for file in task.inputs[1:]]
    known = [(file, file.stat()) for file in found]
    version = [[EMBEDDED, platform.python_version()]] if tasks else []
    return version + [
        [str(file.resolve()), status.st_size, status.st_mtime_ns] for file, status in known
    ]


def check_unchanged(paths: Iterable[str], before: list[list[list[Any]]]) -> None:
    """UserError names a source that no longer has the identity that it had `before` it was read."""
    for path, old in zip(paths, before, strict=True):
        if identity(path) != old:
            raise UserError(
                f"data source {path} has changed while it was read: start anew once nothing writes to it"
            )


def _below(root: Path) -> Found:
    """Finds the files of known formats below a folder."""
    found, skipped = [], []
    for folder, names in _folders(root, skipped):
        for path in (folder / name for name in names):
            if reason := _reason(path) or _fault(path):
                skipped.append((reason, path))
            else:
                found.append(path)
    return Found(sorted(found), sorted(skipped))


def _folders(root: Path, skipped: list[tuple[str, Path]]) -> Iterator[tuple[Path, list[str]]]:
    """Yields `root` and all folders below it, through links too, each once, with the names in it that
    are no folders.

    skipped: takes the hidden ones and those that megaarch wrote, which are not entered.
    """
    seen = set()
    try:
        for name, below, others in os.walk(root, onerror=_unreadable, followlinks=True):
            folder = Path(name)
            place = os.path.realpath(name)  # not its inode: some file systems have none
            if place in seen:
                below.clear()
                continue
            seen.add(place)
            yield folder, others
            hidden = [name for name in below if name.startswith(".") or name in SYSTEM]
            made = [name for name in below if name not in hidden and _is_made(folder / name)]
            skipped += [(HIDDEN, folder / name) for name in hidden]
            skipped += [(MADE, folder / name) for name in made]
            below[:] = sorted(set(below) - {*hidden, *made})
    except RecursionError:  # of Python before 3.12
        raise UserError(f"{root} has folders that are nested too deeply") from None


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_made(folder: Path) -> bool:
    """Whether it holds parts of a job of preprocess.py, or is an entry of data.cache."""
    parts = folder.name.endswith(PARTS) and (folder / "plan.json").is_file()
    names = ("manifest.json", "heldout.jsonl", "tokenizer")
    return parts or all((folder / name).is_file() for name in names)


def _reason(path: Path) -> str | None:
    """Returns why a file's name rules it out as text of the corpus, or None."""
    name = path.name
    if name.startswith("."):
        return HIDDEN
    # the mark may stand before the format: a.bak.jsonl, a.orig.txt.gz
    suffixes = [
        s for s in path.suffixes if s.lower() not in FORMATS and s.lower() not in COMPRESSED
    ]
    marked = [name, "".join(suffixes[-1:]).lower()]
    if any(fnmatchcase(text, pattern) for text in marked for pattern in COPIES):
        return COPY
    original = path.with_name(DUPLICATES.sub("", name) or name)
    if original != path and (size := _size(original)) is not None and size == _size(path):
        return COPY
    if name.endswith((MANIFEST, HELD_OUT)):
        return MADE
    return UNKNOWN if format_of(path) is None else None


def _size(path: Path) -> int | None:
    """Returns the bytes of a file, None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _fault(path: Path) -> str | None:
    """Returns why a file cannot be text of the corpus, whatever its name, or None."""
    try:
        status = path.stat()
    except OSError:
        return IRREGULAR
    if not stat.S_ISREG(status.st_mode):
        return IRREGULAR
    return None if status.st_size else EMPTY


def _matches(pattern: str) -> Found:
    """Finds what a glob matches: files, and folders with all that is below them."""
    found, skipped = set(), []
    for name in sorted(set(_expanded(pattern))):
        path = Path(name)
        if path.is_dir():
            below = _below(path)
            found.update(below.files)
            skipped += below.skipped
        elif (reason := _reason(path)) in (COPY, MADE):
            skipped.append((reason, path))
        elif fault := _fault(path):
            skipped.append((fault, path))
        else:
            _check_format(path)
            found.add(path)
    if not found:
        raise UserError(
            f"data source {pattern} does not exist: give a file, a directory, a glob or "
            f"'{EMBEDDED}'" + (f"; skipped were {_listed(skipped)}" if skipped else "")
        )
    return Found(sorted(found), sorted(set(skipped)))


def _expanded(pattern: str) -> Iterator[str]:
    """Works as glob.glob, whose `**` would follow a loop of links for as long as a path may be."""
    head, recursive, rest = pattern.partition("**/")
    if not recursive and pattern.endswith("/**"):
        head, recursive = pattern[:-2], "**"
    if not recursive or not (head == "" or head.endswith("/")):
        yield from glob.glob(pattern)  # noqa: PTH207
        return
    for root in glob.glob(head or "."):  # noqa: PTH207
        for folder, _ in _folders(Path(root), []):
            prefix = glob.escape(str(folder))
            yield from _expanded(f"{prefix}/{rest}") if rest else [str(folder)]


def _check_format(file: Path) -> None:
    if format_of(file) is None:
        raise UserError(f"data source {file} is of no known format: {_known()}")


def _known() -> str:
    return f"known are {', '.join((*FORMATS, ENDING))} (also with {' or '.join(COMPRESSED)})"


def _listed(skipped: list[tuple[str, Path]]) -> str:
    """Counts the files of each reason, and names the first ones."""
    sorts = []
    for sort in (HIDDEN, EMPTY, COPY, MADE, UNKNOWN, IRREGULAR):
        names = [path.name for reason, path in skipped if reason == sort]
        if names:
            more = ["..."] if len(names) > NAMED else []
            sorts.append(f"{len(names)} {sort} ({', '.join(names[:NAMED] + more)})")
    return ", ".join(sorts)
