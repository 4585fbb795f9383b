"""What tests of generation share: small models with scattered weights, and a batch of prompts for them."""

import numpy as np
import torch

from megaarch import config
from megaarch.config import catalogue
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.prompts import prompt
from megaarch.training.whole_model import build_model
from tests.conftest import PRESETS
from tests.data.toy_vocabulary import TEXT, toy_vocabulary

VOCABULARY = toy_vocabulary(20)
GENERATING = [preset for preset in PRESETS if preset != "bert"]
CHUNKED = ("gpt", "t5", "bart", "ul2")  # whose last stack's prompt is causal
LENGTHS = (5, 9, 1, 13)  # of the prompts


def made(preset, dtype=torch.float64, **options):
    """A model with scattered weights, so that logits are of the order of one, and its settings."""
    model = {
        "preset": preset,
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "kv_heads": 2,
        "feed_forward_size": 48,
    }
    model |= {"sequence_length": 64, "vocabulary_size": VOCABULARY.size} | options
    if catalogue.PRESETS[preset].architecture == "encoder_decoder":
        model["target_length"] = 64
    settings = config.resolve({"model": model})
    built = build_model(settings).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * 0.3)
    return built, settings


def started(model, settings, chunk=None):
    """A batch of prompts of unequal lengths, and these."""
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(TEXT, size=n) for n in LENGTHS]
    data, of = settings.data, settings.model
    prompts = [prompt(data.objective, of.architecture, p, VOCABULARY) for p in prefixes]
    axes = catalogue.position_axes(data.objective)
    layout = Layout(torch.device("cpu"), axes, VOCABULARY.pad)
    return Decoding(model, layout, prompts, chunk), prefixes
