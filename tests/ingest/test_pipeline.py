"""Prepared data are the same, however many shards they are made of."""

import json

import pytest

from megaarch.config.schema import Data, Source
from megaarch.ingest import prepare, split
from megaarch.ingest.tokenizer import train_sentencepiece
from tests.ingest.documents import text, train_texts, write


def many_shards(monkeypatch):
    """Cuts the text into many shards."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 3000)


@pytest.mark.parametrize("given", [False, True])
def test_shards_change_nothing(given, tmp_path, monkeypatch):
    source = write(tmp_path / "text.jsonl", [text(seed) for seed in range(60)])
    settings = Data(source=source, cache=str(tmp_path / "cache"), sentinels=10)
    first = prepare.prepare(settings, 512)
    exclude = split.Exclusion.of([first.heldout[0], text(3), text(4).split("\n\n")[2]])
    other = write(tmp_path / "other.jsonl", [text(0), *(text(n) for n in range(100, 130))])
    sources = [Source(path=settings.source, weight=3.0), Source(path=other)]
    update = {"source": sources, "tokenizer": first.tokenizer.path if given else None}
    data = settings.model_copy(update=update)
    whole = prepare.prepare(data, 512, exclude=exclude)
    many_shards(monkeypatch)
    data = data.model_copy(update={"cache": str(tmp_path / "other-cache")})
    again = prepare.prepare(data, 512, exclude=exclude)
    assert again.manifest == whole.manifest
    assert again.heldout == whole.heldout
    assert train_texts(again) == train_texts(whole)
    m = again.manifest
    assert m.duplicates == 1 and m.excluded_documents > 0 and m.excluded_paragraphs > 0


@pytest.mark.parametrize("shards", [1, 9])
def test_pairs_of_one_input_are_train_where_they_are_much_of_the_text(
    shards, tmp_path, monkeypatch
):
    asked = next(
        q for q in map("who is {}?".format, range(999)) if split.place(split.digest(q)) < 0.05
    )
    large = [(asked, f"{text(n, 1)} {n}") for n in range(30)]
    pairs = [(f"{text(n, 1)} {n}?", f"answer {n}") for n in range(60)]
    lines = [json.dumps({"input": a, "target": b}) + "\n" for a, b in [*large, *pairs]]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    if shards > 1:
        many_shards(monkeypatch)
    file = tmp_path / "t.model"
    train_sentencepiece([text(1), text(2)], 350, 0, file)
    data = Data(source=str(tmp_path / "pairs.jsonl"), cache=str(tmp_path / "cache"), sentinels=0)
    prepared = prepare.prepare(data.model_copy(update={"tokenizer": str(file)}), 512)
    kept = train_texts(prepared)
    assert list(zip(kept[::2], kept[1::2], strict=True))[:30] == large
    assert sorted([*zip(kept[::2], kept[1::2], strict=True), *prepared.heldout_pairs]) == sorted(
        [*large, *pairs]
    )
    assert "stay in train, whatever their hash" in prepared.manifest.notes[0]
