"""Points drawn of a known law."""

from typing import NamedTuple

import numpy as np

from megaarch.scaling.law import Law
from megaarch.scaling.points import Points

TRUTH = Law(A=480.0, B=2100.0, E=1.8, alpha=0.35, beta=0.37)


class Documents(NamedTuple):
    """What a study holds out: bytes, and how much harder each is than text as a whole, [G] each."""

    sizes: np.ndarray
    hardness: np.ndarray

    @classmethod
    def drawn(cls, seed: int, number: int = 36) -> "Documents":
        rng = np.random.default_rng([seed, number])
        return cls(100.0 * rng.integers(1, 4, number), np.exp(rng.normal(-0.045, 0.3, number)))

    def favoured(self, shift: float, rng: np.random.Generator) -> np.ndarray:
        """What each costs an architecture or a run beside its hardness, a factor; the loss is off by `shift`."""
        cost = self.sizes * self.hardness
        return 1 + shift * cost.sum() / np.linalg.norm(cost) * rng.standard_normal(len(cost))


def planted(
    noise: float,
    seed: int = 0,
    truth: Law = TRUTH,
    name: str = "planted",
    runs: int = 1,
    documents: Documents | None = None,
    shift: float = 0.0,
) -> Points:
    """Seven sizes at six budgets, each `runs` times. noise: deviation of log L. documents: those that all are scored
    on; their choice moves all losses by one factor, off by `shift`, and each run's by one of its own, its noise."""
    sizes, flops = np.meshgrid(np.geomspace(5e7, 1e10, 7), np.geomspace(6e18, 3e21, 6))
    sizes, flops = np.tile(sizes.ravel(), runs), np.tile(flops.ravel(), runs)
    tokens = flops / (6 * sizes)
    rng = np.random.default_rng(seed)
    loss = truth.loss(sizes, tokens)
    if documents is None:
        return Points(name, sizes, tokens, loss * np.exp(noise * rng.standard_normal(len(sizes))))
    cost = documents.sizes * documents.hardness * documents.favoured(shift, rng)
    amounts = np.array([one * cost * documents.favoured(noise, rng) for one in loss])
    loss = amounts.sum(1) / documents.sizes.sum()
    return Points(name, sizes, tokens, loss, documents.sizes, amounts)
