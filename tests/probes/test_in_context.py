"""Similarities of in-context learning and finetuning, written a second time from Dai et al.'s definitions."""

import copy
import json

import numpy as np
import pytest
import torch

from megaarch.errors import UserError
from megaarch.ingest.tasks.task import Task
from megaarch.model.initialize import initialize
from megaarch.model.transformer import Transformer
from megaarch.probes import in_context
from megaarch.probes.catalogue import Options
from megaarch.probes.in_context import InContext
from megaarch.probes.probed_model import Subject

PRESETS = ["gpt", "prefix_lm", "t5", "ul2", "glm"]


@pytest.fixture
def task(tmp_path):
    def items(start, number):
        found = [{"i": i, "word": ["even", "odd"][i % 2]} for i in range(start, start + number)]
        return "\n".join(map(json.dumps, found))

    (tmp_path / "train.jsonl").write_text(items(0, 12))
    (tmp_path / "test.jsonl").write_text(items(20, 6))
    wording = {"name": "plain", "prompt": "{{ i }} is ||| {{ word }}"}
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    path = tmp_path / "parity.task.yaml"
    path.write_text(json.dumps({"summary": "odd?", "data": data, "wordings": [wording]}))
    return Task(path)


def model_of(settings, seed=0):
    from megaarch.config.catalogue import position_axes

    model = Transformer(settings.model, position_axes=position_axes(settings.data.objective))
    initialize(model, seed)
    return model.double().eval().requires_grad_(False)


@pytest.fixture
def made(tiny, prepared, task):
    """made(preset) -> subject, prompts."""

    def make(preset, **more):
        more = {"model__sequence_length": 128, "model__initial_deviation": 0.3} | more
        settings = tiny(preset, **more)
        subject = Subject(preset, model_of(settings), settings, prepared.tokenizer, documents=[])
        return subject, in_context.prompts_of(task, subject, queries=4, shots=3)

    return make


def batches(made, preset, **more):
    subject, prompts = made(preset, **more)
    asked, answer = prompts.queries[0]
    alone = in_context.batch_of(subject, asked, answer)
    behind = in_context.batch_of(subject, np.concatenate([prompts.before, asked]), answer)
    demonstrations = [in_context.batch_of(subject, *each) for each in prompts.demonstrations]
    return subject.model, alone, behind, demonstrations, len(asked)


