"""How many dimensions a matrix has: from its singular values, and after its mean row is removed."""

import torch

TOLERANCES = (1e-6, 1e-3)  # of the largest singular value


def numerical_rank(values: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Returns how many singular values [..., n], largest first, exceed `tolerance` times the largest."""
    return (values > tolerance * values[..., :1]).sum(-1).double()


def stable_rank(values: torch.Tensor) -> torch.Tensor:
    """Returns ||A||_F^2 / ||A||_2^2 of singular values [..., n]; 0 for a zero matrix (Rudelson and
    Vershynin 2007)."""
    squares = values.square()
    return _ratio(squares.sum(-1), squares[..., 0])


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """Returns exp of the entropy of singular values [..., n] that are divided by their sum; 0 for a zero
    matrix (Roy and Vetterli 2007, section 2)."""
    total = values.sum(-1, keepdim=True)
    rank = torch.special.entr(_ratio(values, total)).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, 0.0)


def smallest_over_largest(values: torch.Tensor) -> torch.Tensor:
    """Returns the ratio of singular values [..., n]: 0 for a matrix that is singular exactly."""
    return _ratio(values[..., -1], values[..., 0])


def without_mean_row(matrix: torch.Tensor) -> torch.Tensor:
    """Returns A - 1 a' of A [..., n, m], a' being its mean row: what is left of it beside the matrix of
    equal rows that comes nearest in Frobenius' norm."""
    return matrix - matrix.mean(-2, keepdim=True)


def composite_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Returns sqrt(||A||_1 ||A||_inf) of A [..., n, m] (Dong et al. 2021, section 2)."""
    size = matrix.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()


def frobenius_norm(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.square().sum((-2, -1)).sqrt()


def residual_to_rank_one(matrix: torch.Tensor, norm=frobenius_norm) -> torch.Tensor:
    """Returns ||A - 1 a'|| / ||A||, a' being the mean row: 0 where all rows are equal. The mean row is the
    nearest in Frobenius' norm, and within a factor of two of it in others."""
    return _ratio(norm(without_mean_row(matrix)), norm(matrix))


def row_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of each row of [..., n, m] as a share of the logarithm of its visible keys (those of
    weight above zero): 1 where they weigh alike, NaN where the row sees one key or none."""
    keys = (weights > 0).sum(-1)
    return torch.special.entr(weights).sum(-1) / keys.double().log().where(keys > 1, torch.nan)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above / below.where(below > 0, 1.0), 0.0)
