"""The parametric scaling law L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, approach 3).

It is fitted by the sum of Huber losses of log L (delta 1e-3) from many starts; intervals are of a
bootstrap over points and, at once, over the held-out documents that all points were scored on: these move the
points of an architecture together, which no residual shows. Besiroglu et al. 2024 show what a fit that stops
early, or intervals that do not resample, get wrong.

All fits of a batch, of other starts or other resamples, go on at once, each by Newton's method with a
trust in its quadratic model that grows and shrinks (Levenberg 1944). Letters: R fits, P points, five
parameters (log A, log B, log E, alpha, beta), where log A and log B are at the mean of log N and log D.
"""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from megaarch.errors import UserError
from megaarch.scaling.points import Points

DELTA = 1e-3
FEWEST = 6  # points, and places of points: one more than the law has parameters
ALIKE = 1.1  # numbers of parameters or of tokens that are one
LEAST_BREADTH = np.log(1.2)  # of log N and log D across the line that points lie nearest to
ITERATIONS = 300
ROUGH, KEPT = 20, 24  # iterations after which as many of the starts go on to the end
FINE = 1e-9  # gradient of a fit that has ended, as a share of the sum of its weights times DELTA
DECIDED = 0.95  # of the resamples have a law with positive exponents
NAMES = ("A", "B", "E", "alpha", "beta")


@dataclass(frozen=True)
class Law:
    """Its five numbers, or [R] each: those of each resample."""

    A: Any
    B: Any
    E: Any
    alpha: Any
    beta: Any

    def loss(self, parameters: Any, tokens: Any) -> Any:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def allocation(self, flops: Any) -> tuple[Any, Any]:
        """Returns the parameters and tokens of the lowest loss, where 6 N D = flops."""
        both, half = self.alpha + self.beta, flops / 6
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        parameters = scale * half ** (self.beta / both)
        return parameters, half / parameters

    def best_loss(self, flops: Any) -> Any:
        """Returns the loss of that allocation."""
        return self.loss(*self.allocation(flops))


@dataclass(frozen=True)
class Fit:
    """law: of all points. resamples: of each bootstrap sample, its numbers arrays. draws: which samples these
    are, for one that decides no law is left out; two laws' samples of one number are of the same documents.
    huber: the sum of Huber losses. points: those that it is fitted to."""

    law: Law
    resamples: Law
    draws: np.ndarray
    huber: float
    points: Points

    @property
    def resampled(self) -> list[tuple[int, int]]:
        """How many points are drawn again, and how many documents, each with its degrees of freedom."""
        found, documents = len(self.points), self.points.documents
        over_points = found, found - len(NAMES)
        return [over_points] + ([(documents, documents - 1)] if documents else [])

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Maps each parameter's name to its 95% interval."""
        found = zip(NAMES, astuple(self.law), astuple(self.resamples), strict=True)
        return {name: self.interval(value, resampled) for name, value, resampled in found}

    def interval(self, value: float, resampled: np.ndarray) -> tuple[float, float]:
        """Returns the 95% interval of a number that follows from the law, given of all points and of each
        resample: that of its logarithm, which is what varies evenly. The distances of quantiles are widened
        by sqrt(P / (P - 5)), for residuals of a fit are smaller than what they estimate, or by that of documents
        about their mean, where it is more."""
        edges = np.quantile(np.log(resampled), [0.025, 0.975])
        widened = max(np.sqrt(number / free) for number, free in self.resampled)
        low, high = np.exp(np.log(value) + widened * (edges - np.log(value)))
        return float(low), float(high)


