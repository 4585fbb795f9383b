import pickle
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.ingest import indexed_dataset
from megaarch.ingest.indexed_dataset import (
    IndexedDataset,
    IndexedDocuments,
    token_dtype,
    writing_dataset,
)

DOCUMENTS = [[[1, 2, 3], [4]], [[65535, 0]], [[], [7, 8]]]  # documents of sequences
SEQUENCES = [sequence for document in DOCUMENTS for sequence in document]


def write(path, documents=DOCUMENTS, dtype=np.int32):
    with writing_dataset(path, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add(np.array(sequence, dtype=np.int64))
            writer.end_document()
    return IndexedDataset(path)


def index_bytes(sequences, boundaries, code, item, version=1, magic=b"MMIDIDX\x00\x00"):
    """The .idx as the layout in Megatron-LM describes it."""
    lengths = [len(sequence) for sequence in sequences]
    pointers = [item * sum(lengths[:i]) for i in range(len(lengths))]
    head = magic + struct.pack("<QBQQ", version, code, len(lengths), len(boundaries))
    body = struct.pack(f"<{len(lengths)}i", *lengths)
    return head + body + struct.pack(f"<{len(pointers) + len(boundaries)}q", *pointers, *boundaries)


def test_bytes_on_disk(tmp_path):
    write(tmp_path / "d", dtype=np.uint16)
    tokens = [token for sequence in SEQUENCES for token in sequence]
    assert (tmp_path / "d.bin").read_bytes() == struct.pack(f"<{len(tokens)}H", *tokens)
    assert (tmp_path / "d.idx").read_bytes() == index_bytes(SEQUENCES, [0, 2, 3, 5], 8, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_reads_what_was_written(tmp_path, dtype):
    dataset = write(tmp_path / "d.bin", dtype=dtype)
    assert len(dataset) == 5
    assert [dataset[i].tolist() for i in range(5)] == SEQUENCES
    assert dataset[-1].tolist() == [7, 8]
    assert dataset.dtype == dtype
    assert dataset[0].dtype == (np.int64 if dtype is np.int64 else np.int32)
    assert dataset.lengths.tolist() == [3, 1, 2, 0, 2]
    assert dataset.document_index.tolist() == [0, 2, 3, 5]
    assert dataset.tokens == 8
    assert dataset.get(0, 1, 2).tolist() == [2, 3]
    assert dataset.get(2, 1).tolist() == [0]
    for bad in ((5,), (-6,), (0, 2, 2), (0, -1), (0, 0, -1)):
        with pytest.raises(IndexError):
            dataset.get(*bad)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[2].tolist() == [65535, 0]


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8), st.data())
def test_stream_is_a_slice_of_the_concatenation(tmp_path_factory, sequences, data):
    path = tmp_path_factory.mktemp("stream") / "d"
    dataset = write(path, [sequences])
    everything = [token for sequence in sequences for token in sequence]
    start = data.draw(st.integers(0, len(everything)))
    length = data.draw(st.integers(0, len(everything) - start))
    assert dataset.stream(start, length).tolist() == everything[start : start + length]
    with pytest.raises(IndexError):
        dataset.stream(start, len(everything) - start + 1)


def test_stream_follows_pointers_that_are_out_of_order(tmp_path):
    (tmp_path / "d.bin").write_bytes(np.array([9, 4, 5, 1, 2, 3], dtype="<i4").tobytes())
    raw = bytearray(index_bytes([[1, 2, 3], [4, 5]], [0, 2], 4, 4))
    raw[34 + 8 : 34 + 24] = struct.pack("<2q", 12, 4)
    (tmp_path / "d.idx").write_bytes(raw)
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset[0].tolist() == [1, 2, 3]
    for start in range(6):
        for end in range(start, 6):
            assert dataset.stream(start, end - start).tolist() == [1, 2, 3, 4, 5][start:end]


