"""A realistic `results.json`, built in code: eight presets, no file, no training.

`example_results()` is one size, one seed; `scaling_results()` has sizes, budgets and seeds.
"""

import copy
import math
import random

from megaarch.config.catalogue import OBJECTIVES, PRESETS

FULL, CAUSAL = 1, 2

# preset: final bits per byte, choice accuracy, middle, parameters (M), seen tokens (M),
# share of targets, steps, tokens per second
CELLS = {
    "gpt": (1.934, 0.56, None, 3.72, 2.46, 1.0, 600, 7_310),
    "prefix_lm": (1.951, 0.55, None, 3.72, 2.44, 0.5, 596, 6_940),
    "unilm": (2.205, 0.41, 1.98, 3.72, 2.41, 0.15, 588, 6_820),
    "t5": (2.118, 0.45, 1.86, 6.09, 2.87, 0.17, 701, 8_105),
    "bart": (2.262, 0.38, 2.03, 6.09, 2.58, 0.52, 630, 7_444),
    "bert": (1.412, 0.47, 1.77, 3.72, 2.51, 0.15, 613, 7_690),
    "glm": (2.047, 0.48, 1.91, 3.72, 2.39, 0.19, 584, 6_733),
    "xlnet": (2.156, 0.43, 2.08, 3.72, 1.98, 0.16, 483, 5_212),
}


def example_masks(preset: str) -> list[dict]:
    """The masks of one short row of each preset, as a converter lays it out."""
    n = 13

    def mask(title, queries, keys, parts):
        return {"title": title, "queries": queries, "keys": keys, "parts": parts}

    if preset == "gpt":
        return [mask("self-attention", n, n, [[CAUSAL, 0, n, 0, n]])]
    if preset == "bert":
        return [mask("self-attention", n, n, [[FULL, 0, n, 0, n]])]
    if preset in ("t5", "bart"):
        return [
            mask("encoder", 9, 9, [[FULL, 0, 9, 0, 9]]),
            mask("decoder", 6, 6, [[CAUSAL, 0, 5, 0, 5]]),
            mask("cross-attention", 6, 9, [[FULL, 0, 5, 0, 9]]),
        ]
    if preset == "xlnet":
        parts = [[FULL, 0, 9, 0, 9], [CAUSAL, 9, 12, 0, 12], [CAUSAL, 12, 15, 0, 11]]
        return [mask("two streams", 15, 15, parts)]
    p = {"prefix_lm": 6, "unilm": 7, "glm": 8}[preset]
    return [mask("self-attention", n, n, [[FULL, 0, p, 0, p], [CAUSAL, p, n, 0, n]])]


def example_settings(preset: str, rate: float, seed: int = 0) -> dict:
    entry = PRESETS[preset]
    return {
        "model": {
            "preset": preset,
            "architecture": entry.architecture,
            "layers": 4,
            "hidden_size": 192,
            "heads": 4,
            "kv_heads": None,
            "feed_forward_size": 512,
            "sequence_length": 128,
            "vocabulary_size": 4096,
            "tied_embedding": True,
        },
        "data": {
            "source": "embedded",
            "kind": "auto",
            "text_field": "text",
            "tokenizer": None,
            "objective": entry.objective,
            "held_out": 0.1,
        },
        "training": {
            "learning_rate": rate,
            "global_batch_size": 32,
            "schedule": "cosine",
            "optimizer": "adamw",
            "precision": "fp32",
            "seed": seed,
        },
    }


