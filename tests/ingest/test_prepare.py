import json
import multiprocessing
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megaarch.config.schema import Data, Source
from megaarch.data.example import SPECIALS
from megaarch.ingest import corpus, prepare, prepared_data, split
from megaarch.ingest.indexed_dataset import IndexedDataset, writing_dataset
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece
from tests.ingest.documents import text, train_texts, write

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path):
    source = write(tmp_path / "text.jsonl", [text(seed) for seed in range(60)])
    return Data(source=source, cache=str(tmp_path / "cache"), sentinels=10)


def test_documents_go_to_one_side_whole(settings):
    prepared = prepare.prepare(settings, 512)
    train, heldout = train_texts(prepared), prepared.heldout
    assert sorted(train + heldout) == sorted(text(seed) for seed in range(60))
    assert heldout
    size = sum(len(t.encode()) for t in train)
    held = sum(len(t.encode()) for t in heldout)
    assert held / (held + size) >= 0.1
    m = prepared.manifest
    assert (m.documents, m.duplicates, m.dropped_paragraphs) == (60, 0, 0)
    assert (m.train_documents, m.heldout_documents) == (len(train), len(heldout))
    assert (m.train_bytes, m.heldout_bytes) == (size, held)
    assert m.heldout_share == pytest.approx(held / (held + size))
    assert m.train_tokens == sum(dataset.tokens for dataset, _ in prepared.train)
    assert prepared.tokenizer.vocabulary.size == 512
    assert not prepared.supervised
    assert prepared.heldout_pairs == []


def test_the_side_does_not_hang_on_the_order(settings, tmp_path):
    before = prepare.prepare(settings, 512)
    texts = [text(seed) for seed in range(60)]
    random.Random(1).shuffle(texts)
    source = write(tmp_path / "other.jsonl", texts)
    after = prepare.prepare(settings.model_copy(update={"source": source}), 512)
    assert sorted(after.heldout) == sorted(before.heldout)


def test_the_tokenizer_sees_train_only(settings, tmp_path, monkeypatch):
    given = []

    def watch(documents, *rest):
        given.extend(documents)
        return train_sentencepiece(given, *rest)

    monkeypatch.setattr(prepare, "train_sentencepiece", watch)
    prepared = prepare.prepare(settings, 512)
    assert given == train_texts(prepared)


def test_a_large_corpus_trains_its_tokenizer_on_a_sample(settings, monkeypatch):
    given = []

    def watch(documents, *rest):
        given.extend(documents)
        return train_sentencepiece(given, *rest)

    monkeypatch.setattr(prepare, "train_sentencepiece", watch)
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 20_000)
    train = train_texts(prepare.prepare(settings, 400))
    assert 10 < len(given) < 40
    assert set(given) < set(train)


def test_duplicates_and_shared_paragraphs_are_dropped_and_counted(settings, tmp_path):
    held = set(prepare.prepare(settings, 512).heldout)
    texts = [text(seed) for seed in range(60)]
    copied = "A paragraph that a held-out document shares with one of train."
    texts = [f"{t}\n{copied}\n\nshort one\n" for t in texts]
    source = write(tmp_path / "copies.jsonl", [*texts, texts[0], texts[0]])
    prepared = prepare.prepare(settings.model_copy(update={"source": source}), 512)
    m = prepared.manifest
    assert m.duplicates == 2
    assert m.documents == 60
    assert m.dropped_paragraphs == m.heldout_documents == len(prepared.heldout) > 0
    for document in prepared.heldout:
        assert copied not in document
        assert document.endswith("\n\nshort one\n")
    assert all(copied in document for document in train_texts(prepared))
    assert held  # the first corpus had some too


def test_the_share_holds_after_paragraphs_are_dropped(settings, tmp_path):
    shared = "\n\n".join(text(-1, 2).strip() for _ in range(6))
    texts = [f"{text(seed)}\n{shared}" for seed in range(300)]  # half of each is boilerplate
    source = write(tmp_path / "half.jsonl", texts)
    m = prepare.prepare(settings.model_copy(update={"source": source}), 512).manifest
    assert m.heldout_share >= 0.1 or m.heldout_documents >= 0.17 * 300
    assert m.train_documents > 0.7 * 300


def test_a_held_out_document_of_shared_paragraphs_alone_is_dropped(settings, tmp_path):
    parts = [text(seed, 1).strip() for seed in range(200)]
    everything = "\n\n".join(parts)
    singles = [f"{part}\n" for part in parts]
    source = write(tmp_path / "whole.jsonl", [everything, *singles])
    data = settings.model_copy(update={"source": source, "held_out": 0.3})
    assert split.place(split.digest(everything)) > 0.65, "so that it is in train"
    prepared = prepare.prepare(data, 512)
    assert prepared.heldout == []
    assert prepared.manifest.dropped_paragraphs > 40


