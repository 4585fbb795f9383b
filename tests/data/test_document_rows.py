"""Document masks: each example is of one document, every token of an epoch is used once, and what
stands in one row does not see each other."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.dataset import Rows
from megaarch.data.document_rows import SHORTEST, DocumentRows, Kind, cut, permutation
from megaarch.data.example import generator
from megaarch.data.loader import Steps
from megaarch.data.objectives.language_modelling import FullLM
from megaarch.ingest.prepare import prepare
from tests.conftest import PRESETS, made_up_text
from tests.data.mixtures import MIXTURES


@pytest.fixture(scope="module")
def short(raw, tmp_path_factory):
    """Data of 250 documents of 20 to 220 characters, most of them shorter than a row."""
    folder = tmp_path_factory.mktemp("short")
    texts = [made_up_text(i, 24)[: 20 + 7 * i % 200] for i in range(250)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"source": str(path), "cache": str(folder)}


@pytest.fixture
def rows_of(tiny, short):
    def make(preset, **given):
        data = {f"data__{name}": value for name, value in short.items()}
        mine = tiny(preset, **data, data__document_masks=True, **given)
        return Rows(mine.model, mine.data, prepare(mine.data, mine.model.vocabulary_size), 0)

    return make


def task_of(rows) -> DocumentRows:
    (task,) = rows.tasks
    return task


LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=40)
RAWS = st.lists(st.integers(2, 90), min_size=1, max_size=4)


def pieces_of(lengths, kinds, seed):
    """The documents, offsets, lengths and kinds of all pieces."""
    rng = generator(seed, 0)
    found = cut(np.array(lengths), permutation(rng, len(lengths)), kinds, rng.random())
    return map(np.concatenate, zip(*(vars(block).values() for block in found), strict=True))


@settings(max_examples=200)
@given(LENGTHS, RAWS, st.integers(0, 99))
def test_pieces_hold_every_token_of_every_document_once(lengths, raws, seed):
    kinds = [Kind(1.0, raw, FullLM()) for raw in raws]
    pieces = pieces_of(lengths, kinds, seed)
    read = [np.zeros(n, dtype=int) for n in lengths]
    shared = [np.zeros(n, dtype=bool) for n in lengths]  # an odd number makes no pairs
    for d, offset, n, k in zip(*pieces, strict=True):
        assert 0 < n <= raws[k] and offset + n <= lengths[d]
        assert n >= SHORTEST or lengths[d] == 1
        read[d][offset : offset + n] += 1
        shared[d][offset] |= raws[k] == 2
    for times, twice in zip(read, shared, strict=True):
        assert (times - twice <= 1).all() and (times >= 1).all()


@pytest.mark.parametrize("length", [3, 5, 64])
def test_rows_of_two_tokens_leave_no_token_out(length):
    _, offsets, lengths, _ = pieces_of([length], [Kind(1.0, 2, FullLM())], 0)
    assert (lengths == 2).all() and len(lengths) == -(-length // 2)
    assert {*offsets, *(offsets + 1)} == set(range(length))


def test_kinds_have_their_shares_of_long_texts_and_of_short_ones():
    kinds = [Kind(0.5, 40, FullLM()), Kind(0.3, 100, FullLM()), Kind(0.2, 64, FullLM())]
    for lengths in ([200_000], [5000] * 300, [30] * 5000, list(range(2, 300)) * 20):
        *_, kind = pieces_of(lengths, kinds, 0)
        found = np.bincount(kind, minlength=3) / len(kind)
        assert found == pytest.approx([0.5, 0.3, 0.2], abs=0.03), lengths[:3]


@pytest.mark.parametrize("preset", PRESETS)
def test_an_epoch_uses_every_token_once_and_an_example_is_of_one_document(
    preset, rows_of, monkeypatch
):
    rows = rows_of(preset)
    task = task_of(rows)
    dataset, eos = task.dataset, rows.vocabulary.eos
    read = [np.zeros(n, dtype=int) for n in dataset.lengths]
    honest, made, examples = type(dataset).get, [], 0

    def get(self, document, offset=0, length=None):
        read[document][offset : offset + length] += 1
        made.append(honest(self, document, offset, length))
        return made[-1]

    monkeypatch.setattr(type(dataset), "get", get)
    for i in range(task.per_epoch):
        examples += len(task.row(i, (0, i)))
    assert all((times == 1).all() for times in read)
    assert len(made) == examples > 1.5 * task.per_epoch
    assert all(eos not in text[:-1] for text in made)
    task.row(task.per_epoch, (0, 0))  # the next epoch reads again
    assert max(times.max() for times in read) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_examples_of_a_row_neither_see_nor_predict_each_other(preset, rows_of):
    rows = rows_of(preset)
    steps = Steps(rows, global_batch_size=32, micro_batch_size=32)
    (batch,) = steps[0]
    several = 0
    for b in range(32):
        examples = rows[b]
        several += len(examples) > 1
        owner = []
        for s, stream in enumerate(batch.streams):
            owner.append(np.full(stream.tokens.shape[1], -1))
            start = 0
            for e, example in enumerate(examples):
                end = start + len(example.streams[s].tokens)
                owner[s][start:end] = e
                assert (
                    stream.positions[b, start:end].numpy() == example.streams[s].positions
                ).all()
                start = end
            seen = stream.parts.dense()[b]
            assert not (seen & (owner[s][:, None] != owner[s][None, :])).any()
            if stream.cross:
                crossed = stream.cross.dense()[b]
                assert not (crossed & (owner[s][:, None] != owner[s - 1][None, :])).any()
        used = batch.target_weights[b] > 0
        wanted = np.concatenate([e.target_tokens[e.target_weights > 0] for e in examples])
        assert (batch.target_tokens[b][used].numpy() == wanted).all()
        of = np.repeat(range(len(examples)), [(e.target_weights > 0).sum() for e in examples])
        assert (owner[-1][batch.target_index[b][used].numpy()] == of).all()
    assert several > 8


@pytest.mark.parametrize("preset", PRESETS)
def test_little_of_a_row_is_padding(preset, rows_of):
    """Less than a tenth is padding beyond what the objective's bounds leave: BART's inputs, GLM's spans and
    UL2's decoder rows are shorter than theirs by up to a tenth."""
    rows = rows_of(preset)
    room = np.array(rows.shape.streams)
    taken = np.zeros(len(room))
    plan = task_of(rows)._epoch(0)
    for i in range(len(plan)):
        for item in plan.row(i):
            bound = task_of(rows)._size(int(item.kind[0]), int(item.length[0]), len(item.kind) == 2)
            taken += bound[:-1]
    filled = taken / (len(plan) * room)
    assert filled.max() > 0.93, filled


