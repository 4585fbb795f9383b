"""The lines of a file of text, plain or compressed, read as a stream.

Time is linear in the bytes, however long a line is.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megaarch.errors import UserError
from megaarch.ingest.sources import compression_of

BLOCK = 1 << 20
FRAME_BLOCK = 1 << 14  # of compressed bytes: what stands behind a frame's end is copied
DECOMPRESSORS = {
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstandard": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


class MalformedRecord(UserError):
    """A record that cannot be read. number: of its line or row (`unit`) in what was read."""

    def __init__(self, file: Path, unit: str, number: int, what: str):
        super().__init__(file, unit, number, what)  # as it is pickled
        self.file, self.unit, self.number, self.what = file, unit, number, what

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}: {self.what}"


Malformed = Callable[[MalformedRecord], None]  # is told of one; if it returns, reading goes on


class Place(NamedTuple):
    file: Path
    unit: str
    number: int


@dataclass(frozen=True)
class Shard:
    """A file, or a part of it: of plain JSON lines those that begin at a byte of start:end, of
    parquet the row groups start:end. end None is all of it."""

    file: Path
    start: int = 0
    end: int | None = None


def read_lines(shard: Shard, malformed: Malformed) -> Iterator[tuple[Place, str]]:
    """Lines without their newline; one that is not UTF-8 is malformed."""
    encoding = "utf-8" if shard.start else "utf-8-sig"  # of the first line
    for number, line in enumerate(split_lines(_blocks(shard)), start=1):
        place = Place(shard.file, "line", number)
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            malformed(MalformedRecord(*place, f"not UTF-8 ({error.reason})"))
        else:
            yield place, text
        encoding = "utf-8"


def split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """What b"".join(blocks).split(b"\\n") gives; each byte is copied a fixed number of times."""
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
    """The decompressed bytes of a shard. ValueError if it cannot be read or is cut short."""
    file, compression = shard.file, compression_of(shard.file)
    try:
        if make := DECOMPRESSORS.get(compression):
            yield from _frames(file, make)
            return
        with (gzip.open if compression == "gzip" else open)(file, "rb") as stream:
            if shard.end is not None:
                yield from _range_blocks(stream, shard.start, shard.end)
                return
            while block := stream.read(BLOCK):
                yield block
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _range_blocks(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in start:end, whole. Of a line that begins ahead of them no more is
    read than reaches into the range."""
    at, block = start, b"\n"
    if start:
        stream.seek(start - 1)
        at -= 1
        while at < end - 1 and (block := stream.read(min(BLOCK, end - 1 - at))):
            at += len(block)
            _, newline, block = block.partition(b"\n")
            if newline:
                break
        else:
            return
        if block:
            yield block
    while at < end and (more := stream.read(min(BLOCK, end - at))):
        at += len(more)
        block = more
        yield block
    if not block.endswith(b"\n"):
        yield stream.readline()


def _frames(file: Path, make: Callable[[], Any]) -> Iterator[bytes]:
    # The libraries' own readers take a damaged bz2 or xz stream behind a sound one, and a cut
    # zstandard frame, for the end of the file.
    frame = None
    with file.open("rb") as stream:
        while block := stream.read(FRAME_BLOCK):
            while block := block if frame else block.lstrip(b"\0"):  # padding between frames
                frame = frame or make()
                yield frame.decompress(block)
                block = b""
                if frame.eof:
                    frame, block = None, frame.unused_data
    if frame is not None:
        raise EOFError("the compressed file ended before its last frame did")