def test_prepared_data_are_reused_until_something_changes(settings, tmp_path):
    first = prepare.prepare(settings, 512)
    told = []
    again = prepare.prepare(settings, 512, told.append)
    assert told == []
    assert again.fingerprint == first.fingerprint
    assert again.heldout == first.heldout
    assert again.manifest == first.manifest
    changed = settings.model_copy(update={"held_out": 0.3})
    assert prepare.prepare(changed, 512, told.append).fingerprint != first.fingerprint
    assert told
    assert prepare.prepare(settings, 400).fingerprint != first.fingerprint
    write(tmp_path / "text.jsonl", [text(seed) for seed in range(61)])
    assert prepare.prepare(settings, 512).fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_content(settings, tmp_path):
    first = prepare.prepare(settings, 512)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(settings.source, tmp_path / "elsewhere" / "other-name.jsonl")
    data = settings.model_copy(update={"source": str(moved), "cache": str(tmp_path / "cache-2")})
    assert prepare.prepare(data, 512).fingerprint == first.fingerprint


def in_train(document):
    """The document behind as many spaces as put it on the train side."""
    spaced = (" " * n + document for n in range(99))
    return next(t for t in spaced if split.place(split.digest(t)) > 0.3)


def test_text_held_out_elsewhere_is_not_trained_on(settings, tmp_path):
    held = prepare.prepare(settings, 512).heldout
    exclude = split.Exclusion.of(held)
    alone = held[0].split("\n\n")[3]
    texts = [text(seed) for seed in range(100, 140)]
    texts += [in_train(held[0]), in_train(held[1]), in_train(f"{alone}\n\n{text(142)}")]
    data = settings.model_copy(update={"source": write(tmp_path / "own.jsonl", texts)})
    unknown = prepare.prepare(data, 512)
    prepared = prepare.prepare(data, 512, exclude=exclude)
    keys = {key for document in held for key in split.paragraphs(document)}
    assert any(keys.intersection(split.paragraphs(t)) for t in train_texts(unknown))
    assert not any(keys.intersection(split.paragraphs(t)) for t in train_texts(prepared))
    assert any(text(142).strip() in t for t in train_texts(prepared)), "the rest stays"
    found, m = unknown.manifest, prepared.manifest
    assert (m.excluded_documents, m.excluded_paragraphs) == (2, 1)
    assert found.train_documents - m.train_documents == 2
    assert found.train_bytes > m.train_bytes
    assert m.train_documents == len(train_texts(prepared))
    assert prepared.fingerprint != unknown.fingerprint
    assert prepared.heldout == unknown.heldout
    other = split.Exclusion.of([text(900)])
    assert prepare.prepare(data, 512, exclude=other).fingerprint == unknown.fingerprint
    texts = [" " * n + held[0] for n in range(40)]
    source = write(tmp_path / "all.jsonl", texts)
    data = data.model_copy(update={"source": source, "tokenizer": unknown.tokenizer.path})
    with pytest.raises(ValueError, match="no train text .* and that is not held out"):
        prepare.prepare(data, 512, exclude=exclude)


