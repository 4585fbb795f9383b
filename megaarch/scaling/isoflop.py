"""IsoFLOP curves (Hoffmann et al. 2022, approach 2): at each budget, loss is a parabola of log N, whose
lowest point is the best size; the best sizes of several budgets follow a power law."""

from dataclasses import dataclass

import numpy as np

from megaarch.scaling.points import Points

ALIKE = 1.05  # budgets that are one
LARGEST = 700.0  # log of a number of parameters


@dataclass(frozen=True)
class Valley:
    """The parabola of a budget: loss = lowest + curvature (log N - log parameters)^2. inside: whether its
    lowest point is one, and lies within the sizes that were run. parameters, loss: of the lowest point; None
    where there is none, or it lies beyond all numbers."""

    flops: float
    parameters: float | None
    loss: float | None
    curvature: float
    inside: bool


@dataclass(frozen=True)
class IsoFlop:
    """exponent: of best parameters against FLOPs, over the valleys that are `inside`, where these are two or
    more. Its interval is of a bootstrap over residuals, None where no budget has more than three points."""

    valleys: list[Valley]
    exponent: float | None = None
    interval: tuple[float, float] | None = None


def isoflop(points: Points, resamples: int = 1000, seed: int = 0) -> IsoFlop | None:
    """Returns None where no budget has three sizes or more."""
    groups = [g for g in budgets(points) if len(np.unique(points.parameters[g])) >= 3]
    if not groups:
        return None
    fitted = [_Parabola(points, group) for group in groups]
    valleys = [parabola.valley(parabola.loss) for parabola in fitted]
    exponent = _exponent(valleys)
    free = sum(max(len(p.loss) - 3, 0) for p in fitted)
    if exponent is None or not free:
        return IsoFlop(valleys, exponent)
    residuals = np.concatenate([p.residuals for p in fitted])
    residuals = residuals * np.sqrt(len(residuals) / free)
    rng = np.random.default_rng(seed)
    drawn = (
        _exponent([p.valley(p.smooth + rng.choice(residuals, len(p.loss))) for p in fitted])
        for _ in range(resamples)
    )
    known = [value for value in drawn if value is not None]
    if len(known) < 0.95 * resamples:
        return IsoFlop(valleys, exponent)
    low, high = np.quantile(known, (0.025, 0.975))
    return IsoFlop(valleys, exponent, (float(low), float(high)))


def budgets(points: Points) -> list[np.ndarray]:
    """Returns the places of the points of each budget, in ascending order of budgets."""
    order = np.argsort(points.flops, kind="stable")
    found: list[list[int]] = []
    for place in order.tolist():
        if not found or points.flops[place] > ALIKE * points.flops[found[-1][0]]:
            found.append([])
        found[-1].append(place)
    return [np.array(places) for places in found]


class _Parabola:
    def __init__(self, points: Points, places: np.ndarray):
        self.flops = float(np.exp(np.log(points.flops[places]).mean()))
        self.x, self.loss = np.log(points.parameters[places]), points.loss[places]
        self.middle = self.x.mean()
        self.smooth = np.polyval(self._coefficients(self.loss), self.x - self.middle)
        self.residuals = self.loss - self.smooth

    def _coefficients(self, loss: np.ndarray) -> np.ndarray:
        return np.polyfit(self.x - self.middle, loss, 2)

    def valley(self, loss: np.ndarray) -> Valley:
        square, slope, level = self._coefficients(loss)
        if square <= 0:
            return Valley(self.flops, None, None, float(square), False)
        place = self.middle - slope / (2 * square)
        inside = bool(self.x.min() <= place <= self.x.max())
        parameters = float(np.exp(place)) if place < LARGEST else None
        lowest = float(level - slope**2 / (4 * square))
        return Valley(self.flops, parameters, lowest, float(square), inside)


def _exponent(valleys: list[Valley]) -> float | None:
    known = [v for v in valleys if v.inside]
    if len(known) < 2:
        return None
    flops, parameters = (np.log([getattr(v, n) for v in known]) for n in ("flops", "parameters"))
    return float(np.polyfit(flops, parameters, 1)[0])