def example_cell(preset: str, budget: float = 3e13, seed: int = 0, size: str | None = None) -> dict:
    """One finished cell. Its noise is drawn from its own name, so that it never changes."""
    final, choice, middle, parameters, seen, targets, steps, speed = CELLS[preset]
    rng = random.Random(f"{preset} {budget} {seed} {size}")
    factor = {None: 1.0, "small": 0.6, "medium": 1.0, "large": 1.9}[size]
    final += 0.06 * math.log2(factor * 3e13 / budget) ** 2 - 0.12 * math.log10(budget / 3e13)
    final += rng.gauss(0, 0.008)
    seconds = seen * 1e6 / speed * budget / 3e13
    flops = budget * (1 + rng.uniform(-0.004, 0.004))
    shares = [0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 7 / 8, 1]
    start = 3.05 if preset == "bert" else 3.31
    curve = [
        {
            "step": int(steps * s),
            "flops": flops * s,
            "seconds": seconds * s,
            "heldout": final + (start - final) * (1 - s**0.3) ** 1.4,
        }
        for s in shares
    ]
    last = {"bert": 4.9, "t5": 4.6, "unilm": 5.2}.get(preset, 4.1)
    losses = [
        {
            "step": 3 * i,
            "flops": flops * i / 199,
            "seconds": seconds * i / 199,
            "loss": last + (8.3 - last) * (1 - (i / 199) ** 0.35) ** 1.6 + rng.gauss(0, 0.05),
        }
        for i in range(200)
    ]
    entry = PRESETS[preset]
    return {
        "name": preset,
        "architecture": entry.architecture,
        "objective": entry.objective,
        "preset": preset,
        "size": size,
        "budget": budget,
        "seed": seed,
        "parent": None,
        "parameters": int(parameters * factor * 1e6),
        "non_embedding_parameters": int((parameters * factor - 0.79 * factor**0.5) * 1e6),
        "flops": flops,
        "palm_flops": flops * 1.06,
        "seen_tokens": int(seen / factor * budget / 3e13 * 1e6),
        "target_tokens": int(seen / factor * budget / 3e13 * targets * 1e6),
        "steps": steps,
        "train_seconds": seconds,
        "tokens_per_second": speed / factor,
        "final_loss": last + 0.02,
        "padding_share": 0.08 if preset == "bart" else 0.004,
        "epochs": 0.9 + 2 * (preset == "t5"),
        "precision": "fp32",
        "tuned": True,
        "learning_rate": 2e-3,
        "learning_rate_at_edge": preset == "glm",
        "heldout": {
            "continuation_bits_per_byte": final,
            "continuation_bits_per_byte_raw": final + 0.01,
            "continuation_interval": [final - 0.031, final + 0.033],
            "comparable": OBJECTIVES[entry.objective].comparable,
            "choice_accuracy": choice + rng.gauss(0, 0.01),
            "choice_interval": [choice - 0.06, choice + 0.06],
            "middle_bits_per_byte": middle and middle + rng.gauss(0, 0.01),
            "middle_interval": [middle - 0.05, middle + 0.05] if middle else None,
            "items": {"continuation": 256, "choice": 256, "middle": 128 if middle else 0},
            "interval_kind": "bootstrap over documents",
        },
        "curve": curve,
        "losses": losses,
        "masks": example_masks(preset),
        "settings": example_settings(preset, 2e-3, seed),
        "warnings": [],
    }


def example_results(cells: list[dict] | None = None, match: str = "flops") -> dict:
    cells = [example_cell(preset) for preset in CELLS] if cells is None else cells
    return {
        "format": 1,
        "study": "demo",
        "created": "2026-03-02T10:31:00+00:00",
        "commit": "4f0c2ab91e",
        "command": "megaarch compare configs/demo.yaml",
        "hardware": {
            "cpu": "Intel Xeon Platinum 8481C",
            "cores": 2,
            "gpu": None,
            "memory_gib": 15.6,
        },
        "versions": {"python": "3.12.4", "torch": "2.13.0", "megaarch": "0.1.0"},
        "budget": {"match": match, "amounts": sorted({cell["budget"] for cell in cells})},
        "data": {
            "source": "embedded",
            "train_tokens": 612_345,
            "train_documents": 2_310,
            "heldout_documents": 257,
            "heldout_bytes": 231_004,
            "dropped_paragraphs": 112,
            "tokenizer": "SentencePiece unigram, 4,096 pieces",
            "fingerprint": "9c1ff0a7",
            "bytes_per_token": 3.61,
        },
        "unigram_bits_per_byte": 2.412,
        "chance": 0.25,
        "cells": cells,
        "tuning": [
            {
                "cell": preset,
                "learning_rate": rate,
                "heldout": 2.2 + abs(rate - 2e-3) * 60,
                "flops": 9e12,
            }
            for preset in CELLS
            for rate in (1e-3, 2e-3, 4e-3)
        ],
        "warnings": [],
    }


def scaling_results() -> dict:
    """Three sizes, two budgets and three seeds of three presets."""
    return example_results(
        [
            example_cell(preset, budget, seed, size)
            for preset in ("gpt", "prefix_lm", "t5")
            for size in ("small", "medium", "large")
            for budget in (1e13, 3e13)
            for seed in (0, 1, 2)
        ]
    )