def fit(points: Points, resamples: int = 1000, seed: int = 0) -> Fit:
    """Returns the law of these points. UserError where they do not decide its parameters."""
    _check(points)
    x, z, y = (np.log(values) for values in (points.parameters, points.tokens, points.loss))
    middle = x.mean(), z.mean()
    data = x - middle[0], z - middle[1]
    starts = _starts(points.loss)
    rough, values = _minimize(*data, y, 1.0, starts, ROUGH)
    starts = rough[np.argsort(values)[:KEPT]]
    found, values = _minimize(*data, y, 1.0, starts)
    best = found[values.argmin()]
    weights = np.random.default_rng(seed).multinomial(
        len(y), np.full(len(y), 1 / len(y)), size=resamples
    )
    redrawn = np.log(points.redrawn_losses(resamples))
    starts = np.tile(best, (resamples, 1))
    starts[:, :3] += (redrawn - y).mean(axis=1, keepdims=True)  # each of the law's terms
    again, _ = _minimize(*data, redrawn, weights.astype(float), starts)
    with np.errstate(over="ignore"):
        law, resampled = np.array(_law(best, middle)), np.array(_law(again.T, middle))
    known = np.isfinite(resampled).all(axis=0) & (resampled[3:] > 0).all(axis=0)
    if not (np.isfinite(law).all() and (law[3:] > 0).all() and known.mean() >= DECIDED):
        raise UserError(
            f"{points.name}: {len(points)} points do not decide the exponents of a law, which come out "
            "negative or without bound: give more sizes and budgets, or more seeds"
        )
    draws = np.flatnonzero(known)
    return Fit(Law(*law.tolist()), Law(*resampled[:, known]), draws, float(values.min()), points)


def _check(points: Points) -> None:
    if len(points) < FEWEST:
        raise UserError(
            f"{points.name}: {len(points)} points do not decide the five parameters of a law: "
            f"give {FEWEST} or more, of several sizes and budgets"
        )
    levels = [_levels(values) for values in (points.parameters, points.tokens)]
    for name, found in zip(("parameters", "tokens"), levels, strict=True):
        if len(set(found)) < 3:
            raise UserError(
                f"{points.name}: all points have one or two numbers of {name}, which decide no "
                "exponent: give three or more"
            )
    places = len(set(zip(*levels, strict=True)))
    if places < FEWEST:
        raise UserError(
            f"{points.name}: {len(points)} points at {places} pairs of parameters and tokens do not decide the five "
            f"parameters of a law: give {FEWEST} pairs or more"
        )
    logs = np.log([points.parameters, points.tokens]).T
    _, _, axes = np.linalg.svd(logs - logs.mean(axis=0), full_matrices=False)
    if np.ptp(logs @ axes[1]) < LEAST_BREADTH:
        raise UserError(
            f"{points.name}: tokens follow from parameters in all points, as at one budget, so that an exponent of "
            "each is not decided: give several budgets of each size"
        )


def _levels(values: np.ndarray) -> list[int]:
    """Returns of each value the number of the group that it is in: of values that seeds, or what a token
    costs, move."""
    found, first, level = np.zeros(len(values), dtype=int), 0.0, -1
    for place in np.argsort(values, kind="stable"):
        if values[place] > ALIKE * first:
            first, level = values[place], level + 1
        found[place] = level
    return found.tolist()


def _law(theta: np.ndarray, middle: tuple[float, float]) -> tuple[np.ndarray, ...]:
    a, b, e, alpha, beta = theta
    return np.exp(a + alpha * middle[0]), np.exp(b + beta * middle[1]), np.exp(e), alpha, beta


def _starts(loss: np.ndarray) -> np.ndarray:
    """[R, 5]: exponents, the share of the lowest loss that is E, and what of the rest is due to N."""
    exponents = (0.1, 0.3, 0.5, 0.8, 1.2)
    grid = np.meshgrid((0.05, 0.4, 0.7, 0.9, 0.98), (0.1, 0.5, 0.9), exponents, exponents)
    floor, share, alpha, beta = (axis.ravel() for axis in grid)
    floor = floor * loss.min()
    rest = loss.mean() - floor
    return np.stack(
        [np.log(share * rest), np.log((1 - share) * rest), np.log(floor), alpha, beta], axis=1
    )


