"""Rows: every token of an epoch is read once, whatever the mixture; a sample is a function of its
index; epochs differ."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from megaarch import config
from megaarch.config import catalogue
from megaarch.data.conditional_forms import continuation
from megaarch.data.dataset import STRIDE, Rows
from megaarch.data.document_rows import ORDER
from megaarch.data.example import generator
from megaarch.data.feature_converters import converter_of
from megaarch.data.loader import Steps
from megaarch.ingest.prepare import prepare
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
    shares = rows.blend.share
    for task, share in zip(rows.tasks, shares, strict=True):
        assert abs(task.per_epoch - rows.per_epoch * share) <= 1.5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stream_looks_ahead_iff_the_catalogue_says_so(preset, raw, prepared):
    steps = Steps(rows_of(raw, prepared, preset), global_batch_size=16, micro_batch_size=16)
    says = catalogue.ARCHITECTURES[catalogue.PRESETS[preset].architecture].looks_ahead
    for stream, looks_ahead in zip(steps[0][0].streams, says, strict=True):
        place = stream.positions[:, :, 0].numpy()
        later = place[:, None, :] > place[:, :, None]
        assert bool((stream.parts.dense() & later).any()) == looks_ahead


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


SUPERVISED = [a.name for a in catalogue.ARCHITECTURES.values() if "supervised" in a.objectives]


def rows_of_pairs(raw, tmp_path, architecture, lines, **given):
    """Rows of these (input, target) pairs, and what they were prepared to. given: settings, with
    __ for the dot."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"input": a, "target": b}) + "\n" for a, b in lines))
    mine = copy.deepcopy(raw)
    mine["data"] |= {"source": str(path), "objective": "supervised"}
    mine["model"] |= {"preset": None, "architecture": architecture}
    for name, value in given.items():
        config.set_path(mine, name.replace("__", "."), value)
    settings = config.resolve(mine)
    pairs = prepare(settings.data, settings.model.vocabulary_size)
    return Rows(settings.model, settings.data, pairs, 0), pairs


def same(one, other):
    """Whether two converted examples are one and the same."""
    streams = zip(one.streams, other.streams, strict=True)
    return (
        all(
            np.array_equal(a.tokens, b.tokens)
            and np.array_equal(a.positions, b.positions)
            and (a.parts, a.cross_parts) == (b.parts, b.cross_parts)
            for a, b in streams
        )
        and np.array_equal(one.target_index, other.target_index)
        and np.array_equal(one.target_tokens, other.target_tokens)
        and np.array_equal(one.target_weights, other.target_weights)
    )


