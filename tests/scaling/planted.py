"""Points drawn of a known law."""

import numpy as np

from megaarch.scaling.law import Law
from megaarch.scaling.points import Points

TRUTH = Law(A=480.0, B=2100.0, E=1.8, alpha=0.35, beta=0.37)


def planted(noise: float, seed: int = 0, truth: Law = TRUTH, name: str = "planted") -> Points:
    """Seven sizes at six budgets. noise: deviation of log L."""
    sizes, flops = np.meshgrid(np.geomspace(5e7, 1e10, 7), np.geomspace(6e18, 3e21, 6))
    tokens = flops / (6 * sizes)
    drawn = np.exp(noise * np.random.default_rng(seed).standard_normal(sizes.shape))
    loss = truth.loss(sizes, tokens) * drawn
    return Points(name, sizes.ravel(), tokens.ravel(), loss.ravel())