def out_of_order(path):
    """Two documents, [1, 2, 3] + [4, 5] and [6], whose sequences lie in another order."""
    path.with_suffix(".bin").write_bytes(np.array([9, 6, 4, 5, 1, 2, 3], dtype="<i4").tobytes())
    raw = bytearray(index_bytes([[1, 2, 3], [4, 5], [6]], [0, 2, 3], 4, 4))
    raw[34 + 12 : 34 + 36] = struct.pack("<3q", 16, 8, 4)
    path.with_suffix(".idx").write_bytes(raw)
    return IndexedDataset(path)


def test_a_document_is_its_sequences_end_to_end(tmp_path):
    contiguous = write(tmp_path / "a", [[[1, 2, 3], [4, 5]], [[6]]])
    for dataset in (contiguous, out_of_order(tmp_path / "d")):
        documents = IndexedDocuments(dataset)
        assert len(documents) == 2
        assert documents.lengths.tolist() == [5, 1]
        assert [documents[i].tolist() for i in range(2)] == [[1, 2, 3, 4, 5], [6]]
        assert (documents[-2].tolist(), documents[-2].dtype) == ([1, 2, 3, 4, 5], np.int32)
        for start in range(6):
            for end in range(start, 6):
                found = documents.get(0, start, end - start).tolist()
                assert found == [1, 2, 3, 4, 5][start:end]
        assert documents.get(1, 1).tolist() == []
        assert documents.last_tokens(np.array([1, 0])).tolist() == [6, 5]
        for bad in ((2,), (-3,), (0, 3, 3), (0, -1), (1, 0, -1)):
            with pytest.raises(IndexError):
                documents.get(*bad)
        copy = pickle.loads(pickle.dumps(documents))
        assert (copy.path, copy[0].tolist()) == (documents.path, [1, 2, 3, 4, 5])


@settings(max_examples=60)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4), max_size=6))
def test_documents_are_those_that_were_written(tmp_path_factory, written):
    dataset = write(tmp_path_factory.mktemp("documents") / "d", written)
    documents = IndexedDocuments(dataset)
    wanted = [[token for sequence in document for token in sequence] for document in written]
    assert [documents[i].tolist() for i in range(len(documents))] == wanted
    assert (documents.tokens, documents.lengths.sum()) == (dataset.tokens, dataset.tokens)
    filled = [i for i, document in enumerate(wanted) if document]
    assert documents.last_tokens(np.array(filled, int)).tolist() == [wanted[i][-1] for i in filled]


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        ([], [[1], [2], [3], [4]]),
        ([0], [[1], [2], [3], [4]]),
        ([1, 3], [[1], [2, 3], [4]]),
        ([0, 2, 2, 4], [[1, 2], [], [3, 4]]),
        ([0, 4], [[1, 2, 3, 4]]),
    ],
)
def test_sequences_of_no_document_are_documents_of_their_own(tmp_path, bounds, wanted):
    (tmp_path / "d.bin").write_bytes(struct.pack("<4i", 1, 2, 3, 4))
    (tmp_path / "d.idx").write_bytes(index_bytes([[1], [2], [3], [4]], bounds, 4, 4))
    documents = IndexedDocuments(IndexedDataset(tmp_path / "d"))
    assert [documents[i].tolist() for i in range(len(documents))] == wanted