@pytest.mark.parametrize("preset", ("ul2", "unilm", "glm"))
def test_components_of_a_mixture_keep_their_shares(preset, rows_of):
    rows = rows_of(preset)
    task = task_of(rows)
    plan, found = task._epoch(0), {}
    for i in range(len(plan)):
        for item in plan.row(i):
            name = repr(task.kinds[int(item.kind[0])].objective)
            found[name] = found.get(name, 0) + len(item.kind)
    asked = {
        repr(c): weight for weight, c in MIXTURES[{"glm": "blank_infilling"}.get(preset, preset)]
    }
    total = sum(found.values())
    assert {name: n / total for name, n in found.items()} == pytest.approx(asked, abs=0.04)


def test_a_row_is_a_function_of_seed_and_index_and_epochs_differ(rows_of):
    a, b = rows_of("t5"), rows_of("t5")
    far = 3 * int(a.per_epoch) + 5
    for i in (far, 0, 7):
        for one, other in zip(a[i], b[i], strict=True):
            assert (one.target_tokens == other.target_tokens).all()
    assert a[0][0].target_tokens.tolist() != a[int(a.per_epoch)][0].target_tokens.tolist()


@pytest.mark.parametrize("preset", ["ul2", "glm"])
def test_an_epoch_is_the_same_whatever_was_read_before_it(preset, rows_of):
    """Only one epoch is kept, and another is planned anew when it is asked for again."""
    early, late = (task_of(rows_of(preset)) for _ in range(2))
    for epoch in (1, 2, 3):
        late._epoch(epoch)
    one, other = early._epoch(0), late._epoch(0)
    assert len(one) == len(other)
    for i in range(len(one)):
        for a, b in zip(one.row(i), other.row(i), strict=True):
            assert all(map(np.array_equal, vars(a).values(), vars(b).values()))


def test_two_examples_of_a_draw_fill_both_streams_together(rows_of):
    rows = rows_of("t5", data__objective="prefix_lm")
    filled = np.zeros(2)
    for i in range(int(rows.per_epoch)):
        filled += [sum(len(e.streams[s].tokens) for e in rows[i]) for s in (0, 1)]
    filled /= rows.per_epoch * np.array(rows.shape.streams)
    assert filled.min() > 0.9


def test_documents_of_a_single_token_are_left_out_and_counted(raw, tiny, short):
    """A tokenized source may hold such."""

    class Dataset:
        lengths = np.array([1, 30, 1, 2])

        def get(self, document, offset=0, length=None):
            return np.arange(offset, offset + length)

    settings = tiny("gpt", **{f"data__{k}": v for k, v in short.items()}, data__document_masks=True)
    prepared = prepare(settings.data, settings.model.vocabulary_size)

    class Prepared:
        supervised, train, tokenizer = False, [(Dataset(), 1.0)], prepared.tokenizer

    rows = Rows(settings.model, settings.data, Prepared, 0)
    assert sorted(len(e.target_tokens) for i in range(int(rows.per_epoch)) for e in rows[i]) == [
        2,
        30,
    ]
    assert rows.truncated_share == 0.5
    assert "2 of 4 documents" in rows.truncation
    Dataset.lengths = np.array([1, 1])
    with pytest.raises(ValueError, match="no document of the text has two tokens"):
        Rows(settings.model, settings.data, Prepared, 0)


def test_too_few_sentinels_for_the_longest_piece_show_at_once(rows_of):
    with pytest.raises(ValueError, match=r"raise data.sentinels"):
        rows_of("t5", data__sentinels=1)
