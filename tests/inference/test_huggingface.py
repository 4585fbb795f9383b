"""Greedy tokens of converted random weights equal transformers' own, token by token, in a batch that it pads
on the left."""

import numpy as np
import pytest
import torch

from megaarch import interchange
from megaarch.data.example import SPECIALS, Vocabulary
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.prompts import prompt
from megaarch.interchange.hf_config import family_in
from megaarch.model import Transformer
from tests.tiny_transformers import build

pytestmark = pytest.mark.slow

V, NEW, LENGTHS = 150, 64, (9, 4, 6)
OBJECTIVES = {"llama": "full_lm", "gpt2": "full_lm", "t5": "span_corruption", "bart": "denoising"}
SPECIAL = {name: place for place, name in enumerate(SPECIALS)}


def theirs(name):
    torch.manual_seed(3)
    common = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = build(name, 128, **common)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # large beside the tokens' own embeddings, or they repeat
                table = "shared" in parameter_name or "embed_tokens" in parameter_name
                parameter.normal_(std=0.3 if table or name != "bart" else 1.0)
    return model.eval()


def ours(model):
    """Our model with their weights, and its settings."""
    tensors = {name: x.float() for name, x in model.state_dict().items()}
    tensors, config = interchange.settle(tensors, model.config.to_dict())
    family, settings = family_in(config), interchange.settings_from(config)
    weights = interchange.from_hf(tensors, settings, family)
    made = Transformer(settings).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights[name])
    return made, settings


def padded_left(rows):
    """Their tokens [B, S] and attention mask."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[width - len(ids) :] = torch.as_tensor(ids)
    mask = torch.stack([torch.arange(width) >= width - len(ids) for ids in rows]).long()
    return tokens, mask


@pytest.mark.parametrize("name", OBJECTIVES)
def test_greedy_tokens_equal_transformers(name):
    model = theirs(name)
    made, settings = ours(model)
    text = np.ones(V, dtype=bool)
    vocabulary = Vocabulary(V, 5, SPECIAL, text, text, text)
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(20, V - 5, size=n) for n in LENGTHS]
    prompts = [prompt(OBJECTIVES[name], settings.architecture, p, vocabulary) for p in prefixes]
    decoding = Decoding(made, Layout(torch.device("cpu"), 1, SPECIAL["pad"]), prompts)
    found = []
    with torch.no_grad():
        logits = decoding.start()
        while len(found) < NEW:
            found.append(logits.argmax(-1).numpy())
            logits = decoding.step(found[-1])

    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [p.stream.tokens for p in prompts]
    if prompts[0].encoder is None:
        tokens, mask = padded_left(rows)
        wanted = model.generate(tokens, attention_mask=mask, **options)[:, -NEW:]
    else:  # a decoder's forced tokens of unequal lengths: row by row, as its own padding is not masked
        wanted = []
        for p, row in zip(prompts, rows, strict=True):
            tokens, mask = padded_left([p.encoder.tokens])
            forced = torch.as_tensor(row)[None]
            out = model.generate(tokens, attention_mask=mask, decoder_input_ids=forced, **options)
            wanted.append(out[0, -NEW:])
        wanted = torch.stack(wanted)
    assert np.stack(found, 1).tolist() == wanted.tolist()
    assert len(set(np.stack(found).flatten().tolist())) > 10
