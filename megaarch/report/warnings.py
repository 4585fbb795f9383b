"""What makes a comparison unfair or thin, in sentences. Each appears only with its cause."""

import json
import math
from collections.abc import Callable, Iterable

from megaarch.report import notation
from megaarch.report.cells import FLOPS_TOLERANCE, flops_spread, inherited, spent
from megaarch.report.notation import finite

PADDING_LIMIT = 0.05
BATCH_TOLERANCE = 0.25  # of seen tokens a step
TRIAL_LIMIT = 2.0  # how many times more, or less, compute a trial may have had than its cell
SEEDS_WANTED = 3
ITEMS_WANTED = 100


def warnings_for(results: dict) -> list[str]:
    """Everything to know before believing the table, the causes of unfairness first.

    The study's own warnings come along; what holds for several cells is said once.
    """
    cells = results["cells"]
    found = [
        *unequal_flops(results),
        *unequal_batches(results),
        *mixed_conditions(cells),
        *inherited_compute(cells),
        *shared_causes(cells),
        *few_seeds(cells),
        *few_items(cells),
    ]
    for cell in cells:
        own = cell_causes(cell).values()
        found += [f"{label(cell)}: {w}" for w in cell.get("warnings", []) if w not in own]
    return list(dict.fromkeys([*found, *results.get("warnings", [])]))


def warnings_of(cell: dict) -> list[str]:
    """What to know about one cell (a cell of `results.json`), its own warnings included."""
    return list(dict.fromkeys([*cell_causes(cell).values(), *cell.get("warnings", [])]))


def cell_causes(cell: dict) -> dict[str, str]:
    """Cause -> sentence, for what can be seen in one cell alone."""
    padding, epochs = finite(cell.get("padding_share")), finite(cell.get("epochs"))
    causes = {}
    if not cell.get("tuned"):
        causes["untuned"] = f"its learning rate ({cell.get('learning_rate')}) was not tuned"
    if cell.get("learning_rate_at_edge"):
        causes["edge"] = (
            f"its best learning rate ({cell.get('learning_rate')}) lies at the edge of its grid"
        )
    ratio = _trial_ratio(cell)
    if ratio and not 1 / TRIAL_LIMIT <= ratio <= TRIAL_LIMIT:
        causes["trial"] = f"its learning rate was tuned at {ratio:.2g} of its compute"
    if padding is not None and padding > PADDING_LIMIT:
        causes["padding"] = f"{notation.percent(padding)} of its rows is padding"
    if cut := finite(cell.get("truncated_share")):
        causes["cut"] = f"{notation.percent(cut)} of its {{input, target}} pairs were cut to fit"
    if epochs is not None and epochs > 1:
        causes["epochs"] = f"it read its training text {epochs:.1f} times"
    return causes


def _trial_ratio(cell: dict) -> float | None:
    """FLOPs of the trials that chose the learning rate over the cell's own."""
    trial, own = finite(cell.get("trial_flops")), finite(cell.get("flops"))
    return trial / own if trial and own else None


SHARED = {
    "untuned": "Learning rate not tuned for {names}: a better rate could change the ranking.",
    "edge": "Best learning rate at the edge of its grid for {names}: the optimum may lie beyond.",
    "trial": "Learning rate tuned at a share of the compute: {names}. The best rate shifts with it.",
    "padding": "More than 5% padding: {names}. It costs time but counts as no compute.",
    "cut": "Pairs of input and target cut to fit their limits: {names}.",
    "epochs": "More than one epoch over the training text: {names}.",
}
DETAILS: dict[str, Callable[[dict], str]] = {
    "trial": lambda cell: f" ({_trial_ratio(cell):.2g})",
    "padding": lambda cell: f" ({notation.percent(cell['padding_share'])})",
    "cut": lambda cell: f" ({notation.percent(cell['truncated_share'])})",
    "epochs": lambda cell: f" ({cell['epochs']:.1f})",
}


def shared_causes(cells: list[dict]) -> Iterable[str]:
    for cause, sentence in SHARED.items():
        detail = DETAILS.get(cause, lambda cell: "")
        worst: dict[str, str] = {}
        for cell in cells:
            if cause in cell_causes(cell):
                worst.setdefault(label(cell), detail(cell))
        if worst:
            everyone = len(worst) == len({label(cell) for cell in cells}) and len(worst) > 1
            names = "every cell" if everyone and cause not in DETAILS else None
            yield sentence.format(
                names=names or notation.listed([name + text for name, text in worst.items()])
            )


def unequal_flops(results: dict) -> Iterable[str]:
    """Cells of one budget whose training FLOPs, with inherited ones, differ by more than 2%."""
    for amount in sorted({cell["budget"] for cell in results["cells"]}):
        group = [cell for cell in results["cells"] if cell["budget"] == amount]
        amounts = [(spent(cell), label(cell)) for cell in group if spent(cell)]
        spread = flops_spread(group)
        if spread <= FLOPS_TOLERANCE:
            continue
        frugal, greedy = min(amounts)[1], max(amounts)[1]
        match = results["budget"]["match"]
        why = "" if match == "flops" else f", as matching {notation.MATCHED.get(match)} allows"
        yield (
            f"Unequal compute at {notation.budget(match, amount)}: {greedy} spent "
            f"{100 * spread:.1f}% more FLOPs than {frugal}{why}."
        )


