"""The FLOP count against the sum over an explicit loop, and the golden figures of Wang et al."""

import numpy as np
import pytest

from megaarch import config
from megaarch.config.schema import Model
from megaarch.data.batch import Counts
from megaarch.model import flops
from megaarch.study.describe import describe_all


def test_forward_equals_the_sum_over_every_matrix_product():
    model = Model(
        architecture="encoder_decoder",
        encoder_layers=3,
        decoder_layers=2,
        hidden_size=24,
        heads=6,
        kv_heads=2,
        head_size=5,
        feed_forward_size=40,
        vocabulary_size=256,
        activation="gelu",
    )
    counts = Counts(2, (31, 17), (200, 90), (0, 150), 11, (40, 20))
    d, q, kv, f = 24, 6 * 5, 2 * 5, 40
    total = 0
    for _ in range(3):  # encoder layers: (rows, in, out) of each product
        for n, a, b in ((31, d, q), (31, d, kv), (31, d, kv), (31, q, d), (31, d, f), (31, f, d)):
            total += 2 * n * a * b
        total += 2 * (2 * 200 * q)  # scores and values over the visible pairs
    for _ in range(2):
        for n, a, b in ((17, d, q), (17, d, kv), (17, d, kv), (17, q, d), (17, d, f), (17, f, d)):
            total += 2 * n * a * b
        for n, a, b in ((17, d, q), (31, d, kv), (31, d, kv), (17, q, d)):
            total += 2 * n * a * b
        total += 2 * (2 * (90 + 150) * q)
    total += 2 * 11 * d * 256
    assert flops.forward(model, counts).total == total
    assert flops.training(model, counts) == 3 * total


def test_gated_feed_forward_has_three_matrices():
    counts = Counts(1, (10,), (0,), (0,), 0, (10,))
    plain = flops.forward(Model(activation="relu"), counts).feed_forward
    gated = flops.forward(Model(activation="swiglu"), counts).feed_forward
    assert gated * 2 == plain * 3


def test_wang2022_golden_figures():
    cells = {c.name: c for c in describe_all(config.read_yaml("configs/studies/wang2022.yaml"))}
    assert len([name for name in cells if "-to-" not in name and "-mtf" not in name]) == 6
    for name, cell in cells.items():
        billions = cell.parameters / 1e9
        assert billions == pytest.approx(11.003 if name.startswith("encdec") else 4.762, abs=1e-3)
    span = cells["encdec-span"]
    assert (span.lengths["encoder"], span.lengths["decoder"]) == (512, 114)
    assert span.lengths["raw"] == 568
    assert cells["prefix-span"].lengths["decoder"] == 626
    assert cells["prefix-span"].target_tokens_per_row == 114
    ratio = span.flops_per_row / cells["prefix-span"].flops_per_row
    assert ratio == pytest.approx(1.17, abs=0.005)
    pair = cells["encdec-prefix_lm"]  # two examples with splits s and 626 - s
    assert (pair.lengths["encoder"], pair.lengths["decoder"]) == (626, 626)
    assert np.isclose(pair.seen_tokens_per_row, 2 * 626)
    pairs = [cell for name, cell in cells.items() if name.endswith("-mtf")]
    assert len(pairs) == 6  # of pairs that are not there: 1024 inputs and 256 targets
    assert {(c.seen_tokens_per_row, c.target_tokens_per_row) for c in pairs} == {(1280, 256)}