def dense_attention(layer, x, memory, seen, settings):
    """Output of attention behind its projection, [S, D], and scores [H, S, keys], from the weights."""
    heads, size = settings.heads, settings.hidden_size // settings.heads
    groups = settings.kv_heads or heads
    each = heads // groups
    if memory is None:
        qkv = (x @ layer.attention.qkv.weight.T).view(len(x), groups, each + 2, size)
        q, k, v = (
            qkv[:, :, :each].reshape(len(x), heads, size),
            qkv[:, :, each],
            qkv[:, :, each + 1],
        )
        output = layer.attention.output.weight
    else:
        q = (x @ layer.cross_attention.q.weight.T).view(len(x), heads, size)
        kv = (memory @ layer.cross_attention.kv.weight.T).view(len(memory), groups, 2, size)
        k, v = kv[:, :, 0], kv[:, :, 1]
        output = layer.cross_attention.output.weight
    scores = torch.stack([q[:, h] @ k[:, h // each].T / size**0.5 for h in range(heads)])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    mixed = torch.cat([weights[h] @ v[:, h // each] for h in range(heads)], 1)
    return mixed @ output.T, scores


def decoder_by_hand(model, batch):
    """The reading of each layer of a decoder without positions, at the last row of the prompt."""
    stream, found = batch.streams[-1], []
    seen = torch.from_numpy(stream.parts.dense()[0])
    x = model.embed(len(model.stacks) - 1, batch)[0]
    memory = None
    if len(model.stacks) > 1:
        context = model.context(0, batch)
        memory = model.to_memory(
            model.run_layers(model.embed(0, batch), context, model.stacks[0].layers)
        )[0]
    row = int(batch.target_index[0][batch.target_weights[0] > 0][0])
    for index in model.stacks[-1].layers:
        layer = model.layers[str(index)]
        own, scores = dense_attention(layer, layer.attention_norm(x), None, seen, model.settings)
        x = x + own
        if memory is not None:
            crossed = torch.from_numpy(stream.cross.dense()[0])
            normed = layer.cross_attention_norm(x)
            own, scores = dense_attention(layer, normed, memory, crossed, model.settings)
            x = x + own
        keys = (seen if memory is None else crossed)[row]
        found.append(((own[row] / own[row].norm()).numpy(), scores[:, row][:, keys].numpy()))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    return found


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("preset", ["gpt", "prefix_lm", "ul2"])
def test_similarities_are_those_of_the_definition(preset, made):
    model, alone, behind, demonstrations, _ = batches(made, preset, model__position_encoding="none")
    tuned = in_context.finetuned(model, demonstrations, 0.05)
    found = in_context.compared(model, tuned, alone, behind, np.random.default_rng(0))
    with torch.no_grad():
        zero, context, after = (
            decoder_by_hand(*each) for each in ((model, alone), (model, behind), (tuned, alone))
        )
    keys = in_context.shared_keys(alone, behind)
    for i, ((h_z, m_z), (h_c, m_c), (h_f, m_f)) in enumerate(zip(zero, context, after)):
        aou = cosine(h_c - h_z, h_f - h_z)
        maps = [[cosine(c[-keys:], m[-keys:]) for c, m in zip(m_c, other)] for other in (m_f, m_z)]
        wanted = [aou, *(np.mean(each) for each in maps)]
        np.testing.assert_allclose(found[i, [0, 2, 3]], wanted, atol=1e-9)


def test_scores_hold_the_relative_bias(made):
    model, alone, *_ = batches(made, "gpt", model__position_encoding="relative")
    with torch.no_grad():
        model.relative_bias["decoder"].normal_(generator=torch.Generator().manual_seed(0))
    row, keys = in_context.read_off(alone)
    found = in_context.readings(model, alone)[0].scores
    with torch.no_grad():
        x = model.layers["0"].attention_norm(model.embed(0, alone)[0])
        seen = torch.ones(len(x), len(x), dtype=torch.bool)
        _, scores = dense_attention(model.layers["0"], x, None, seen, model.settings)
        bias = model.relative_bias["decoder"][row - torch.from_numpy(keys)]  # distances below 16
    np.testing.assert_allclose(found, scores[:, row][:, keys] + bias.T, atol=1e-9)


def test_the_keys_compared_are_those_of_the_query(made):
    for preset, more in (("gpt", 0), ("prefix_lm", 0), ("ul2", 1), ("glm", 2)):  # eos; [gMASK] sop
        _, alone, behind, _, asked = batches(made, preset)
        assert in_context.shared_keys(alone, behind) == asked + more


@pytest.mark.parametrize("preset", ["gpt", "t5"])
def test_finetuning_moves_keys_and_values_alone_a_step_a_demonstration(preset, made):
    model, _, _, demonstrations, _ = batches(made, preset)
    before = copy.deepcopy(model.state_dict())
    found = in_context.finetuned(model, demonstrations[:2], 0.1).state_dict()
    wanted = copy.deepcopy(model)
    size = wanted.settings.hidden_size // wanted.settings.heads
    each = wanted.settings.heads // (wanted.settings.kv_heads or wanted.settings.heads)
    for batch in demonstrations[:2]:
        wanted.requires_grad_(True)
        logits = wanted.logits(batch)[0][batch.target_index[0]].log_softmax(-1)
        weights = batch.target_weights[0]
        nll = -logits.gather(1, batch.target_tokens[0][:, None])[:, 0]
        gradients = torch.autograd.grad(
            (nll * weights).sum() / weights.sum(), wanted.parameters(), allow_unused=True
        )
        wanted.requires_grad_(False)
        for (name, parameter), gradient in zip(wanted.named_parameters(), gradients, strict=True):
            if name.endswith("attention.qkv.weight"):
                blocks = parameter.view(-1, each + 2, size, parameter.shape[1])
                blocks[:, each:] -= 0.1 * gradient.view_as(blocks)[:, each:]
            elif name.endswith("cross_attention.kv.weight"):
                parameter -= 0.1 * gradient
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved
    assert all(name.endswith(("qkv.weight", "kv.weight")) for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_change_there_is_no_direction_to_compare(made):
    model, alone, behind, *_ = batches(made, "gpt")
    found = in_context.compared(model, model, alone, behind, np.random.default_rng(0))
    assert np.isnan(found[:, 0]).all()
    np.testing.assert_array_equal(found[:, 2], found[:, 3])
    assert not np.isnan(found[:, 1]).any()
    found = in_context.compared(model, model, alone, alone, np.random.default_rng(0))
    np.testing.assert_allclose(found[:, 3], 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_architecture_is_compared_and_left_as_it_is(preset, made, task):
    subject, _ = made(preset)
    model = subject.model
    before = copy.deepcopy(model.state_dict())
    attends = [layer.attention.attend for layer in model.layers.values()]
    found = in_context.similarities(subject, [task], queries=3, shots=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attends == [layer.attention.attend for layer in model.layers.values()]
    assert found.attention == ("cross" if preset in ("t5", "ul2") else "self")
    assert len(found.layers) == 2 and found.tasks == ["parity"]
    for similarity in (*found.layers.values(), found.mean):
        for name in type(similarity).model_fields:
            estimate = getattr(similarity, name)
            if preset == "t5" and name.startswith("sim_am"):  # spans are cut out of a longer prompt
                assert estimate.value is None  # elsewhere, so that no keys are the same
            else:
                assert estimate.items == 3 and abs(estimate.value) <= 1 + 1e-12
    again = in_context.similarities(subject, [task], queries=3, shots=2)
    assert again == found == InContext.model_validate_json(found.model_dump_json())


def test_a_gaussian_change_points_nowhere(made, task):
    subject, _ = made("gpt")
    found = [
        in_context.similarities(subject, [task], queries=6, seed=seed).mean for seed in range(5)
    ]
    random = [similarity.sim_aou_random.value for similarity in found]
    assert abs(np.mean(random)) < 0.1


def test_rows_without_room_for_a_demonstration_are_refused(made, task):
    subject, _ = made("gpt", model__sequence_length=16)
    with pytest.raises(UserError, match=r"model\.sequence_length: no task"):
        in_context.similarities(subject, [task])


def test_the_probe_asks_the_tasks_that_it_is_given(made, task):
    subject, _ = made("gpt")
    found = in_context.measure(subject, Options(rows=4, tasks=(str(task.path),)))
    assert found == in_context.similarities(subject, [task], queries=4)
    with pytest.raises(UserError, match="--tasks"):
        in_context.measure(subject, Options())