def test_an_index_of_documents_of_one_sequence_each_is_mapped_and_not_copied(tmp_path, monkeypatch):
    """Of hundreds of millions of documents, a copy of it in each rank is gigabytes."""
    monkeypatch.setattr(indexed_dataset, "SPANS", 1 << 10)
    documents = 1 << 18
    with writing_dataset(tmp_path / "d") as writer:
        writer.add_documents(np.ones(documents, np.int32), np.ones((documents, 1), np.int64))
    tracemalloc.start()
    try:
        found = IndexedDocuments(IndexedDataset(tmp_path / "d"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * documents
    assert found.lengths.sum() == len(found) == documents


def test_dtype_as_megatron_chooses():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_ids_that_do_not_fit_leave_nothing_behind(tmp_path):
    write(tmp_path / "d")
    before = (tmp_path / "d.bin").read_bytes(), (tmp_path / "d.idx").read_bytes()
    with pytest.raises(ValueError, match="do not fit into uint16"):
        write(tmp_path / "d", [[[1]], [[65536]]], np.uint16)
    with pytest.raises(ValueError, match="do not fit into uint16"):
        write(tmp_path / "d", [[[-1]]], np.uint16)
    assert before == ((tmp_path / "d.bin").read_bytes(), (tmp_path / "d.idx").read_bytes())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.bin", "d.idx"]


GOOD = index_bytes(SEQUENCES, [0, 2, 3, 5], 4, 4)


def patched(offset, form, *values):
    raw = bytearray(GOOD)
    struct.pack_into(form, raw, offset, *values)
    return bytes(raw)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"", r"d.idx is not an indexed dataset: it does not begin with MMIDIDX"),
        (b"MMIDIDX\x01\x00" + GOOD[9:], r"d.idx is not an indexed dataset"),
        (GOOD[:20], r"d.idx is truncated: 20 bytes, less than its header"),
        (GOOD[:-1], r"d.idx is truncated: 125 bytes, where 5 sequences .* take 126"),
        (GOOD + b"12", r"d.idx does not match its header: 128 bytes"),
        (patched(9, "<Q", 2), r"d.idx has version 2: only version 1"),
        (patched(17, "<B", 9), r"d.idx has dtype code 9, which is no integer type"),
        (patched(17, "<B", 0), r"d.idx has dtype code 0"),
        (patched(17, "<B", 7), r"d.idx has dtype code 7"),
        (
            patched(17, "<B", 8),
            r"its dtype uint16 is not that of .*d.bin, whose tokens have 4 bytes",
        ),
        (
            patched(17, "<B", 5),
            r"its dtype int64 is not that of .*d.bin, whose tokens have 4 bytes",
        ),
        (patched(54 + 32, "<q", (1 << 63) - 4), r"d.bin is truncated: 32 bytes"),
        (patched(34, "<i", 100), r"d.bin is truncated: 32 bytes, but .*d.idx points up to"),
        (patched(34, "<i", -1), r"d.idx is damaged: a length or a pointer is impossible"),
        (patched(54, "<q", -4), r"d.idx is damaged: a length or a pointer is impossible"),
        (patched(54, "<q", 2), r"d.idx is damaged: a length or a pointer is impossible"),
        (patched(54 + 32, "<q", 1 << 40), r"d.bin is truncated: 32 bytes"),
        (patched(54 + 40, "<4q", 0, 3, 2, 5), r"d.idx is damaged: its document boundaries"),
        (patched(54 + 40, "<4q", 0, 2, 3, 6), r"d.idx is damaged: its document boundaries"),
    ],
)
def test_damaged_index(tmp_path, index, said):
    write(tmp_path / "d")
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(ValueError, match=said):
        IndexedDataset(tmp_path / "d")


def test_truncated_and_missing_tokens(tmp_path):
    write(tmp_path / "d")
    raw = (tmp_path / "d.bin").read_bytes()
    (tmp_path / "d.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=r"d.bin is truncated: 31 bytes, .* up to byte 32"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.bin").unlink()
    with pytest.raises(ValueError, match=r"d.bin is missing"):
        IndexedDataset(tmp_path / "d")


def test_empty_dataset(tmp_path):
    dataset = write(tmp_path / "d", [])
    assert len(dataset) == dataset.tokens == 0
    assert dataset.stream(0, 0).tolist() == []
    assert len(write(tmp_path / "e", [[[], []]])) == 2