def test_pairs_held_out_elsewhere_are_not_trained_on(tmp_path):
    held = [(in_train(f"{text(n, 2)} {n}?"), f"answer {n}") for n in range(3)]
    own = [(f"{text(n, 2)} {n}?", f"answer {n}") for n in range(10, 60)]
    same_input, its_target = (held[0][0], "another answer"), (in_train("what?"), held[1][0])
    short_target = (in_train("who?"), held[2][1])
    pairs = [*own, same_input, its_target, short_target]
    lines = [json.dumps({"input": a, "target": b}) + "\n" for a, b in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    data = Data(source=str(tmp_path / "pairs.jsonl"), cache=str(tmp_path / "cache"), sentinels=0)
    exclude = split.Exclusion.of(["\n".join(pair) for pair in held], held)
    prepared = prepare.prepare(data, 512, exclude=exclude)
    kept = train_texts(prepared)
    assert not {*same_input, *its_target} & set(kept)
    assert short_target[0] in kept, "a short target says nothing of where it is from"
    assert prepared.manifest.excluded_documents == 2


def test_nothing_can_be_left_out_of_a_tokenized_source(settings, tmp_path):
    made = prepare.prepare(settings, 512)
    with writing_dataset(tmp_path / "tokens") as writer:
        writer.add([*made.tokenizer.encode(text(0)), made.tokenizer.vocabulary.eos])
        writer.end_document()
    update = {"source": str(tmp_path / "tokens"), "tokenizer": made.tokenizer.path}
    data = settings.model_copy(update=update)
    with pytest.raises(ValueError, match="is tokenized already.*give the text itself"):
        prepare.prepare(data, 512, exclude=split.Exclusion.of(made.heldout))


DAMAGE = ["bin", "cut", "idx", "tokenizer", "manifest", "heldout", "edited", "shortened"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_changed_data_are_refused(settings, damage):
    prepared = prepare.prepare(settings, 512)
    directory = Path(prepared.tokenizer.path).parent
    names = {"bin": "train-0.bin", "cut": "train-0.bin", "idx": "train-0.idx"}
    names |= {"manifest": "manifest.json"}
    names |= dict.fromkeys(("heldout", "edited", "shortened"), "heldout.jsonl")
    file = directory / names.get(damage, damage)
    raw = bytearray(file.read_bytes())
    if damage in ("cut", "manifest", "heldout"):
        del raw[-40:]
    elif damage == "edited":
        raw[20] = ord("x")
    elif damage == "shortened":
        del raw[raw[:-1].rindex(b"\n") + 1 :]
    else:
        raw[-50] ^= 1
    file.write_bytes(raw)
    said = "has changed since|are damaged|is truncated|is damaged|tokenizer file"
    with pytest.raises(ValueError, match=said):
        prepare.prepare(settings, 512).heldout  # noqa: B018  # which is read when it is asked for


def test_what_trains_does_not_read_held_out_text(settings, monkeypatch):
    made = prepare.prepare(settings, 512)
    read = []
    monkeypatch.setattr(prepared_data, "read_bytes", lambda file, **_: read.append(file) or b"")
    found = prepare.prepare(settings, 512)
    assert found.fingerprint == made.fingerprint and not read
    with pytest.raises(ValueError, match="has changed since"):
        found.heldout  # noqa: B018
    assert read == [made.directory / "heldout.jsonl"]


def run(settings, barrier, queue):
    barrier.wait()
    queue.put(prepare.prepare(settings, 512).fingerprint)


def test_processes_that_prepare_the_same_data_at_once(settings):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    args = (settings, barrier, queue)
    processes = [context.Process(target=run, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {prepare.prepare(settings, 512).fingerprint}
    assert len(list(Path(settings.cache).iterdir())) == 1


def test_a_failure_leaves_nothing_behind(settings, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.Pipeline, "write_train", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(settings, 512)
    assert list(Path(settings.cache).iterdir()) == []


def test_blended_sources_keep_their_weights(settings, tmp_path):
    other = write(tmp_path / "other.jsonl", [text(0), *(text(seed) for seed in range(100, 130))])
    sources = [Source(path=settings.source, weight=3.0), Source(path=other)]
    prepared = prepare.prepare(settings.model_copy(update={"source": sources}), 512)
    assert [weight for _, weight in prepared.train] == [3.0, 1.0]
    assert prepared.manifest.duplicates == 1  # across sources
    second = train_texts(prepared)[len(prepared.train[0][0]) :]
    assert second
    assert set(second) <= {text(seed) for seed in range(100, 130)}
    copy = [settings.source, shutil.copy(settings.source, tmp_path / "copy.jsonl")]
    sources = [Source(path=str(path)) for path in copy]
    with pytest.raises(ValueError, match=r"copy.jsonl has no train text that other sources do not"):
        prepare.prepare(settings.model_copy(update={"source": sources}), 512)


def test_supervised_pairs(tmp_path):
    pairs = [(f"{text(n, 2)} {n}?", f"answer {n}") for n in range(60)]
    pairs += [(source, target + " again") for source, target in pairs[:20]]
    lines = [json.dumps({"input": a, "target": b}) + "\n" for a, b in [*pairs, pairs[0]]]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    data = Data(source=str(tmp_path / "pairs.jsonl"), cache=str(tmp_path / "cache"), sentinels=0)
    prepared = prepare.prepare(data, 512)
    assert prepared.supervised
    [(dataset, _)] = prepared.train
    tokens = [dataset[i] for i in range(len(dataset))]
    assert all(t[-1] == prepared.tokenizer.vocabulary.eos for t in tokens)
    read = [prepared.tokenizer.decode(t) for t in tokens]
    train = list(zip(read[::2], read[1::2], strict=True))
    assert sorted(train + prepared.heldout_pairs) == sorted(pairs)
    assert not {a for a, _ in train} & {a for a, _ in prepared.heldout_pairs}
    assert prepared.heldout == [f"{a}\n{b}" for a, b in prepared.heldout_pairs] != []
    assert prepared.manifest.duplicates == 1
    assert np.diff(dataset.document_index).tolist() == [2] * len(train)


def test_a_tokenized_source(settings, tmp_path):
    made = prepare.prepare(settings, 512)
    eos = made.tokenizer.vocabulary.eos
    for name, last in (("tokens", eos), ("foreign", made.tokenizer.base_size + len(SPECIALS))):
        with writing_dataset(tmp_path / name) as writer:
            for seed in range(5):
                writer.add([*made.tokenizer.encode(text(seed)), last])
                writer.end_document()
    update = {"source": str(tmp_path / "tokens"), "tokenizer": made.tokenizer.path}
    data = settings.model_copy(update=update)
    prepared = prepare.prepare(data, 512)
    assert prepared.heldout == []
    assert prepared.train[0][0].path == str(tmp_path / "tokens")
    assert prepared.manifest.train_tokens == IndexedDataset(tmp_path / "tokens").tokens
    assert prepared.tokenizer.fingerprint == made.tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"is tokenized already: set data.tokenizer"):
        prepare.prepare(data.model_copy(update={"tokenizer": None}), 512)
    with pytest.raises(ValueError, match=r"holds token \d+, but the tokenizer has \d+ pieces"):
        prepare.prepare(data.model_copy(update={"source": str(tmp_path / "foreign")}), 512)
    mixed = [Source(path=str(tmp_path / "tokens")), Source(path=settings.source)]
    with pytest.raises(ValueError, match="data.source mixes indexed and text sources"):
        prepare.prepare(data.model_copy(update={"source": mixed}), 512)
    (tmp_path / "tokens.bin").unlink()
    data = data.model_copy(update={"source": str(tmp_path / "tokens.idx")})
    with pytest.raises(ValueError, match=r"tokens.bin is missing"):
        prepare.prepare(data, 512)


def test_a_given_tokenizer(settings, tmp_path):
    path = tmp_path / "t.model"
    size = train_sentencepiece([text(1), text(2)], 350, 10, path).base_size + len(SPECIALS) + 10
    data = settings.model_copy(update={"tokenizer": str(path)})
    prepared = prepare.prepare(data, 512)
    assert prepared.tokenizer.vocabulary.size == 512
    assert prepared.tokenizer.fingerprint == Tokenizer(path, 10, 512).fingerprint
    with pytest.raises(ValueError, match=f"make {size} ids: raise model.vocabulary_size from 300"):
        prepare.prepare(data, 300)
    with pytest.raises(ValueError, match="tokenizer file nowhere does not exist"):
        prepare.prepare(settings.model_copy(update={"tokenizer": "nowhere"}), 512)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "holds no text"),
        (["  \n"], "holds no text"),
        (["a few words"], "holds only 11 bytes of text: at least 1000 are needed"),
        ([text(0, 40)], r"too few documents \(1\) to hold out 10.00% of its text: add documents"),
    ],
)
def test_too_little_text(settings, tmp_path, texts, said):
    source = write(tmp_path / "few.jsonl", texts)
    with pytest.raises(ValueError, match=said):
        prepare.prepare(settings.model_copy(update={"source": source}), 512)
    assert list(Path(settings.cache).iterdir()) == []


def test_other_mistakes_are_one_sentence(settings, tmp_path):
    with pytest.raises(ValueError, match="vocabulary too small for the sentinels"):
        prepare.prepare(settings, 100)
    with pytest.raises(ValueError, match="data.source is an empty list"):
        prepare.prepare(settings.model_copy(update={"source": []}), 512)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache .* cannot be written"):
        prepare.prepare(settings.model_copy(update={"cache": str(tmp_path / "file" / "x")}), 512)
    data = settings.model_copy(update={"kind": "supervised", "objective": "supervised"})
    with pytest.raises(ValueError, match="line 1: no field 'input'"):
        prepare.prepare(data, 512)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (['{"inputs": "a", "targets": "b"}'], "line 1: no field 'input' .*texts input and target"),
        (['{"input": "a"}'], "line 1: no field 'target'"),
        (['{"input": "a", "target": "b"}', '{"text": "c"}'], "line 2: no field 'input'"),
        (['{"text": "c"}', '{"input": "a", "target": "b"}'], "supervised cannot train on text"),
    ],
)
def test_records_that_supervised_cannot_take_are_told_of_input_and_target(
    settings, tmp_path, records, said
):
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(records * 20) + "\n")
    data = settings.model_copy(update={"source": str(source), "objective": "supervised"})
    with pytest.raises(ValueError, match=said):
        prepare.prepare(data, 512)


def test_the_embedded_corpus_holds_out_a_tenth(tmp_path):
    prepared = prepare.prepare(Data(cache=str(tmp_path)), 2048)
    m = prepared.manifest
    assert m.heldout_bytes / (m.heldout_bytes + m.train_bytes) >= 0.1
    assert prepared.tokenizer.vocabulary.size == 2048
    assert m.train_tokens > 500_000
    train = set(corpus.documents("embedded")) - set(prepared.heldout)
    paragraphs = {key for document in train_texts(prepared) for key in split.paragraphs(document)}
    for document in prepared.heldout:
        assert paragraphs.isdisjoint(split.paragraphs(document))
    assert train