@pytest.mark.parametrize("architecture", SUPERVISED)
def test_a_pair_is_scored_in_the_form_in_which_it_was_trained(raw, tmp_path, architecture):
    lines = [(f"what is {i}", f"it is {i}.") for i in range(60)]
    rows, prepared = rows_of_pairs(raw, tmp_path, architecture, lines)
    trained = [example for i in range(int(rows.per_epoch)) for example in rows[i]]
    ((dataset, _),) = prepared.train
    eos = prepared.tokenizer.vocabulary.eos
    for pair in range(len(dataset) // 2):
        question, answer = dataset[2 * pair], dataset[2 * pair + 1]
        assert question[-1] == answer[-1] == eos
        (scored,) = continuation("supervised", architecture, question[:-1], answer, rows.vocabulary)
        row = converter_of(architecture)(scored, rows.vocabulary)
        assert sum(same(row, example) for example in trained) == 1


def test_packed_pairs_keep_every_pair_once_an_epoch(raw, tmp_path):
    lines = [(f"number {i}", f"is {i}.") for i in range(300)]
    for architecture in ("prefix_decoder", "encoder_decoder"):
        rows, pairs = rows_of_pairs(raw, tmp_path, architecture, lines)
        seen = [len(rows[i]) for i in range(int(rows.per_epoch))]
        assert sum(seen) == len(pairs.train[0][0]) // 2
        assert max(seen) > 1


def pair(rows, i):
    """Pair i of the first source as its rows hold it: (input, target) with their eos."""
    example = rows.tasks[0]._example(i)
    inputs = example.streams[0].tokens
    if len(example.streams) == 1:  # ^ input target, without the target's eos
        inputs = inputs[1 : len(inputs) - len(example.target_tokens) + 1]
    return inputs, example.target_tokens


LIMITS = {
    "causal_decoder": {"model__sequence_length": 40},
    "prefix_decoder": {"model__sequence_length": 40},
    "encoder_decoder": {"model__sequence_length": 32, "model__target_length": 8},
}


@pytest.mark.parametrize("architecture", SUPERVISED)
def test_long_pairs_are_cut_alike_and_end_in_eos_in_every_architecture(raw, tmp_path, architecture):
    """At inputs of 32 and targets of 8: of Wang et al.'s 1024 and 256, a 32nd."""
    lines = [
        *((f"{'so it is ' * 30}{i}", f"yes {i}") for i in range(20)),
        *((f"what is {i}?", "on and on " * 10 + str(i)) for i in range(20)),
        *((f"is it {i}?", f"yes {i}") for i in range(60)),
    ]
    limits = {"data__max_input_length": 32, "data__max_target_length": 8} | LIMITS[architecture]
    rows, prepared = rows_of_pairs(raw, tmp_path, architecture, lines, **limits)
    ((dataset, _),) = prepared.train
    eos, cut = prepared.tokenizer.vocabulary.eos, 0
    assert rows.examples == len(dataset) // 2
    for i in range(rows.examples):
        sides = [dataset[2 * i], dataset[2 * i + 1]]
        cut += len(sides[0]) > 32 or len(sides[1]) > 8
        for side, found, limit in zip(sides, pair(rows, i), (32, 8), strict=True):
            assert found.tolist() == [*side[:-1][: limit - 1], eos]
    assert rows.truncated == cut > 20
    assert f"{cut} of {rows.examples} {{input, target}} pairs" in rows.truncation


def test_without_limits_a_row_is_the_limit_and_nothing_is_said_where_all_fit(raw, tmp_path):
    lines = [(f"is it {i}?", f"yes {i}") for i in range(90)]
    rows, _ = rows_of_pairs(raw, tmp_path, "causal_decoder", lines)
    assert (rows.truncated, rows.truncation) == (0, None) and rows.examples > 40
    lines = [(f"{'so it is ' * 30}{i}", f"{'and so on ' * 30}{i}") for i in range(60)]
    rows, prepared = rows_of_pairs(raw, tmp_path, "causal_decoder", lines)
    inputs, target = pair(rows, 0)
    assert (len(inputs), len(target)) == (24, 24)
    assert inputs[-1] == target[-1] == prepared.tokenizer.vocabulary.eos
    assert rows.truncated == rows.examples
    with pytest.raises(ValueError, match="rows of 1 tokens are too short for supervised"):
        rows_of_pairs(raw, tmp_path, "causal_decoder", lines, model__sequence_length=1)


def test_components_of_a_mixture_share_the_order_of_their_documents(raw, prepared):
    """A dataset of a thousand million documents has orders of gigabytes, in every process. What a component
    draws for its own rows follows the documents' draw, whichever component asks first."""
    tasks = rows_of(raw, prepared, "unilm").tasks
    assert len(tasks) > 2 and len({id(task.documents) for task in tasks}) == 1
    documents, before, _ = tasks[0].documents.epoch(1)
    lengths = tasks[0].lengths[documents]
    assert documents.dtype == np.uint32
    assert (before == (np.cumsum(lengths) - lengths)[::STRIDE]).all()
    orders = [task._order(1) for task in reversed(tasks)][::-1]
    for task, order in zip(tasks, orders, strict=True):
        rng = generator(tasks[0].documents.seed ^ ORDER, 1)
        assert (rng.permutation(len(documents)) == documents).all()
        assert (rng.permutation(task.per_epoch) == order).all()


def test_segments_of_a_row_have_noise_of_their_own_and_mirrored_ones_share_their_split(
    raw, prepared
):
    splits = [
        [len(e.streams[0].tokens) for e in rows_of(raw, prepared, "t5", objective="prefix_lm")[i]]
        for i in range(8)
    ]
    assert all(len(lengths) == 2 for lengths in splits)
    assert len({sum(lengths) for lengths in splits}) == 1  # s and raw - s

    rows = rows_of(raw, prepared, "ul2")
    task = next(t for t in rows.tasks if len(t.plan.objectives) == 2)
    generators = []

    class Noise:
        """An objective that writes down what its generator draws."""

        def __call__(self, tokens, vocabulary, rng):
            generators.append(rng.random(4).tolist())
            return task_objective(tokens, vocabulary, rng)

    task_objective = task.plan.objectives[0]
    task.plan = replace(task.plan, objectives=(Noise(), Noise()))
    task.row(0, (0, 0))
    first, second = generators
    assert first != second
