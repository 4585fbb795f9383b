"""Files that others wrote, read within bounds: regular files alone, up to a size, and JSON of the form
that is asked for. What does not fit is one sentence (UserError)."""

import errno
import fcntl
import json
import logging
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megaarch.errors import UserError

log = logging.getLogger(__name__)
MIB = 1 << 20
LARGEST_TEXT = 64 * MIB  # of configurations, records and results
LARGEST = 1024 * MIB  # of tokenizers, held-out documents and the index of a checkpoint

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that keep none
Form = TypeVar("Form", bound=BaseModel)


class Schema(BaseModel):
    """What a JSON file has to hold, types as JSON has them. Further keys may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def read_bytes(path: str | os.PathLike, limit: int = LARGEST) -> bytes:
    """The content of a regular file. UserError where it is none (a pipe or a device may have no
    end) or larger than `limit` bytes; OSError where it cannot be read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(
                f"{os.fspath(path)} has {size:,} bytes, and of such a file {limit:,} are read at most"
            )
        return file.read(size)


def check_regular(path: str | os.PathLike) -> None:
    """UserError where a library that is given this path would read a pipe or a device; OSError
    where there is no such file."""
    try:
        mode = Path(path).stat().st_mode
    except ValueError:  # a name with a NUL
        raise UserError(f"{os.fspath(path)!r} is no name of a file") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{os.fspath(path)} is a pipe or a device: give a regular file")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file to read its bytes. UserError, OSError: as check_regular."""
    check_regular(path)
    return Path(path).open("rb")


def read_text(path: str | os.PathLike, limit: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a regular file. UserError, OSError: as read_bytes."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)} is not UTF-8 text: {error.reason}") from None


def parse_json(text: str | bytes, where: str | os.PathLike) -> Any:
    """What a JSON text says. UserError names `where` it is from."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{os.fspath(where)} is nested too deeply for JSON") from None
    except ValueError as error:
        raise UserError(f"{os.fspath(where)} is not JSON: {error}") from None


def read_json(path: str | os.PathLike, limit: int = LARGEST_TEXT) -> Any:
    """What a JSON file says. UserError, OSError: as read_text."""
    return parse_json(read_text(path, limit), path)


def fit(found: Any, form: type[Form], where: str | os.PathLike) -> Form:
    """`found` as `form` wants it. UserError names the first entry that does not fit."""
    try:
        return form.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{os.fspath(where)} is damaged: {first_fault(error)}") from None
    except RecursionError:
        raise UserError(f"{os.fspath(where)} is damaged: it is nested too deeply") from None


def first_fault(error: ValidationError) -> str:
    """Returns "entry: what is wrong with it" of the first entry that does not fit."""
    fault = error.errors(include_input=False)[0]
    entry = ".".join(map(str, fault["loc"])) or "the file"
    return f"{entry}: {fault['msg'].removeprefix('Value error, ')}"


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Returns the bytes of a file and the CRC-32 of its content."""
    value = 0
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return path.stat().st_size, value


def take_lock(file: IO[Any]) -> bool:
    """Locks an open file for this process alone; whether it is ours. A file system that keeps no locks gives
    it to everyone, with a warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system keeps no locks; start nothing twice", file.name)
    return True


def inside(folder: Path, name: str) -> Path:
    """The file that an entry of `folder` names. UserError where it is not in the folder, by its
    name or by a link."""
    if "\0" in name:
        raise UserError(f"{name!r} in {folder} is no name of a file")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or Path(name).is_absolute():
        raise UserError(f"{name} in {folder} leads out of the folder")
    return path


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """UserError names `path` where the block, which writes it, finds the disk full: the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"{os.fspath(path)} could not be written: {error.strerror}: free space there, or give another "
            "output"
        ) from error


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Has an error of the system in the block name `path` where it names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path`, to be written. At the end of the block that file is on the disk and
    takes the place of `path`; an error leaves `path` as it was."""
    aside = Path(f"{os.fspath(path)}.{os.getpid()}.aside")
    aside.unlink(missing_ok=True)  # a link there would lead the writer elsewhere
    try:
        with naming(path):
            yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        if error.filename == os.fspath(aside):  # a reader knows the file by its own name
            error.filename = os.fspath(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
