"""Hugging Face's own models are the oracle: same weights, same logits."""

import pytest
import torch

from megaarch import interchange
from megaarch.model import Transformer
from tests.interchange.inputs import inputs_and_call
from tests.interchange.models import MODELS, V, bart, gpt2, scattered

pytestmark = pytest.mark.slow


@pytest.fixture(params=MODELS)
def theirs(request):
    return scattered(request.param)


def converted(theirs):
    weights, config = interchange.settle(theirs.state_dict(), theirs.config.to_dict())
    model = interchange.settings_from(config)
    return model, interchange.from_hf(weights, model, config["model_type"])


@torch.no_grad()
def test_same_logits(theirs):
    model, weights = converted(theirs)
    ours = Transformer(model).eval().double()
    ours.load_state_dict(weights)  # strict: every name has its tensor
    our_batch, their_arguments = inputs_and_call(theirs)
    expected = theirs.double()(**their_arguments).logits
    assert expected.std() > 0.1
    # Llama and T5 compute norms, T5 its softmax too, in fp32 whatever the model's type
    within = 1e-5 if theirs.config.model_type in ("llama", "t5") else 1e-12
    found, largest = ours.logits(our_batch), expected.abs().max()
    torch.testing.assert_close(found / largest, expected / largest, atol=within, rtol=0)


def test_round_trip_is_exact(theirs):
    model, weights = converted(theirs)
    back = interchange.to_hf(weights, model, theirs.config.model_type)
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_faults_are_named():
    theirs = gpt2()
    model, state = interchange.settings_from(theirs.config.to_dict()), theirs.state_dict()
    with pytest.raises(ValueError, match=r"lack transformer\.ln_f\.weight"):
        interchange.from_hf(
            {k: v for k, v in state.items() if k != "transformer.ln_f.weight"}, model, "gpt2"
        )
    with pytest.raises(ValueError, match=r"no place .*extra\.weight"):
        interchange.from_hf(state | {"extra.weight": torch.zeros(1)}, model, "gpt2")
    with pytest.raises(ValueError, match=r"\[25, 24\] of positions"):
        table = {"transformer.wpe.weight": torch.zeros(25, 24)}
        interchange.from_hf(state | table, model, "gpt2")
    for rows in (V - 1, V + 1):  # padding hides neither
        table = {
            name: torch.zeros(rows, 24) for name in ("transformer.wte.weight", "lm_head.weight")
        }
        with pytest.raises(
            ValueError, match=f"wte.weight .*it has {rows} rows and vocab_size is {V}"
        ):
            interchange.from_hf(state | table, model, "gpt2")
    with pytest.raises(ValueError, match=r"c_attn\.weight \[24, 70\] does not make"):
        wrong = {"transformer.h.0.attn.c_attn.weight": torch.zeros(24, 70)}
        interchange.from_hf(state | wrong, model, "gpt2")
    with pytest.raises(ValueError, match="model_type 'mamba'"):
        interchange.settings_from({"model_type": "mamba"})
    with pytest.raises(ValueError, match="scale_embedding"):
        interchange.settings_from(bart().config.to_dict() | {"scale_embedding": True})
