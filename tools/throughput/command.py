"""The benchmarks' command line: runs one benchmark, and writes its record and plot."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaarch import config
from megaarch.cli.errors import run_command
from megaarch.errors import UserError
from megaarch.training.trainer import device_named
from tools.throughput.arguments import DTYPES, INFERENCE_SIZE, SIZE, parser
from tools.throughput.isolate import isolated
from tools.throughput.record import Event, Record

WRONG, OUT_OF_TIME = 1, 3  # exit codes
Draw = Callable[[dict[str, Any], Path], None]


def main(arguments: list[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code: 2 for a user's mistake, told in one sentence."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_command(
        "benchmark",
        lambda: COMMANDS[options.command](options, device_named(options.device, "--device")),
    )


def run_attention(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import attention, plots

    shapes = [
        attention.Shape(
            options.tokens,
            length,
            options.heads,
            options.key_heads or options.heads,
            size,
            DTYPES[options.dtype],
        )
        for length in options.lengths
        for size in options.head_sizes
    ]
    problem = (shapes, options.masks, options.kernels, device, options.repetitions, options.seed)
    events = _events(attention.run, problem, options)
    return _record("attention", options, events, attention.line, plots.attention, repeats=True)


def run_plans(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import plans, plots

    results = plans.run(
        options.masks,
        options.rows,
        options.lengths,
        options.plan_for,
        options.kernels,
        options.repetitions,
        options.seed,
        _show,
    )
    return _finish(
        "plans", options, results, plots.bars("label", "built_ms", "processor time of a plan, ms")
    )


def run_fused(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import fused_kernels, plots

    tokens, width, kind = options.tokens, options.width, DTYPES[options.dtype]
    makers = {
        "rms_norm": partial(fused_kernels.norm, tokens, width, kind, device),
        "cross_entropy": partial(
            fused_kernels.chunk, tokens, options.vocabulary_size, kind, device
        ),
    }
    for mask in options.masks:
        sizes = (mask, tokens, options.length, width)
        makers[f"rows, {mask}"] = partial(fused_kernels.gathered, *sizes, kind, device)
    problem = (makers, kind, device, options.repetitions)
    draw = plots.bars("label", "gb_per_s", "forward and backward, GB/s of what must move")
    return _record(
        "fused", options, _events(fused_kernels.run, problem, options), fused_kernels.line, draw
    )


def run_train(options: argparse.Namespace, device: torch.device) -> int:
    """`train` gives each preset a process of its own; `scaling` runs in those of its layout."""
    from megaarch.distributed import launch
    from tools.throughput import plots, training

    raw, deadline = _raw(options), _deadline(options)
    config.set_path(raw, "training.device", device.type)
    for preset in options.presets:  # mistakes are told before anything runs
        training.resolve(raw, preset)
    sizes = (options.repetitions, options.warm_up)
    if options.command == "train":
        events = (
            event
            for preset in options.presets
            for event in isolated(training.run, (raw, [preset], *sizes), deadline)
        )
    else:
        events = training.run(raw, options.presets, *sizes, {}, deadline)
    if launch.find()[1].rank:
        code = 1 if any("wrong" in (event.result or {}) for event in events) else 0
    else:
        draw = plots.bars("preset", "utilization", "share of peak FLOP/s, exact FLOPs")
        code = _record(options.command, options, events, training.line, draw)
    launch.leave()
    return code


def run_data(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import data_supply, plots

    results = data_supply.run(
        _raw(options), options.presets, options.repetitions, device.type, _show
    )
    draw = plots.bars("preset", "supply_to_demand", "rows made by one worker / rows trained on")
    return _finish("data", options, results, draw)


def run_peers(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import peers, plots

    size = {name: getattr(options, name) for name in SIZE}
    peers.check_size(size)
    results = peers.run(
        options.families, size, options.precisions, device, options.repetitions, options.seed, _show
    )
    return _finish(
        "peers", options, results, plots.bars("label", "ratio", "our tokens/s over theirs")
    )


def run_inference(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import generation, generation_peers, peers, plots

    if options.answer < 2:
        raise UserError("--answer: must be at least 2, for the first token is the prompt's")
    size = {name: getattr(options, name) for name in INFERENCE_SIZE}
    peers.check_size(size)
    how = (device, options.repetitions, options.seed, _show)
    results = generation_peers.run(
        options.families, size, options.precisions, options.batches, *how
    )
    results += generation.run(options.presets, size, options.batches, options.turns, *how)
    draw = plots.bars("label", "decode_tokens_per_second", "decode, tokens/s of a batch")
    return _finish("inference", options, results, draw)


def run_tests(options: argparse.Namespace, device: torch.device) -> int:
    from tools.throughput import pytest_cases

    return _record(
        "tests", options, pytest_cases.run(options.paths, _deadline(options)), pytest_cases.line
    )


def _raw(options: argparse.Namespace) -> config.Raw:
    raw = config.read_yaml(options.config)
    raw.pop("study", None)
    for text in options.set:
        config.set_path(raw, *config.parse_override(text))
    return raw


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _deadline(options: argparse.Namespace) -> float | None:
    return options.time_limit and time.time() + options.time_limit


def _events(
    benchmark: Callable[..., Iterator[Event]], problem: tuple, options: argparse.Namespace
) -> Iterator[Event]:
    deadline = _deadline(options)
    if options.isolate:
        return isolated(benchmark, problem, deadline)
    return benchmark(*problem, {}, deadline)


def _open(kind: str, options: argparse.Namespace) -> Record:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return Record(kind, settings, options.output, options.name)


def _record(
    kind: str,
    options: argparse.Namespace,
    events: Iterator[Event],
    line: Callable[[dict[str, Any]], str],
    draw: Draw | None = None,
    repeats: bool = False,
) -> int:
    """Writes the events' results as they come; returns the exit code. repeats: figures of a head come
    more than once, and are shown at the end."""
    record = _open(kind, options)
    shown: dict[tuple, str] = {}
    try:
        for event in events:
            record.take(event)
            result = event.result or {}
            final = result and not (repeats and "forward" in result)
            if final and event.key not in shown:
                shown[event.key] = line(event.head | result)
                _show(shown[event.key])
    except BaseException as error:
        if record.results:  # what there is, and why there is no more
            record.content["failed"] = f"{type(error).__name__}: {error}"
            record.write(complete=False)
        raise
    for key, result in record.results.items():
        if line(result) != shown.get(key):
            _show(line(result))
    return _close(record, draw)


def _finish(
    kind: str, options: argparse.Namespace, results: list[dict[str, Any]], draw: Draw
) -> int:
    record = _open(kind, options)
    record.extend(results)
    return _close(record, draw)


def _close(record: Record, draw: Draw | None) -> int:
    path, found = record.write(complete=True)
    print(path)
    if draw is not None:
        try:
            draw(found, path.with_suffix(".svg"))
            print(path.with_suffix(".svg"))
        except ImportError as error:
            _show(f"no plot: {error}")
    count = {
        word: sum(word in result for result in record.results.values())
        for word in ("wrong", "skipped", "unfinished")
    }
    good = len(record.results) - sum(count.values())
    _show(", ".join(f"{n} {word}" for word, n in ({"good": good} | count).items()))
    return WRONG if count["wrong"] else OUT_OF_TIME if count["unfinished"] else 0


COMMANDS = {
    "attention": run_attention,
    "plans": run_plans,
    "fused": run_fused,
    "train": run_train,
    "scaling": run_train,
    "data": run_data,
    "peers": run_peers,
    "inference": run_inference,
    "tests": run_tests,
}
