"""The lines of a file of text, plain or compressed, read as a stream.

Time is linear in the bytes, however long a line is.
"""

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megaarch.errors import UserError
from megaarch.files import open_regular
from megaarch.ingest.sources import compression_of

BLOCK = 1 << 20
FRAME_BLOCK = 1 << 14  # of compressed bytes: what stands behind a frame's end is copied
DECOMPRESSORS = {
    "gzip": lambda: zlib.decompressobj(wbits=31),  # with gzip's header and checksum
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstandard": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


class Location(NamedTuple):
    """Where a record stands. number: of its line or row (`unit`), in what was read."""

    file: Path
    unit: str
    number: int


class RecordError(UserError):
    """A malformed record."""

    def __init__(self, location: Location, what: str):
        super().__init__(location, what)  # as it is pickled
        self.location, self.what = location, what

    def __str__(self) -> str:
        file, unit, number = self.location
        return f"{file}, {unit} {number}: {self.what}"


OnError = Callable[[RecordError], None]  # is called with each; where it returns, reading goes on


@dataclass(frozen=True)
class Shard:
    """A file, or a part of it: of plain JSON lines those that begin at a byte of start:end, of
    parquet the row groups start:end. end None is all of it."""

    file: Path
    start: int = 0
    end: int | None = None


def read_lines(
    shard: Shard, on_error: OnError, keep: bool = False
) -> Iterator[tuple[Location, str]]:
    """Yields lines without their newline; one that is not UTF-8 is malformed. keep: it comes all the
    same, with halves of surrogate pairs in the place of what cannot be decoded."""
    encoding = "utf-8" if shard.start else "utf-8-sig"  # of the first line
    for number, line in enumerate(split_lines(_blocks(shard)), start=1):
        location = Location(shard.file, "line", number)
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            on_error(RecordError(location, f"not UTF-8 ({error.reason})"))
            if keep:
                yield location, line.decode(encoding, "surrogateescape")
        else:
            yield location, text
        encoding = "utf-8"


def split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields b"".join(blocks).split(b"\\n"); each byte is copied a fixed number of times."""
    begun: list[bytes] = []  # of a line whose end is in a later block
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            *whole, last = others
            yield from whole
            begun = [last]
    yield b"".join(begun)


def _blocks(shard: Shard) -> Iterator[bytes]:
    """Yields the decompressed bytes of a shard. UserError if it cannot be read or is cut short."""
    compression = compression_of(shard.file)
    try:
        with open_regular(shard.file) as stream:
            if compression:
                yield from _frames(stream, DECOMPRESSORS[compression])
            else:
                end = sys.maxsize if shard.end is None else shard.end
                yield from _range_blocks(stream, shard.start, end)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{shard.file} cannot be read: {error}") from error


def _range_blocks(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yields the lines that begin in start:end, whole. Of a line that begins before them no more is
    read than reaches into the range."""
    block = b"\n"
    if start:
        stream.seek(start - 1)
        block = stream.readline(end - start)
        if not block.endswith(b"\n"):
            return
    at = stream.tell()
    while at < end and (more := stream.read(min(BLOCK, end - at))):
        at += len(more)
        block = more
        yield block
    if not block.endswith(b"\n"):
        yield stream.readline()


def lines_between(file: Path, start: int, end: int) -> int:
    """Counts the lines of a plain file that begin at a byte of start:end: at 0, and after each newline."""
    count, at = int(start == 0 < end), max(start - 1, 0)
    with open_regular(file) as stream:
        stream.seek(at)
        while at < end - 1 and (block := stream.read(min(BLOCK, end - 1 - at))):
            at += len(block)
            count += block.count(b"\n")
    return count


def _frames(stream: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    # The libraries' own readers take a damaged bz2 or xz stream behind a sound one, and a cut
    # zstandard frame, for the end of the file.
    frame = None
    while block := stream.read(FRAME_BLOCK):
        while block := block if frame else block.lstrip(b"\0"):  # padding between frames
            frame = frame or make()
            yield frame.decompress(block)
            block = b""
            if frame.eof:
                frame, block = None, frame.unused_data
    if frame is not None:
        raise EOFError("the compressed file ended before its last frame did")
