"""The benchmarks' command line: reads arguments, runs one benchmark, writes its record and plot."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaarch import catalogue, config
from megaarch.attention import KERNELS
from megaarch.benchmark import masks
from megaarch.benchmark.peers import FAMILIES
from megaarch.benchmark.record import record, write
from megaarch.config import ConfigError

PRECISIONS = ("fp32", "bf16")
# of the peers' models: 6.8 M parameters as a decoder
SIZE = {
    "hidden_size": 256,
    "layers": 6,
    "heads": 4,
    "feed_forward_size": 688,
    "vocabulary_size": 8192,
    "rows": 8,
    "length": 512,
}
PRESETS = [name for name in catalogue.PRESETS if name != "ul2"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """All benchmarks, with their help."""
    top = argparse.ArgumentParser(
        prog="benchmark",
        description="Throughput, each figure a median of alternating repetitions with its "
        "quartiles, checked in the same run. Writes JSON and a plot into --output.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    attention = _command(commands, "attention", "Attention by mask type and kernel")
    attention.add_argument("--masks", nargs="+", choices=masks.MASKS, default=[*masks.MASKS])
    attention.add_argument("--kernels", nargs="+", choices=["auto", *KERNELS], default=["auto"])
    attention.add_argument("--lengths", nargs="+", type=_positive, default=[1024])
    attention.add_argument("--head-sizes", nargs="+", type=_positive, default=[64])
    attention.add_argument("--heads", type=_positive, default=4)
    attention.add_argument("--key-heads", type=_positive, default=None, help="default: heads")
    attention.add_argument("--tokens", type=_positive, default=4096, help="of all rows together")
    attention.add_argument("--dtype", choices=DTYPES, default="fp32")
    _plans_arguments(commands)
    _fused_arguments(commands)
    _training_arguments(commands)
    _peers_arguments(commands)
    return top


def _plans_arguments(commands: Any) -> None:
    command = _command(commands, "plans", "What kernels' metadata take on the host")
    command.add_argument("--masks", nargs="+", choices=masks.MASKS, default=[*masks.MASKS])
    command.add_argument("--kernels", nargs="+", choices=["auto", *KERNELS], default=["auto"])
    command.add_argument("--lengths", nargs="+", type=_positive, default=[2048, 8192])
    command.add_argument("--rows", type=_positive, default=8)
    command.add_argument(
        "--plan-for", choices=["cpu", "cuda"], default="cuda", help="the device that would run them"
    )


def _fused_arguments(commands: Any) -> None:
    command = _command(commands, "fused", "csrc/'s kernels against torch and torch.compile, GB/s")
    command.add_argument("--tokens", type=_positive, default=1024, help="rows of each operation")
    command.add_argument("--length", type=_positive, default=512, help="of a row of attention")
    command.add_argument("--width", type=_positive, default=512)
    command.add_argument("--vocabulary-size", type=_positive, default=8192)
    command.add_argument("--masks", nargs="+", choices=masks.MASKS, default=["prefix_random"])
    command.add_argument("--dtype", choices=DTYPES, default="fp32")


def _training_arguments(commands: Any) -> None:
    for name, summary in (
        ("train", "Training end to end, preset by preset: tokens/s, MFU by exact FLOPs, memory"),
        ("scaling", "The same on all processes of a layout; start it with torchrun or srun"),
        ("data", "Rows a second of objective, converter and packing, against a GPU's demand"),
    ):
        command = _command(commands, name, summary)
        command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/tiny.yaml")
        command.add_argument("--presets", nargs="+", choices=catalogue.PRESETS, default=PRESETS)
        command.add_argument("--set", metavar="A.B=C", nargs="+", action="extend", default=[])


def _peers_arguments(commands: Any) -> None:
    command = _command(commands, "peers", "The same model in Hugging Face transformers, in turns")
    command.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    command.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    for name, value in SIZE.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=value)


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="DIR")
    command.add_argument("--repetitions", type=_positive, default=9)
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    command.add_argument("--threads", type=_positive, default=None, help="of the CPU")
    command.add_argument("--seed", type=int, default=0)
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code: 2 for a user's mistake, told in one sentence."""
    options = parser().parse_args(arguments)
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        return COMMANDS[options.command](options, _device(options.device))
    except (ConfigError, ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda is asked for and torch finds none; use cpu or auto")
    cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def run_attention(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import attention, plots

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
    results = attention.run(
        shapes, options.masks, options.kernels, device, options.repetitions, options.seed, _show
    )
    _finish("attention", options, results, plots.attention)
    return 1 if any("wrong" in r for r in results) else 0


def run_plans(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import plans, plots

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
    draw = plots.bars("label", "built_ms", "processor time of a plan, ms")
    _finish("plans", options, results, draw)
    return 0


def run_fused(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import fused, plots

    tokens, width, kind = options.tokens, options.width, DTYPES[options.dtype]
    problems = [
        fused.norm(tokens, width, kind, device),
        fused.chunk(tokens, options.vocabulary_size, kind, device),
        *(fused.gathered(m, tokens, options.length, width, kind, device) for m in options.masks),
    ]
    results = fused.run(problems, kind, device, options.repetitions, _show)
    draw = plots.bars("label", "gb_per_s", "forward and backward, GB/s of what must move")
    _finish("fused", options, results, draw)
    return 1 if any("wrong" in r for r in results) else 0


def run_train(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import plots, training
    from megaarch.parallel import launch

    raw = _raw(options)
    config.set_path(raw, "training.device", device.type)
    main = launch.find()[1].rank == 0
    results = training.run(raw, options.presets, options.repetitions, _show if main else _silent)
    if main:
        draw = plots.bars("preset", "utilization", "share of peak FLOP/s, exact FLOPs")
        _finish(options.command, options, results, draw)
    launch.leave()
    return 0


def run_data(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import plots, supply

    results = supply.run(_raw(options), options.presets, options.repetitions, device.type, _show)
    draw = plots.bars("preset", "supply_to_demand", "rows made by one worker / rows trained on")
    _finish("data", options, results, draw)
    return 0


def run_peers(options: argparse.Namespace, device: torch.device) -> int:
    from megaarch.benchmark import peers, plots

    size = {name: getattr(options, name) for name in SIZE}
    results = peers.run(
        options.families, size, options.precisions, device, options.repetitions, options.seed, _show
    )
    _finish("peers", options, results, plots.bars("label", "ratio", "our tokens/s over theirs"))
    return 0


def _raw(options: argparse.Namespace) -> config.Raw:
    raw = config.read_yaml(options.config)
    raw.pop("study", None)
    for text in options.set:
        config.set_path(raw, *config.parse_override(text))
    return raw


def _silent(line: str) -> None:
    pass


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _finish(
    kind: str,
    options: argparse.Namespace,
    results: list[dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    found = record(kind, settings, results)
    path = write(found, options.output)
    print(path)
    draw(found, path.with_suffix(".svg"))
    print(path.with_suffix(".svg"))


COMMANDS = {
    "attention": run_attention,
    "plans": run_plans,
    "fused": run_fused,
    "train": run_train,
    "scaling": run_train,
    "data": run_data,
    "peers": run_peers,
}