def cell_at(name: str, value: float, low: float, high: float, **more) -> dict:
    cell = example_cell("gpt") | {"name": name} | more
    cell["heldout"] |= {"continuation_bits_per_byte": value, "continuation_interval": [low, high]}
    return cell


def with_lengths(cell: dict, values: dict[str, float], gain: float, half: float = 0.01) -> dict:
    """The cell with continuations of several lengths, whose gain grows to `gain` at the longest."""
    cell = copy.deepcopy(cell)
    gains = {n: gain * (i + 1) / len(values) for i, n in enumerate(values)}
    cell["heldout"] |= {
        "continuation": {
            n: {
                "bits_per_byte": value,
                "interval": [value - 2 * half, value + 2 * half],
                "prefix_gain": gains[n],
                "prefix_gain_interval": [gains[n] - half, gains[n] + half],
                "items": 256,
            }
            for n, value in values.items()
        },
        "prefix_gain": gain,
        "prefix_gain_interval": [gain - half, gain + half],
        "reads_prefix": gain > half,
    }
    return cell


def panel_results() -> dict:
    """All presets measured by length: T5 leads on short continuations, and BART reads no prefix."""
    cells = []
    for preset in CELLS:
        cell = example_cell(preset)
        final = cell["heldout"]["continuation_bits_per_byte"]
        slope = {"t5": 0.22, "bart": 0.05}.get(preset, 0.0)  # what a length adds to the value
        lengths = {str(2**i): final + 0.45 - 0.08 * i + slope * (i - 3) for i in range(6)}
        cells.append(with_lengths(cell, lengths, {"bart": 0.002, "t5": 0.05}.get(preset, 0.15)))
    return example_results(cells)


def clean_results() -> dict:
    """A study that gives no cause for a warning: three seeds, tuned, many items, equal targets."""
    cells = [example_cell(preset, seed=seed) for preset in ("gpt", "unilm") for seed in (0, 1, 2)]
    cells = [cell | {"target_tokens": 1_000_000} for cell in cells]
    return example_results(copy.deepcopy(cells))


def adapted_results(seeds: tuple[int, ...] = (0,)) -> dict:
    """The panel's study with the children of study.adapt: all that have one gain 0.1, T5 0.3."""
    added, cells = 6e12, []
    for seed in seeds:
        parents = []
        for cell in panel_results()["cells"]:
            key = f"{cell['name']}/base-3e+13-seed{seed}"
            parents.append(copy.deepcopy(cell) | {"seed": seed, "key": key})
        cells += parents
        for parent in parents:
            if parent["name"] not in ("bert", "xlnet", "glm"):
                cells.append(adapted_child(parent, added))
    return example_results(cells)


def adapted_child(parent: dict, added: float) -> dict:
    child, gain = copy.deepcopy(parent), 0.3 if parent["name"] == "t5" else 0.1
    value = parent["heldout"]["continuation_bits_per_byte"] - gain
    child |= {
        "name": f"{parent['name']}-adapted",
        "key": parent["key"].replace("/", "-adapted/"),
        "parent": parent["key"],
        "objective": "full_lm" if parent["name"] == "gpt" else "prefix_lm",
        "adaptation": added,
        "flops": added,
        "inherited_flops": parent["flops"],
        "seen_tokens": parent["seen_tokens"] // 5,
        "target_tokens": parent["target_tokens"] // 5,
        "inherited_tokens": parent["seen_tokens"],
        "tuned": False,
    }
    child["heldout"] |= {
        "continuation_bits_per_byte": value,
        "continuation_interval": [value - 0.03, value + 0.03],
        "middle_bits_per_byte": None,
        "middle_interval": None,
        "prefix_gain": 0.2,
        "reads_prefix": True,
    }
    return child


def paired(costs, documents) -> dict:
    """Lists of items of 100 bytes that cost so many bits per byte."""
    return {
        "documents": documents.tolist(),
        "sizes": [100.0] * len(costs),
        "amounts": (100 * costs).tolist(),
    }


def scored(name: str, seed: int, costs, documents) -> dict:
    mean = costs.mean()
    cell = cell_at(name, mean, mean - 0.1, mean + 0.1, seed=seed)
    cell["heldout"]["paired"] = paired(costs, documents)
    return cell
