"""Tensors by name that are read one at a time, so that a model need not fit into memory to be copied."""

from collections.abc import Callable, Iterator, Mapping

import torch

Weights = Mapping[str, torch.Tensor]


class Lazy(Mapping[str, torch.Tensor]):
    """Tensors by name; `read(name)` makes one at each look-up, and nothing keeps it. like: of each, its shape
    and type, on "meta"."""

    def __init__(self, like: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]):
        self.like, self._read = like, read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def like(weights: Weights) -> dict[str, torch.Tensor]:
    """Returns the shapes and types of tensors, on "meta"; reads none."""
    if isinstance(weights, Lazy):
        return weights.like
    return {name: tensor.to("meta") for name, tensor in weights.items()}


def changed(weights: Weights, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Lazy:
    """Returns the tensors with `change(name, tensor)` made to each as it is read."""
    found = {name: change(name, tensor) for name, tensor in like(weights).items()}
    return Lazy(found, lambda name: change(name, weights[name]))