def test_checksum_sees_a_changed_token_length_or_boundary(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 1 << 20)
    first = write(tmp_path / "d", [[tokens]]).checksum()
    assert write(tmp_path / "e", [[tokens]]).checksum() == first
    other = tokens.copy()
    other[-1] += 1
    assert write(tmp_path / "e", [[other]]).checksum() != first
    assert write(tmp_path / "e", [[tokens[:-1]]]).checksum() != first
    assert write(tmp_path / "e", [[tokens[:10], tokens[10:]]]).checksum() != first
    small = [write(tmp_path / "e", [[range(n, n + 99)]]).checksum() for n in (0, 1)]
    assert small[0] != small[1]


def test_checksum_sees_any_change_of_a_file_up_to_a_gibibyte(tmp_path):
    tokens = np.arange(1 << 22, dtype=np.int32)  # 16 MiB
    first = write(tmp_path / "d", [[tokens]]).checksum()
    few = np.linspace(0, len(tokens) - 1024, 256).astype(int)  # pages of 4 KiB, evenly spread
    kept = (few[:, None] + np.arange(-1, 1025)).ravel().clip(0, len(tokens) - 1)
    other = tokens + 1
    other[kept] = tokens[kept]
    assert (other != tokens).mean() > 0.9
    assert write(tmp_path / "e", [[other]]).checksum() != first
    for place in (1500, len(tokens) // 3, len(tokens) - 1):
        other = tokens.copy()
        other[place] += 1
        assert write(tmp_path / "e", [[other]]).checksum() != first, place


def test_checksum_of_a_larger_file_is_of_a_sample_and_its_digest_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "WHOLE", 1 << 16)
    monkeypatch.setattr(indexed_dataset, "SAMPLES", 4)
    monkeypatch.setattr(indexed_dataset, "SAMPLE_BYTES", 1 << 12)
    tokens = np.arange(1 << 15, dtype=np.int32)
    first, same, seen = tokens, tokens.copy(), tokens.copy()
    same[2000] += 1  # between the first and the second piece
    seen[-1] += 1
    sums, digests = [], []
    for changed in (first, same, seen):
        dataset = write(tmp_path / "d", [[changed]])
        sums.append(dataset.checksum())
        digests.append(dataset.digest())
    assert sums[0] == sums[1] != sums[2]
    assert len(set(digests)) == 3
    blocks = []
    assert dataset.digest(blocks.append) == digests[2]
    assert np.concatenate(blocks).tolist() == seen.tolist()


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_megatron_and_we_write_the_same_bytes_and_read_each_other(tmp_path, megatron, dtype):
    rng = np.random.default_rng(1)
    documents = [
        [rng.integers(0, 256, rng.integers(0, 30)) for _ in range(rng.integers(1, 4))]
        for _ in range(20)
    ]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    builder.finalize(f"{theirs}.idx")
    write(ours, documents, dtype)
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()

    sequences = [sequence for document in documents for sequence in document]
    read_by_us, read_by_them = IndexedDataset(theirs), megatron.IndexedDataset(str(ours))
    assert len(read_by_us) == len(read_by_them) == len(sequences)
    assert np.array_equal(read_by_us.document_index, read_by_them.document_indices)
    assert np.array_equal(read_by_us.lengths, read_by_them.sequence_lengths)
    for i, sequence in enumerate(sequences):
        assert np.array_equal(read_by_us[i], sequence)
        assert np.array_equal(read_by_them[i], sequence)
    part = read_by_them.get(3, offset=1, length=4)
    assert np.array_equal(read_by_us.get(3, 1, 4), part)


def test_reads_megatrons_multimodal_index(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "d.bin"), np.int32, multimodal=True)
    builder.add_item(torch.tensor([1, 2, 3]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "d.idx"))
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [1, 2, 3]


def test_megatron_agrees_on_the_dtype(megatron):
    for size in (100, 65499, 65500, 70000):
        assert token_dtype(size) == megatron.DType.optimal_dtype(size)
