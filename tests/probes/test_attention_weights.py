import numpy as np
import pytest
import torch

from megaarch.attention.mask import Parts, causal, full
from megaarch.probes import hidden_states
from megaarch.probes.attention_weights import causal_mask, full_mask, recorded_attention
from megaarch.probes.hidden_states import states_by_stack
from tests.conftest import PRESETS


def of_subject(subject, rows=2, length=20):
    return subject.batch(subject.rows(length, rows).tokens, length // 2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("encoding", [None, "relative", "none"])
def test_recorded_weights_times_values_are_the_layers_output(preset, encoding, subject):
    """With grouped keys, biases and cross-attention; the output is that of the kernel that runs by itself."""
    if preset == "glm" and encoding == "relative":
        pytest.skip("two axes have no relative bias")
    given = {"model__position_encoding": encoding} if encoding else {}
    subject = subject(preset, **given)
    batch = of_subject(subject)
    calls = {}

    def watched(module):
        attend = module.attend

        def call(q, k, v, *args, **options):
            calls[module] = v, attend(q, k, v, *args, **options)
            return calls[module][1]

        return call

    modules = set()
    for layer in subject.model.layers.values():
        modules |= {layer.attention, layer.cross_attention} - {None}
    for module in modules:
        module.attend = watched(module)
    wanted = subject.model.run(batch)[-1]
    with recorded_attention(subject.model) as weights:
        assert calls.keys() == modules
        made = subject.model.run(batch)[-1]
    for module, (v, out) in calls.items():
        matrices = weights[module]
        heads = matrices.shape[1] // v.shape[2]
        values = v.repeat_interleave(heads, dim=2)
        mine = torch.einsum("bhqk,bkhd->bqhd", matrices, values)
        assert float((mine - out).abs().max()) < 1e-10
    assert float((made - wanted).abs().max()) < 1e-10
    calls.clear()
    subject.model.run(batch)
    assert calls.keys() == modules, "the model has its own attention again"


@pytest.mark.parametrize(
    ("row", "under_causal", "under_full"),
    [
        ([causal(0, 5, 0, 5)], np.tril(np.ones((5, 5))), np.ones((5, 5))),
        ([full(0, 5, 0, 5)], np.tril(np.ones((5, 5))), np.ones((5, 5))),
        ([full(0, 2, 0, 2), causal(2, 5, 0, 5)], np.tril(np.ones((5, 5))), np.ones((5, 5))),
    ],
)
def test_other_masks(row, under_causal, under_full):
    """A row of five tokens, and one that is shorter by padding."""
    parts = Parts.of([row, [full(0, 3, 0, 3)]], 5, 5)
    assert (causal_mask(parts).dense()[0] == under_causal).all()
    assert (full_mask(parts).dense()[0] == under_full).all()
    assert not full_mask(parts).dense()[1, 3:].any()
    assert not full_mask(parts).dense()[1, :, 3:].any()


def test_query_tokens_of_two_streams_stay_no_keys():
    parts = Parts.of([[full(0, 2, 0, 2), causal(2, 4, 0, 4), causal(4, 6, 0, 3)]], 6, 6)
    assert full_mask(parts).dense()[0, :, :4].all()
    assert not full_mask(parts).dense()[0, :, 4:].any()


def test_weights_under_another_mask(subject):
    """A causal model's weights, run under the full mask, are those of an encoder."""
    decoder = subject("gpt", model__position_encoding="none")
    batch = of_subject(decoder)
    with recorded_attention(decoder.model, full_mask) as weights:
        decoder.model.run(batch)
    for matrices in weights.values():
        assert (matrices > 0).all()
    with recorded_attention(decoder.model, causal_mask) as weights:
        decoder.model.run(batch)
    for matrices in weights.values():
        assert (matrices.triu(1) == 0).all()


@pytest.mark.parametrize("preset", ["gpt", "t5"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_switched_off(preset, position, subject):
    """Without skip connections a layer is its branches alone."""
    subject = subject(preset, model__normalization_position=position)
    model, batch = subject.model, of_subject(subject)
    states, *_ = states_by_stack(model, batch, skip=False, feed_forward=False)
    first = model.layers["0"]
    x, context = model.embed(0, batch), model.context(0, batch)
    alone = (
        first.attention(first.attention_norm(x), context)
        if position == "pre"
        else first.attention_norm(first.attention(x, context))
    )
    torch.testing.assert_close(states[0], x, rtol=0, atol=0)
    torch.testing.assert_close(states[1], alone)


@pytest.mark.parametrize("preset", ["gpt", "t5"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_states_are_those_of_the_models_own_pass(preset, position, subject):
    """With all on, and with all written out layer by layer."""
    subject = subject(preset, model__normalization_position=position)
    model, batch = subject.model, of_subject(subject)
    wanted = model.run(batch)[-1]
    *_, states = states_by_stack(model, batch)
    torch.testing.assert_close(states[-1], wanted, rtol=0, atol=0)
    assert len(states) == 1 + len(model.stacks[-1].layers)
    context, memory = model.context(len(model.stacks) - 1, batch), None
    if len(model.stacks) > 1:
        memory = model.to_memory(next(states_by_stack(model, batch))[-1])
    for index, before, behind in zip(model.stacks[-1].layers, states, states[1:], strict=False):
        layer = model.layers[str(index)]
        whole = hidden_states._switched(layer, before, context, memory, True, True)
        torch.testing.assert_close(whole, behind, rtol=0, atol=0)
