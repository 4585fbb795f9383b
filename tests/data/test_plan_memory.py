"""Plans of rows at the scale of a web corpus: the rows of a plain loop, in a few bytes a document."""

import tracemalloc
from itertools import accumulate, groupby

import numpy as np
import pytest

from megaarch.data import dataset, document_rows
from megaarch.data.bin_packing import pack_classes
from megaarch.data.dataset import DocumentOrder, Rows
from megaarch.data.document_rows import GOLDEN, LONG, ORDER, SHORTEST, EpochPlan, Kind
from megaarch.data.example import generator
from megaarch.data.objectives.language_modelling import FullLM
from megaarch.ingest.prepare import prepare


def split(length, most):
    """(offset, length) of the pieces of a text."""
    starts, ends = list(range(0, length, most)), [*range(most, length, most), length]
    if len(starts) > 1 and length - starts[-1] < SHORTEST:
        starts[-1] -= 1
        ends[-2] -= 1
    return [(start, end - start) for start, end in zip(starts, ends, strict=False)]


def plain_rows(lengths, kinds, size_of, limit, rng):
    """Rows of items, each the (document, offset, length, kind) of one piece or two."""
    documents, draw, pieces, number = rng.permutation(len(lengths)), rng.random(), [], 0
    for d in documents.tolist():
        for start, length in split(int(lengths[d]), LONG * max(kind.raw for kind in kinds)):
            edges = list(accumulate(kind.share / -(-length // kind.raw) for kind in kinds))
            drawn = (draw + GOLDEN * number) % 1 * edges[-1]
            k, number = sum(drawn >= edge for edge in edges[:-1]), number + 1
            pieces += [(d, start + at, n, k) for at, n in split(length, kinds[k].raw)]
    pieces = [piece for piece in pieces if piece[2] >= SHORTEST]
    items = []
    for k, kind in enumerate(kinds):
        mine = sorted((piece for piece in pieces if piece[3] == k), key=lambda piece: -piece[2])
        width = 2 if kind.mirrored else 1
        items += [mine[i : i + width] for i in range(0, len(mine), width)]
    of_class = [(key, list(g)) for key, g in groupby(items, lambda i: (*i[0][:1:-1], len(i) == 2))]
    sizes = np.array([size_of(*key) for key, _ in of_class])
    patterns = pack_classes(sizes, np.array([len(held) for _, held in of_class]), limit)
    rows = [
        [of_class[k][1][n] for k, numbers in pattern.items(row) for n in numbers]
        for pattern in patterns
        for row in range(pattern.rows)
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize("block", [3, 50, 1 << 16])
def test_rows_are_those_of_a_plain_loop(block, monkeypatch):
    monkeypatch.setattr(document_rows, "BLOCK", block)

    def size_of(kind, length, paired):
        return [length * (1 + paired) + kind, 1 + paired]

    for seed in range(40):
        draw = np.random.default_rng(seed)
        lengths = draw.integers(0, draw.integers(3, 2000), draw.integers(1, 150), dtype=np.int32)
        lengths[0] += SHORTEST
        kinds = [
            Kind(draw.random() + 0.01, int(raw), FullLM(), FullLM() if mirrored else None)
            for raw, mirrored in zip(draw.integers(3, 90, 4), draw.integers(0, 2, 4), strict=True)
        ][: draw.integers(1, 5)]
        limit = np.array([200, draw.integers(2, 20)])
        plan = EpochPlan(lengths, kinds, size_of, limit, generator(seed, 1))
        found = [
            [list(zip(*(a.tolist() for a in vars(item).values()), strict=True)) for item in row]
            for row in map(plan.row, range(len(plan)))
        ]
        wanted = plain_rows(lengths, kinds, size_of, limit, generator(seed, 1))
        assert found == wanted
        assert plan.most == max(sum(map(len, row)) for row in wanted)


class Numbers:
    """Documents whose tokens are numbered from one end of their concatenation to the other."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.starts = np.cumsum(lengths) - lengths

    def get(self, document, offset, length):
        assert offset + length <= self.lengths[document]
        return self.starts[document] + offset + np.arange(length)


@pytest.mark.parametrize("block", [16, 1 << 16])
def test_text_is_read_as_a_plain_concatenation(block, monkeypatch, rows_of):
    monkeypatch.setattr(dataset, "BLOCK", block)
    lengths = np.random.default_rng(0).integers(0, 60, 999, dtype=np.int32)
    lengths[100:140] = 0
    (task,) = rows_of(lengths, "gpt").tasks
    task.documents = DocumentOrder(Numbers(lengths), 7)
    for epoch in range(3):
        rng = generator(7 ^ ORDER, epoch)
        texts = [Numbers(lengths).get(d, 0, lengths[d]) for d in rng.permutation(999)]
        wanted, size = np.concatenate(texts), task.plan.tokens
        assert task.per_epoch == len(wanted) // size
        documents, before, _ = task.documents.epoch(epoch)
        for start in [*range(0, 200), *range(0, len(wanted) - size, size)]:
            assert (task._read(documents, before, start) == wanted[start : start + size]).all()
        assert (task._order(epoch) == rng.permutation(task.per_epoch)).all()


def test_pairs_share_rows_as_a_plain_loop_has_them(rows_of):
    lengths = np.random.default_rng(0).integers(2, 30, 2 * 999, dtype=np.int32)
    (task,) = rows_of(lengths, "t5", data__objective="supervised").tasks
    order, rows, taken = generator(0 ^ ORDER, 0).permutation(999), [], np.array([99, 99])
    for pair in order.tolist():
        size = lengths.reshape(-1, 2)[pair]
        if (taken + size > task.shape.streams).any():
            rows, taken = [*rows, []], np.zeros(2, int)
        rows[-1].append(pair)
        taken += size
    assert task.per_epoch == len(rows)
    task._example = lambda pair: pair
    for epoch in (0, 1):
        places = generator(0 ^ dataset.ROWS_ORDER, epoch).permutation(len(rows))
        found = [task.row(i + epoch * len(rows), (0, 0)) for i in range(len(rows))]
        assert found == [rows[place] for place in places]


@pytest.fixture
def rows_of(tiny):
    """Rows of a source that has lengths alone."""

    def make(lengths, preset, **given):
        mine = tiny(preset, **given)
        tokenizer = prepare(tiny(preset).data, mine.model.vocabulary_size).tokenizer

        class Source:
            def get(self, document, offset, length):
                return np.zeros(length, np.int32)

        class Prepared:
            supervised, train = mine.data.objective == "supervised", [(Source(), 1.0)]

        Source.lengths, Prepared.tokenizer = lengths, tokenizer
        return Rows(mine.model, mine.data, Prepared, 0)

    return make


@pytest.mark.parametrize(
    ("preset", "given", "peak", "held"),
    [
        ("gpt", {"data__document_masks": True}, 20, 10),
        ("ul2", {"data__document_masks": True}, 28, 11),
        ("gpt", {}, 12, 8),
        ("t5", {"data__objective": "supervised"}, 60, 28),
    ],
)
def test_a_plan_takes_few_bytes_a_document(preset, given, peak, held, rows_of, monkeypatch):
    """Every rank has one, of hundreds of millions of documents: a list of them, or an int64 or two, are
    gigabytes. peak, held: bytes a document, or a pair."""
    for module in (dataset, document_rows):
        monkeypatch.setattr(module, "BLOCK", 1 << 12)
    documents = 1 << 17
    lengths = np.random.default_rng(0).integers(2, 40, documents, dtype=np.int32)
    rows_of(lengths[:100], preset, **given)  # what is made once in a process
    tracemalloc.start()
    try:
        rows = rows_of(lengths, preset, **given)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    examples = documents // 2 if given.get("data__objective") else documents
    assert most < peak * examples and now < held * examples
    assert rows.per_epoch > 1000
