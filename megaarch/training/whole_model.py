"""A whole model in one process: new, or with the weights of a checkpoint in any layout."""

from pathlib import Path

import torch

from megaarch import config
from megaarch.checkpoint import checkpoint
from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.model.transformer import Transformer
from megaarch.parallel import parallelize

OF_THE_RUN = ("study", "parallel")  # sections that say nothing about the model


def build_model(settings: Settings, device: torch.device | str = "cpu") -> Transformer:
    """Returns the initialized model of these settings, with the weights that a run of
    `training.seed` starts from. The section `parallel` is not used."""
    return parallelize.build(settings, Grid.single(device))


def load_checkpoint(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[Transformer, Settings]:
    """Returns the model of a checkpoint and the settings that it was trained with.

    folder: a run's, of which the newest complete checkpoint is read, or that of one step. Raises
    UserError where there is none or it is damaged.
    """
    path = checkpoint.find(Path(folder))
    raw = checkpoint.read_record(path).raw_settings()
    settings = config.resolve({k: v for k, v in raw.items() if k not in OF_THE_RUN}, str(path))
    model = build_model(settings, device)
    weights = checkpoint.read_weights(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model, settings
