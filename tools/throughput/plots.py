"""The plots of the benchmarks' records: medians as bars, quartiles as whiskers.

matplotlib is imported when one is drawn: a machine that only measures may lack it.
"""

from pathlib import Path
from typing import Any


def attention(found: dict[str, Any], path: Path) -> None:
    """TFLOP/s by mask, one panel a stage, one colour a kernel and size. A dash: the same batch again."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    results = [r for r in found["results"] if "forward" in r]
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    names = list(dict.fromkeys(r["mask"] for r in results))
    series = list(dict.fromkeys(map(_series, results)))
    width = 0.8 / max(len(series), 1)
    for panel, stage in zip(axes, ("forward", "backward"), strict=True):
        panel.set_prop_cycle(color=[colormaps["tab20"](n % 20) for n in range(len(series))])
        for number, label in enumerate(series):
            chosen = [r for r in results if _series(r) == label]
            at = [names.index(r["mask"]) + (number + 0.5) * width - 0.4 for r in chosen]
            height = [r[stage]["tflops"] for r in chosen]
            spread = zip(*(_spread(r[stage]) for r in chosen), strict=True)
            spread = [list(side) for side in spread]
            panel.bar(at, height, width, yerr=spread, label=label, error_kw={"linewidth": 0.8})
            again = [(x, r["warm"][stage]["tflops"]) for x, r in zip(at, chosen) if "warm" in r]
            if again:
                panel.scatter(*zip(*again, strict=True), marker="_", color="black", zorder=3)
        panel.set_ylabel(f"{stage}, TFLOP/s")
        panel.spines[["top", "right"]].set_visible(False)
    if names:
        axes[1].set_xticks(range(len(names)), names, rotation=30, ha="right")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
    _caption(figure, found)
    figure.savefig(path)


def _spread(stage: dict[str, float]) -> tuple[float, float]:
    """How far the quartiles' TFLOP/s lie below and above the median's."""
    middle = stage["tflops"]
    return middle - stage["tflops_lower_quartile"], stage["tflops_upper_quartile"] - middle


def _series(r: dict[str, Any]) -> str:
    return f"{r['kernel']}, {r['length']} tokens, head size {r['head_size']}, {r['dtype']}"


def bars(label: str, figure_of: str, unit: str):
    """A drawing of one figure a result: `label` names the result, `figure_of` its value."""

    def draw(found: dict[str, Any], path: Path) -> None:
        from matplotlib.figure import Figure

        results = [r for r in found["results"] if figure_of in r]
        figure = Figure(figsize=(8, 4), layout="constrained")
        panel = figure.subplots()
        places = range(len(results))
        panel.bar(places, [r[figure_of] for r in results])
        panel.set_xticks(places, [r[label] for r in results], rotation=30, ha="right")
        panel.set_ylabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
        _caption(figure, found)
        figure.savefig(path)

    return draw


def _caption(figure: Any, found: dict[str, Any]) -> None:
    hardware, versions = found["hardware"], found["versions"]
    threads = hardware["threads"]
    device = hardware["gpu"] or f"{hardware['cpu']}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle(
        f"{device} · torch {versions['torch']} · commit {found['commit']} · {found['date']}",
        fontsize="small",
    )
