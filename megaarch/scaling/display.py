"""Fitted laws as a terminal shows them, and as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megaarch.scaling.crossing import Comparison
from megaarch.scaling.isoflop import IsoFlop
from megaarch.scaling.law import NAMES, Fit

WITHOUT_DOCUMENTS = (
    "These losses are not known document by document: the intervals leave out the choice of held-out documents, "
    "which moves all losses of an architecture together. The fewer documents, the more often two equal "
    "architectures are called different."
)
DIGITS = {"A": 5, "B": 5, "E": 5, "alpha": 4, "beta": 4}


def record(fit: Fit, isoflop: IsoFlop | None) -> dict[str, Any]:
    """One architecture's law for JSON: the five numbers, their intervals, and what follows."""
    return {
        **{name: getattr(fit.law, name) for name in NAMES},
        "intervals": {name: list(interval) for name, interval in fit.intervals().items()},
        "points": len(fit.points),
        "documents": fit.points.documents,
        "huber": fit.huber,
        "allocation": _allocations(fit),
        "isoflop": asdict(isoflop) if isoflop else None,
    }


def _allocations(fit: Fit) -> list[dict[str, Any]]:
    """What is best at the lowest and at the highest budget that the law has points at."""
    found = []
    for budget in sorted({float(fit.points.flops.min()), float(fit.points.flops.max())}):
        values = (*fit.law.allocation(budget), fit.law.best_loss(budget))
        again = (*fit.resamples.allocation(budget), fit.resamples.best_loss(budget))
        best: dict[str, Any] = {"flops": budget, "extrapolated": _outside(fit, values[0])}
        for name, value, resampled in zip(("parameters", "tokens", "loss"), values, again):
            best |= {name: float(value), f"{name}_interval": list(fit.interval(value, resampled))}
        found.append(best)
    return found


def _outside(fit: Fit, size: float) -> bool:
    """Whether no run is as small, or as large, as this size."""
    sizes = fit.points.parameters
    return bool(size < sizes.min() or size > sizes.max())


def comparison(found: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return asdict(found) | {"different": found.different, "sentence": sentence(found)}


def sentence(found: Comparison, shown: Callable[[float], str] = "{:.3g}".format) -> str:
    """Says who is better where, or that it cannot be told. shown: writes a number of FLOPs."""
    low, high = map(shown, found.budgets)
    at_low, at_high = found.better
    if found.crossing is not None and found.crossing_interval is not None:
        edges = " to ".join(map(shown, found.crossing_interval))
        return (
            f"{at_low} is better up to {shown(found.crossing)} FLOPs ({edges}), and {at_high} from "
            "there on."
        )
    if at_low == at_high:
        if at_low is None:
            return f"{found.first} and {found.second} cannot be told apart at {low} nor at {high} FLOPs."
        return f"{at_low} is better at {low} and at {high} FLOPs."
    known, where, unknown = (at_low, low, high) if at_low else (at_high, high, low)
    return f"{known} is better at {where} FLOPs; at {unknown} it cannot be told."


def notes(
    fits: Mapping[str, Fit],
    pairs: Sequence[Comparison],
    shown: Callable[[float], str] = "{:.3g}".format,
    counted: Callable[[float], str] = "{:.3g}".format,
) -> list[str]:
    """Says what these laws are asked for beyond their runs, and how many comparisons there are. shown: writes a number
    of FLOPs; counted: one of parameters."""
    found = []
    for name, fit in fits.items():
        for best in _allocations(fit):
            if best["extrapolated"]:
                sizes = fit.points.parameters
                ends = f"{counted(sizes.min())} to {counted(sizes.max())}"
                found.append(
                    f"{name}: the best size at {shown(best['flops'])} FLOPs, {counted(best['parameters'])} parameters, lies "
                    f"beyond those that were run ({ends}): what is said of it there is extrapolated."
                )
    if len(pairs) > 1:
        found.append(
            f"Each of these {len(pairs)} comparisons is held to 5% by itself: of as many pairs of equal architectures some "
            "may be called different."
        )
    return found


def caveats(fits: Mapping[str, Fit]) -> list[str]:
    """Says what is not in the intervals of these laws, if anything."""
    unknown = any(fit.points.documents is None for fit in fits.values())
    return [WITHOUT_DOCUMENTS] if unknown else []


def show(fits: dict[str, Fit], isoflops: dict[str, IsoFlop | None], console: Console) -> None:
    """Prints each law with its intervals, and where its points are."""
    for name, fit in fits.items():
        console.print(
            f"{name}: L(N, D) = E + A/N^alpha + B/D^beta, {len(fit.points)} points", soft_wrap=True
        )
        table = Table(box=None)
        for column in ("", "value", "95% interval"):
            table.add_column(column, justify="left" if not column else "right")
        for key, (low, high) in fit.intervals().items():
            digits = DIGITS[key]
            table.add_row(
                key, f"{getattr(fit.law, key):.{digits}g}", f"{low:.{digits}g} to {high:.{digits}g}"
            )
        console.print(table)
        for best in _allocations(fit):
            low, high = best["parameters_interval"]
            console.print(
                f"best at {best['flops']:.3g} FLOPs: {best['parameters']:.3g} parameters ({low:.3g} to "
                f"{high:.3g}), {best['tokens']:.3g} tokens, loss {best['loss']:.4g}",
                soft_wrap=True,
            )
        if found := isoflops[name]:
            console.print(_isoflop(found), soft_wrap=True)
        console.print()


def _isoflop(found: IsoFlop) -> str:
    inside = sum(valley.inside for valley in found.valleys)
    text = f"isoFLOP curves: {inside} of {len(found.valleys)} have their lowest point among their sizes"
    if found.exponent is not None:
        text += f"; best parameters grow as FLOPs^{found.exponent:.3f}"
        if found.interval:
            text += " ({:.3f} to {:.3f})".format(*found.interval)
    return text
