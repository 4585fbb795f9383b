"""Tokenized sources: documents stay whole, and one that lacks its end is told."""

import logging
import re

import numpy as np
import pytest

from megaarch import config
from megaarch.config.schema import Data
from megaarch.data.dataset import Rows
from megaarch.ingest.indexed_dataset import IndexedDataset, writing_dataset
from megaarch.ingest.prepare import prepare
from megaarch.ingest.tokenizer import train_sentencepiece
from tests.conftest import made_up_text, tiny_raw


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_sentencepiece([made_up_text(seed, 20) for seed in range(9)], 400, 10, path)


def write(path, documents):
    """documents: of each its sequences."""
    with writing_dataset(path) as writer:
        for document in documents:
            for sequence in document:
                writer.add(np.array(sequence))
            writer.end_document()
    return str(path)


@pytest.fixture
def data(tokenizer, tmp_path):
    return Data(tokenizer=tokenizer.path, sentinels=10, cache=str(tmp_path / "cache"))


def sentences(number, eos):
    """Documents of sentences: of document d the tokens d, d, ... and eos at its end."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, number)
    documents = [
        [[d % 200 + 10] * int(n) for n in rng.integers(1, 12, c)] for d, c in enumerate(counts)
    ]
    for document in documents:
        document[-1].append(eos)
    return documents


def epoch(prepared, epoch=0):
    """All tokens of an epoch, as its rows read them in the order of the text."""
    raw = tiny_raw("unused", "unused")
    settings = config.resolve(raw)
    rows = Rows(settings.model, settings.data, prepared, seed=3)
    (task,) = rows.tasks
    documents, ends, _ = task.documents.epoch(epoch)
    pieces = []
    for start in range(0, task.per_epoch * task.plan.tokens, task.plan.tokens):
        pieces.append(task._read(documents, ends, start))
    return np.concatenate(pieces)


def test_documents_of_several_sentences_are_shuffled_whole(tokenizer, data, tmp_path):
    eos = tokenizer.vocabulary.eos
    written = sentences(300, eos)
    source = write(tmp_path / "d", written)
    prepared = prepare(data.model_copy(update={"source": source}), 400)
    assert prepared.manifest.train_documents == 300
    whole = {tuple(token for s in document for token in s) for document in written}
    orders = []
    for number in (0, 1):
        read = epoch(prepared, number)
        found = np.split(read, np.flatnonzero(read == eos) + 1)[:-1]
        assert len(found) > 250
        assert all(tuple(document.tolist()) in whole for document in found)
        orders.append([int(document[0]) for document in found])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_a_sequence_a_document_reads_as_it_did(tokenizer, data, tmp_path):
    """There, documents are sequences: as many, as long, with the same tokens."""
    eos = tokenizer.vocabulary.eos
    joined = [[[token for s in document for token in s]] for document in sentences(300, eos)]
    source = write(tmp_path / "d", joined)
    prepared = prepare(data.model_copy(update={"source": source}), 400)
    dataset = IndexedDataset(source)
    ((documents, _),) = prepared.train
    assert np.array_equal(documents.lengths, dataset.lengths)
    assert all(np.array_equal(documents[i], dataset[i]) for i in range(300))


def said(caplog, data, source):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "megaarch"):
        prepare(data.model_copy(update={"source": source}), 400)
    return caplog.messages


def ended(lasts, sentences=1):
    """Documents of some tokens that end in these ones; none ends where it is None."""
    ends = [[] if last is None else [last] for last in lasts]
    return [[[20 + k, 30]] * (sentences - 1) + [[20 + k, 40, *end]] for k, end in enumerate(ends)]


@pytest.mark.parametrize("sentences", [1, 3])
def test_documents_without_their_eos_are_told(sentences, tokenizer, data, tmp_path, caplog):
    eos = tokenizer.vocabulary.eos
    cases = {
        "all": ([eos] * 50, None),
        "none": (
            [None] * 50,
            r"none of its 50 documents ends in eos, .* \(they end in 40\): the mo",
        ),
        "foreign": ([7] * 50, r"none of its 50 documents ends in eos, .* \(they end in 7\): the m"),
        "various": ([*range(10, 60)], r"none of its 50 documents ends in eos, [^(]*t.model: the m"),
        "few": ([eos] * 47 + [7, 8, 9], r"3 of its 50 documents do not end in eos, which is token"),
    }
    for name, (lasts, wanted) in cases.items():
        source = write(tmp_path / name, [*ended(lasts, sentences), [[]]])  # an empty one has no end
        for _ in range(2):  # made, and found made
            messages = said(caplog, data, source)
            assert len(messages) == (wanted is not None)
            if wanted:
                assert messages[0].startswith(f"data source {source}: ")
                assert f"eos, which is token {eos} under {tokenizer.path}" in messages[0]
                assert "--append-eos" in messages[0]
                assert re.search(wanted, messages[0])
