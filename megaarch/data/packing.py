"""Packing: converted examples to batches of one fixed shape.

Examples of a row stand one after another in every stream; their parts move along, so they stay
isolated from each other. What is left of a row is padding: in no part, of weight zero.

    stream   a a a a a b b b . .        parts of a: R[0:2; 0:2] C[2:5; 0:5]
    parts    R R C C C C C C            parts of b: C[5:8; 5:8]

Legend: B rows, S tokens of a stream, A position axes, P parts, M targets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from megaarch.attention.mask import Parts
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.data.example import Converted, RowShape

HEAD_MULTIPLE = 128


def plan_rows(shapes: Iterable[RowShape], limit: RowShape) -> Iterator[range]:
    """Yields the examples of each row: in order, a new row where the next one does not fit.

    shapes: a bound for each example, each of which fits `limit` alone.
    """
    start, stop, room = 0, 0, None
    for stop, shape in enumerate(shapes):
        assert limit.fits(shape), f"example {stop} of shape {shape} fits no row of shape {limit}"
        together = shape if room is None else room + shape
        if not limit.fits(together):
            yield range(start, stop)
            start, together = stop, shape
        room = together
    if room is not None:
        yield range(start, stop + 1)


def pack(
    rows: Sequence[Sequence[Converted]],
    shape: RowShape,
    *,
    pad: int,
    axes: int,
    sample_index: Sequence[int],
    multiple: int = 1,
) -> Batch:
    """Returns a Batch of `shape` with the examples of each row.

    pad: token id that fills rows. axes: number of position axes. multiple: of which streams' lengths
    are stored; what that adds is no padding that counts. An encoder of nothing runs over padding.
    ValueError where a row's examples do not fit `shape`.
    """
    if len(shape.streams) > 1:
        least = tuple(max(n, 1) for n in shape.streams)
        shape = replace(shape, streams=least, cross_parts=max(shape.cross_parts, 1))
    stored = shape.stretched(multiple).streams
    streams = [_pack_stream(rows, s, shape, stored, pad=pad, axes=axes) for s in range(len(stored))]
    target_index, target_tokens, target_weights = _pack_targets(rows, shape)
    used = np.flatnonzero(target_weights)
    head_rows = np.zeros(-(-max(len(used), 1) // HEAD_MULTIPLE) * HEAD_MULTIPLE, dtype=np.int64)
    head_rows[: len(used)] = used
    counts = Counts(
        rows=len(rows),
        tokens=tuple(
            sum(len(example.streams[s].tokens) for row in rows for example in row)
            for s in range(len(streams))
        ),
        areas=tuple(stream.parts.area() for stream in streams),
        cross_areas=tuple(stream.cross.area() if stream.cross else 0 for stream in streams),
        targets=len(used),
        slots=tuple(len(rows) * length for length in shape.streams),
    )
    return Batch(
        streams=tuple(streams),
        target_index=torch.from_numpy(target_index),
        target_tokens=torch.from_numpy(target_tokens),
        target_weights=torch.from_numpy(target_weights),
        head_rows=torch.from_numpy(head_rows),
        head_count=len(used),
        sample_index=torch.tensor(list(sample_index), dtype=torch.int64),
        counts=counts,
    )


def _pack_stream(
    rows: Sequence[Sequence[Converted]],
    s: int,
    shape: RowShape,
    stored: tuple[int, ...],
    *,
    pad: int,
    axes: int,
) -> Stream:
    length = shape.streams[s]
    tokens = np.full((len(rows), stored[s]), pad, dtype=np.int64)
    positions = np.zeros((len(rows), stored[s], axes), dtype=np.int64)
    parts: list[list[tuple[int, ...]]] = []
    cross: list[list[tuple[int, ...]]] = []
    for b, row in enumerate(rows):
        start, before = 0, 0
        parts.append([])
        cross.append([])
        for example in row:
            stream = example.streams[s]
            end = start + len(stream.tokens)
            if end > length:
                raise ValueError(f"row {b} holds {end} tokens or more and has room for {length}")
            assert stream.positions.shape[1] == axes, "positions of another number of axes"
            tokens[b, start:end] = stream.tokens
            positions[b, start:end] = stream.positions
            parts[b] += [_moved(part, start, start) for part in stream.parts]
            cross[b] += [_moved(part, start, before) for part in stream.cross_parts]
            start = end
            before += len(example.streams[s - 1].tokens) if s else 0

    def parts_of(rows: list[list[tuple[int, ...]]], room: int, keys: int) -> Parts:
        full_row = (length, shape.streams[keys])
        return Parts.of(rows, stored[s], stored[keys], room=room, full_row=full_row)

    return Stream(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        parts=parts_of(parts, shape.parts, s),
        cross=parts_of(cross, shape.cross_parts, s - 1) if s else None,
    )


def _moved(part: tuple[int, ...], q: int, k: int) -> tuple[int, ...]:
    shape, q_start, q_end, k_start, k_end = part
    return (shape, q_start + q, q_end + q, k_start + k, k_end + k)


def _pack_targets(rows: Sequence[Sequence[Converted]], shape: RowShape) -> tuple[np.ndarray, ...]:
    index = np.zeros((len(rows), shape.targets), dtype=np.int64)
    tokens = np.zeros((len(rows), shape.targets), dtype=np.int64)
    weights = np.zeros((len(rows), shape.targets), dtype=np.float32)
    for b, row in enumerate(rows):
        slot, start = 0, 0
        for example in row:
            end = slot + len(example.target_index)
            if end > shape.targets:
                raise ValueError(f"row {b} has {end} targets or more and room for {shape.targets}")
            index[b, slot:end] = example.target_index + start
            tokens[b, slot:end] = example.target_tokens
            weights[b, slot:end] = example.target_weights
            slot = end
            start += len(example.streams[-1].tokens)
    return index, tokens, weights
