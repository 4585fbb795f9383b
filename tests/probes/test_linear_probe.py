"""Probes of frozen states: planted features, and that they read the choice and not its place."""

import numpy as np
import pytest

from megaarch.probes.linear_probe import Items, neighbours, probe, ridge


def planted(rng, number: int, choices: int, strength: float, width: int = 16) -> Items:
    """Two layers of features: noise alone, and noise with a direction that tells the right choice."""
    right = rng.integers(choices, size=number)
    noise = rng.normal(size=(2, number, choices, width))
    noise[1, np.arange(number), right, 3] += strength
    return Items(noise - noise.mean(axis=2, keepdims=True), right)


def test_a_direction_in_one_layer_is_found():
    rng = np.random.default_rng(0)
    found = probe(planted(rng, 200, 4, 6.0), planted(rng, 200, 4, 6.0))
    assert found.layer == 1
    assert found.linear.value > 0.95
    assert found.nearest.value > 0.8
    assert found.chance == 0.25


def test_noise_stays_at_chance():
    rng = np.random.default_rng(1)
    found = probe(planted(rng, 200, 4, 0.0), planted(rng, 400, 4, 0.0))
    for estimate in (found.linear, found.nearest):
        assert estimate.ends[0] < 0.25 < estimate.ends[1]


def test_ridge_solves_its_normal_equations():
    rng = np.random.default_rng(2)
    items, penalty = planted(rng, 50, 3, 1.0), 0.1
    x = items.features[1]
    weights = ridge(x, items.right, penalty)
    rows = x.reshape(-1, x.shape[-1])
    target = np.concatenate([np.eye(3)[r] - 1 / 3 for r in items.right])
    strength = penalty * (rows**2).mean() * len(rows)
    gradient = rows.T @ (rows @ weights - target) + strength * weights
    assert gradient == pytest.approx(np.zeros_like(weights), abs=1e-9)


def test_neighbours_follow_the_nearest_known_choices():
    known = np.array([[[1.0, 0.0], [-1.0, 0.0]]] * 20)
    right = np.zeros(20, dtype=int)
    asked = np.array([[[-3.0, 0.1], [2.0, 0.1]], [[0.5, 0.0], [-0.5, 0.0]]])
    assert neighbours(known, right, asked).tolist() == [1, 0]
