"""What a dry run says of disk: the checkpoints that stay, and what is in one."""

import pytest
import torch

from megaarch.model.transformer import Transformer
from megaarch.study.estimate import checkpoint_bytes, checkpoints
from megaarch.training import optimizer
from megaarch.training.trainer import Trainer


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("width", [32, 512])  # below and above where Adafactor factors
@pytest.mark.parametrize("preset", ["t5", "glm"])
def test_a_checkpoint_holds_the_weights_and_what_the_optimizer_keeps(name, preset, width, tiny):
    settings = tiny(preset, training__optimizer=name, model__hidden_size=width)
    model = Transformer(settings.model, position_axes=2 if preset == "glm" else 1)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    built = optimizer.build(model, settings.training)
    built.step()
    kept = [
        value
        for state in built.state.values()
        for key, value in state.items()
        if key != "step" and torch.is_tensor(value)
    ]
    held = sum(tensor.numel() * 4 for tensor in [*model.parameters(), *kept])
    assert checkpoint_bytes(settings) == held


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "stay"),
    [(0, 2, 0, 1), (2, 2, 0, 2), (2, 0, 0, 4), (2, 1, 4, 2), (20, 3, 0, 1)],
)
def test_as_many_checkpoints_are_counted_as_stay(
    every, keep, keep_every, stay, tiny, prepared, tmp_path
):
    settings = tiny(
        "gpt",
        training__steps=7,
        training__save_every=every,
        training__keep_checkpoints=keep,
        training__keep_every=keep_every,
    )
    assert checkpoints(settings.training, 7) == stay
    Trainer(settings, prepared).run()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == stay
