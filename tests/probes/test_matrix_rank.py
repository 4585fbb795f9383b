"""Ranks of matrices whose singular values are planted, against figures worked out by hand."""

import math

import pytest
import torch

from megaarch.probes import matrix_rank
from megaarch.probes.random_attention import (
    matched_attention,
    random_attention,
    random_logits,
    seen,
)


def planted(values, rows=None, seed=0):
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))[0]
        for size in (rows or n, n)
    )
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("rows", [6, 11])
def test_ranks_of_planted_singular_values(rows):
    values = torch.linalg.svdvals(planted([4.0, 2.0, 1.0, 2e-3, 1e-5, 0.0], rows))
    assert matrix_rank.numerical_rank(values, 1e-3) == 3  # 2e-3 is half of 1e-3 x 4
    assert matrix_rank.numerical_rank(values, 1e-4) == 4
    assert matrix_rank.numerical_rank(values, 1e-6) == 5
    wanted = (16 + 4 + 1 + 4e-6 + 1e-10) / 16
    assert float(matrix_rank.stable_rank(values)) == pytest.approx(wanted, rel=1e-12)
    assert float(matrix_rank.smallest_over_largest(values)) < 1e-14


def test_effective_rank_by_hand():
    values = torch.linalg.svdvals(planted([2.0, 1.0, 1.0]))
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert float(matrix_rank.effective_rank(values)) == pytest.approx(math.exp(entropy), rel=1e-12)
    alike = torch.linalg.svdvals(planted([3.0] * 5))
    assert float(matrix_rank.effective_rank(alike)) == pytest.approx(5, rel=1e-12)
    assert float(matrix_rank.effective_rank(torch.zeros(4, dtype=torch.float64))) == 0


def test_what_equal_rows_add_is_removed():
    matrix = planted([3.0, 2.0, 1.0, 0.5])
    matrix = matrix - matrix.mean(0)
    shifted = matrix + torch.linspace(-50, 80, 4, dtype=torch.float64)
    torch.testing.assert_close(matrix_rank.without_mean_row(shifted), matrix)
    alike = torch.ones(5, 1, dtype=torch.float64) * torch.arange(4.0, dtype=torch.float64)
    assert float(matrix_rank.residual_to_rank_one(alike)) == 0
    # rows (1, 0) and (0, 1): their mean row leaves (.5, -.5) and (-.5, .5), of norm 1, of sqrt(2)
    residual = matrix_rank.residual_to_rank_one(torch.eye(2, dtype=torch.float64))
    assert float(residual) == pytest.approx(1 / math.sqrt(2))


def test_the_composite_norm_by_hand():
    matrix = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert float(matrix_rank.composite_norm(matrix)) == pytest.approx(math.sqrt(6 * 7))


def test_row_entropy_by_hand():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    one, alike, other = matrix_rank.row_entropy(weights).tolist()
    assert math.isnan(one)
    assert alike == pytest.approx(1)
    assert other == pytest.approx(1.5 * math.log(2) / math.log(3))


def test_random_attention_has_the_known_spectra():
    """n 512, d 64: a causal matrix is singular to rounding though its diagonal is positive, and loses less
    to it in effective rank."""
    like = torch.zeros(1, 2, 512, 512)
    made = {
        mask: torch.linalg.svdvals(
            random_attention(like, 64, mask, torch.Generator().manual_seed(0))
        )[0]
        for mask in ("causal", "full")
    }
    assert (matrix_rank.smallest_over_largest(made["causal"]) < 1e-16).all()
    full = matrix_rank.smallest_over_largest(made["full"])
    assert ((full > 1e-6) & (full < 1e-3)).all()
    effective = {mask: matrix_rank.effective_rank(values) for mask, values in made.items()}
    assert effective["causal"].tolist() == pytest.approx([217, 217], rel=0.03)
    assert effective["full"].tolist() == pytest.approx([302, 302], rel=0.03)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_matched_attention_is_as_sharp(mask):
    generator = torch.Generator().manual_seed(1)
    logits = (
        random_logits(torch.zeros(2, 3, 24, 24), 8, generator)
        * torch.tensor([0.3, 1.0, 4.0])[:, None, None]
    )
    trained = torch.softmax(logits.masked_fill(~seen("causal", 24), -torch.inf), -1)
    made = matched_attention(trained, 8, mask, generator)
    torch.testing.assert_close(
        matrix_rank.row_entropy(made).nanmean(-1),
        matrix_rank.row_entropy(trained).nanmean(-1),
        rtol=0,
        atol=1e-6,
    )
    assert ((made > 0) == seen(mask, 24)).all()