def _minimize(
    x_P: np.ndarray,
    z_P: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | float,
    start_R5: np.ndarray,
    iterations: int = ITERATIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each fit ends, [R, 5], and its weighted sum of Huber losses, [R]. y (log L), weights: [R, P], or
    what is alike for all fits or points."""
    shape = len(start_R5), len(x_P)
    y_RP, weights_RP = np.broadcast_to(y, shape), np.broadcast_to(weights, shape)
    theta, value = start_R5.copy(), _value(x_P, z_P, y_RP, weights_RP, start_R5)
    damping = np.ones(len(theta))
    going = np.arange(len(theta))
    for _ in range(iterations):
        at = y_RP[going], weights_RP[going]
        gradient, hessian, scale = _derivatives(x_P, z_P, *at, theta[going])
        largest = np.abs(gradient).max(axis=1)
        on = (largest > FINE * DELTA * len(x_P)) & (damping[going] < 1e12)
        if not on.any():
            break
        going, gradient, hessian, scale = going[on], gradient[on], hessian[on], scale[on]
        curvature, axes = np.linalg.eigh(hessian + damping[going, None, None] * scale)
        curvature = np.maximum(np.abs(curvature), 1e-15)  # downhill along each axis
        step = axes @ (np.swapaxes(axes, 1, 2) @ gradient[..., None] / curvature[..., None])
        tried = theta[going] - step[..., 0]
        found = _value(x_P, z_P, y_RP[going], weights_RP[going], tried)
        better = found < value[going]
        theta[going[better]], value[going[better]] = tried[better], found[better]
        damping[going] *= np.where(better, 0.2, 5.0)
    return theta, value


def _terms(x: np.ndarray, z: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Logarithms of the law's three terms, [R, P, 3]."""
    a, b, e, alpha, beta = (column[:, None] for column in theta.T)
    return np.stack(np.broadcast_arrays(a - alpha * x, b - beta * z, e), axis=-1)


def _value(x, z, y, weights, theta) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        r = np.abs(np.logaddexp.reduce(_terms(x, z, theta), axis=-1) - y)
        huber = np.where(r < DELTA, r * r / 2, DELTA * (r - DELTA / 2))
    found = (weights * huber).sum(axis=1)
    return np.where(np.isfinite(found), found, np.inf)


def _derivatives(x, z, y, weights, theta) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns gradient [R, 5], Hessian [R, 5, 5], and the curvature of the quadratic that touches each
    Huber loss from above [R, 5, 5], which is positive."""
    terms = _terms(x, z, theta)
    log_loss = np.logaddexp.reduce(terms, axis=-1)
    share = np.exp(terms - log_loss[..., None])
    jacobian = np.concatenate(
        [share, -share[..., :1] * x[:, None], -share[..., 1:2] * z[:, None]], -1
    )
    r = log_loss - y
    slope = weights * np.clip(r, -DELTA, DELTA)
    inside = weights * (np.abs(r) < DELTA)
    gradient = np.einsum("rp,rpi->ri", slope, jacobian)
    hessian = _outer(jacobian, inside - slope)
    for k, place, by in ((0, 3, x), (1, 4, z)):
        of_term = slope * share[..., k]
        crossed = -(of_term * by).sum(axis=1)
        hessian[:, k, k] += of_term.sum(axis=1)
        hessian[:, k, place] += crossed
        hessian[:, place, k] += crossed
        hessian[:, place, place] += (of_term * by**2).sum(axis=1)
    hessian[:, 2, 2] += (slope * share[..., 2]).sum(axis=1)
    above = weights * np.minimum(1.0, DELTA / np.maximum(np.abs(r), DELTA))
    return gradient, hessian, _outer(jacobian, above)


def _outer(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.swapaxes(jacobian * weights[..., None], 1, 2) @ jacobian
