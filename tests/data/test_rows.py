"""Rows: every token of an epoch is read once, whatever the mixture; a sample is a function of its
index; epochs differ."""

import copy

import numpy as np
import pytest

from megaarch import config
from megaarch.data.rows import Rows
from tests.conftest import PRESETS


def rows_of(raw, prepared, preset, **data):
    mine = copy.deepcopy(raw)
    mine["model"]["preset"] = preset
    mine["data"] |= data
    settings = config.resolve(mine)
    return Rows(settings.model, settings.data, prepared, settings.training.seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_epoch_reads_no_token_twice_and_leaves_out_less_than_a_row_a_component(
    preset, raw, prepared, monkeypatch
):
    rows = rows_of(raw, prepared, preset)
    dataset = prepared.train[0][0]
    ends = np.cumsum(dataset.lengths)
    read = np.zeros(int(ends[-1]), dtype=int)
    honest = type(dataset).get

    def get(self, document, offset=0, length=None):
        start = int(ends[document] - dataset.lengths[document]) + offset
        read[start : start + length] += 1
        return honest(self, document, offset, length)

    monkeypatch.setattr(type(dataset), "get", get)
    for task in rows.tasks:
        for place in range(task.per_epoch):
            task.row(place, (0, place))
    assert read.max() == 1
    assert (read == 0).sum() <= sum(task.plan.tokens for task in rows.tasks)
    # all components come to the ends of their regions together
    shares = np.diff(rows.blend.cumulative)
    for task, share in zip(rows.tasks, shares, strict=True):
        assert abs(task.per_epoch - rows.per_epoch * share) <= 1.5


def test_a_row_is_a_function_of_seed_and_index_and_epochs_differ(raw, prepared):
    a, b = (rows_of(raw, prepared, "t5") for _ in range(2))
    far = 10 * int(a.per_epoch) + 3
    for i in (0, 7, far):
        (first,), (second,) = a[i], b[i]
        for x, y in zip(first.streams, second.streams, strict=True):
            assert (x.tokens == y.tokens).all()
    tokens = [tuple(a[i][0].target_tokens) for i in (3, 3 + int(a.per_epoch))]
    assert tokens[0] != tokens[1]


def test_pairs_under_another_objective_and_text_under_supervised_are_refused(
    raw, prepared, tmp_path
):
    from megaarch.data.prepare import prepare

    with pytest.raises(ValueError, match="supervised cannot train on text"):
        rows_of(raw, prepared, "t5", objective="supervised")
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(f'{{"input": "what is {i}", "target": "it is {i}."}}\n' for i in range(200))
    )
    mine = copy.deepcopy(raw)
    mine["data"]["source"] = str(path)
    settings = config.resolve(mine)
    pairs = prepare(settings.data, settings.model.vocabulary_size)
    with pytest.raises(ValueError, match="full_lm cannot train on {input, target} pairs"):
        Rows(settings.model, settings.data, pairs, 0)


def test_packed_pairs_keep_every_pair_once_an_epoch(raw, tmp_path):
    from megaarch.data.prepare import prepare

    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(f'{{"input": "number {i}", "target": "is {i}."}}\n' for i in range(300))
    )
    mine = copy.deepcopy(raw)
    mine["data"] |= {"source": str(path), "objective": "supervised"}
    for architecture in ("prefix_decoder", "encoder_decoder"):
        mine["model"] |= {"preset": None, "architecture": architecture}
        settings = config.resolve(mine)
        pairs = prepare(settings.data, settings.model.vocabulary_size)
        rows = Rows(settings.model, settings.data, pairs, 0)
        seen = [len(rows[i]) for i in range(int(rows.per_epoch))]
        assert sum(seen) == len(pairs.train[0][0]) // 2
        assert max(seen) > 1
