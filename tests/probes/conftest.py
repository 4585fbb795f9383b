import pytest

from megaarch.config import catalogue
from megaarch.model.initialize import initialize
from megaarch.model.transformer import Transformer
from megaarch.probes.probed_model import Subject


@pytest.fixture
def subject(tiny, prepared):
    """subject(preset, **settings) -> a Subject with random weights, in fp64."""

    def make(preset="gpt", **given):
        settings = tiny(preset, **{"model__initial_deviation": 0.3, **given})
        axes = catalogue.position_axes(settings.data.objective)
        model = Transformer(settings.model, position_axes=axes)
        initialize(model, 0)
        model = model.double().eval().requires_grad_(False)
        return Subject(preset, model, settings, prepared.tokenizer, prepared.heldout)

    return make
