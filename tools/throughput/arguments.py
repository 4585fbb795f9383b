"""The arguments of the benchmarks' command line."""

import argparse
from pathlib import Path
from typing import Any

import torch

from megaarch.attention import KERNELS
from megaarch.cli.options import Parser
from megaarch.config import catalogue
from tools.throughput import masks
from tools.throughput.generation_peers import FAMILIES as GENERATING
from tools.throughput.peers import FAMILIES

MOST = 1 << 24  # of any number of the command line
MOST_THREADS, MOST_SEED = 1024, (1 << 63) - 1
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
INFERENCE_SIZE = {name: value for name, value in SIZE.items() if name != "rows"} | {"answer": 64}
TESTS = ("tests/kernels/test_cuda.py", "tests/attention/test_cuda.py")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """All benchmarks, with their help."""
    top = Parser(
        prog="benchmark",
        description="Throughput, each figure a median of alternating repetitions with its "
        "quartiles, checked in the same run. Writes JSON and a plot into --output. Exit code 0: all "
        "is right, 1: some of it is wrong, 2: a mistake of yours, 3: time ran out.",
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
    _isolate_argument(attention)
    _plans_arguments(commands)
    _fused_arguments(commands)
    _training_arguments(commands)
    _peers_arguments(commands)
    _inference_arguments(commands)
    tests = _command(commands, "tests", "Tests by pytest, with the outcome and reason of each")
    tests.add_argument("paths", nargs="*", default=[*TESTS], metavar="TEST")
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
    _isolate_argument(command)


def _training_arguments(commands: Any) -> None:
    for name, summary in (
        ("train", "Training end to end, preset by preset: tokens/s, MFU by exact FLOPs, memory"),
        ("scaling", "The same on all processes of a layout; start it with torchrun or srun"),
        ("data", "Rows a second of objective, converter and packing, against a GPU's demand"),
    ):
        command = _command(commands, name, summary)
        command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/tiny.yaml")
        command.add_argument(
            "--presets", nargs="+", choices=catalogue.PRESETS, default=[*catalogue.PRESETS]
        )
        command.add_argument("--set", metavar="A.B=C", nargs="+", action="extend", default=[])
        if name != "data":
            command.add_argument(
                "--warm-up", type=_positive, default=5, metavar="STEPS", help="that are not timed"
            )


def _peers_arguments(commands: Any) -> None:
    command = _command(commands, "peers", "The same model in Hugging Face transformers, in turns")
    command.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    command.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    for name, value in SIZE.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=value)


def _inference_arguments(commands: Any) -> None:
    command = _command(
        commands, "inference", "Generation by preset and turn, and against transformers' generate"
    )
    presets = [name for name, preset in catalogue.PRESETS.items() if _generates(preset)]
    command.add_argument("--presets", nargs="*", choices=presets, default=presets)
    command.add_argument("--families", nargs="*", choices=GENERATING, default=[*GENERATING])
    command.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    command.add_argument("--batches", nargs="+", type=_positive, default=[1, 8])
    command.add_argument("--turns", type=_positive, default=3, help="of the presets' dialogues")
    for name, value in INFERENCE_SIZE.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=value)


def _generates(preset: catalogue.Preset) -> bool:
    return catalogue.OBJECTIVES[preset.objective].comparable


def _isolate_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--isolate",
        action="store_true",
        help="in a process of its own; if a kernel crashes, hangs or loses the GPU, the rest goes on",
    )


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--output", type=Path, default=Path("benchmarks"), metavar="DIR")
    command.add_argument("--repetitions", type=_positive, default=9)
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    command.add_argument("--threads", type=_threads, default=None, help="of the CPU")
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument(
        "--time-limit",
        type=_positive,
        default=None,
        metavar="SECONDS",
        help="after which nothing new begins and the record holds what there is (attention, fused, "
        "train, tests)",
    )
    command.add_argument("--name", default=None, help="in the record's file name")
    return command


def _number(text: str, least: int, most: int) -> int:
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most:,}")
    return value


def _positive(text: str) -> int:
    return _number(text, 1, MOST)


def _threads(text: str) -> int:
    return _number(text, 1, MOST_THREADS)


def _seed(text: str) -> int:
    return _number(text, 0, MOST_SEED)