def unequal_batches(results: dict) -> Iterable[str]:
    """Cells of one budget whose seen tokens a step differ by more than 25%: equal compute buys the
    one with the larger batches fewer steps."""
    for amount in sorted({cell["budget"] for cell in results["cells"]}):
        group = [cell for cell in results["cells"] if cell["budget"] == amount]
        sizes = [(_step_tokens(cell), cell["steps"], label(cell)) for cell in group]
        sizes = [size for size in sizes if size[0]]
        if not sizes or max(sizes)[0] / min(sizes)[0] - 1 <= BATCH_TOLERANCE:
            continue
        (least, many, small), (most, few, large) = min(sizes), max(sizes)
        yield (
            f"Unequal batches at {notation.budget(results['budget']['match'], amount)}: {large} "
            f"sees {most:,.0f} tokens a step in {few:,.0f} steps and {small} {least:,.0f} in "
            f"{many:,.0f}, for training.global_batch_size counts rows."
        )


def _step_tokens(cell: dict) -> float | None:
    seen, steps = finite(cell.get("seen_tokens")), finite(cell.get("steps"))
    return seen / steps if seen and steps else None


def inherited_compute(cells: list[dict]) -> Iterable[str]:
    for cell in cells:
        if not cell.get("parent"):
            continue
        counted = "whose compute is not known and not counted"
        if inherited(cell):
            counted = f"so {notation.power(inherited(cell))} FLOPs spent before count as its own"
        yield f"{label(cell)} starts from the weights of {cell['parent']}, {counted}."


def few_seeds(cells: list[dict]) -> Iterable[str]:
    seeds: dict[tuple, set] = {}
    for cell in cells:
        key = (cell["name"], cell.get("size"), cell["budget"])
        seeds.setdefault(key, set()).add(cell["seed"])
    fewest = min(map(len, seeds.values()), default=SEEDS_WANTED)
    if fewest < SEEDS_WANTED:
        amount = "One seed" if fewest == 1 else f"{fewest} seeds"
        which = " in some cells" if fewest != max(map(len, seeds.values())) else " a cell"
        rest = (
            "the intervals do not hold the spread between training runs"
            if fewest == 1
            else "the intervals over seeds are wide"
        )
        yield f"{amount}{which}: {rest}."


def few_items(cells: list[dict]) -> Iterable[str]:
    for kind in ("continuation", "choice", "middle"):
        counts = [cell["heldout"].get("items", {}).get(kind) for cell in cells]
        counts = [int(n) for n in map(finite, counts) if n]
        if counts and min(counts) < ITEMS_WANTED:
            yield f"Only {min(counts)} held-out {kind} items: differences must be large to show."


def mixed_conditions(cells: list[dict]) -> Iterable[str]:
    """Cells that were not run alike: data, tokenizer, commit, precision, hardware, share of it,
    versions."""
    for what, condition in CONDITIONS.items():
        groups: dict[str, list[str]] = {}
        for cell in cells:
            value = condition(cell)
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
                groups.setdefault(text, []).append(label(cell))
        if len(groups) > 1:
            sides = [notation.listed(list(dict.fromkeys(names))) for names in groups.values()]
            yield f"Cells differ in {what}: " + "; ".join(sides) + "."


def environment(cell: dict) -> dict:
    return cell.get("environment") or {}


def data_of(cell: dict) -> object:
    """The dataset's fingerprint where it is known, else the settings that choose the text."""
    if environment(cell).get("fingerprint"):
        return environment(cell)["fingerprint"]
    data = cell.get("settings", {}).get("data", {})
    chosen = {key: data.get(key) for key in ("source", "kind", "text_field", "held_out")}
    return chosen if any(value is not None for value in chosen.values()) else None


def tokenizer_of(cell: dict) -> object:
    if environment(cell).get("tokenizer"):
        return environment(cell)["tokenizer"]
    data = cell.get("settings", {}).get("data", {})
    return {"tokenizer": data["tokenizer"]} if "tokenizer" in data else None


def hardware_of(cell: dict) -> object:
    hardware = environment(cell).get("hardware")
    if not isinstance(hardware, dict):
        return hardware
    return {key: hardware.get(key) for key in ("cpu", "cores", "gpu")}


def processes_of(cell: dict) -> object:
    layout = cell.get("settings", {}).get("parallel", {})
    return math.prod(size for name, size in layout.items() if "parallel" in name)


def share_of(cell: dict) -> object:
    share = {key: environment(cell).get(key) for key in ("threads", "lanes")}
    return share if any(share.values()) else None


CONDITIONS: dict[str, Callable[[dict], object]] = {
    "data": data_of,
    "tokenizer": tokenizer_of,
    "commit": lambda cell: environment(cell).get("commit"),
    "precision": lambda cell: cell.get("precision"),
    "hardware": hardware_of,
    "number of processes, so their speeds do not compare": processes_of,
    "threads, or in how many cells ran side by side, so their speeds do not compare": share_of,
    "versions": lambda cell: environment(cell).get("versions"),
}


def label(cell: dict) -> str:
    return f"{cell['name']} {cell['size']}" if cell.get("size") else cell["name"]
