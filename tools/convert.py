"""Checkpoints, safetensors files and Hugging Face models into each other:
`python tools/convert.py --help`."""

import argparse
import sys
from pathlib import Path

from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.config.schema import MOST_SENTINELS
from megaarch.errors import UserError

EPILOG = """\
examples:
  python tools/convert.py runs/gpt gpt.safetensors --to safetensors
  python tools/convert.py gpt.safetensors runs/again --to checkpoint
  python tools/convert.py runs/gpt gpt-hf --to hf
  python tools/convert.py gpt2-from-the-hub runs/gpt2 --from hf
  megaarch train runs/gpt2/start.yaml --set training.steps=100 logging.directory=runs/mine

A checkpoint belongs to no parallel layout: any layout reads what any other wrote, and a run's
folder converted to a checkpoint is its newest one in whole tensors. Optimizer states are not
converted, so what comes out is for training.start_from and not for continuing a run.
"""


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="convert.py",
        description="Convert a model between a megaarch checkpoint, one safetensors file and a "
        "Hugging Face folder (GPT-2, Llama, T5, BERT, BART).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ("checkpoint", "safetensors", "hf")
    top.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a run's folder or STUDY/CELL (its newest checkpoint), a checkpoint, a .safetensors file of this "
        "tool, or a Hugging Face folder with config.json and safetensors",
    )
    top.add_argument("output", metavar="OUTPUT", type=Path, help="a new file or folder")
    top.add_argument(
        "--to",
        choices=formats,
        default="checkpoint",
        help="checkpoint: a run's folder with start.yaml beside it (default)",
    )
    top.add_argument(
        "--from", dest="given", choices=formats, help="the source's format (default: by its looks)"
    )
    top.add_argument(
        "--family",
        metavar="NAME",
        help="gpt2, llama, bert, t5 or bart, with --to hf (default: what comes nearest)",
    )
    top.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="that the model was trained with (default: of a Hugging Face model tokenizer.json, "
        "tokenizer.model or spiece.model in its folder; of a run the recorded one, if it is still there)",
    )
    top.add_argument(
        "--sentinels",
        metavar="N",
        type=int,
        help="room in a Hugging Face model's vocabulary for those of T5's objective (default: 100)",
    )
    top.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights, with --to hf (float32)",
    )
    top.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare every tensor, and with Hugging Face the logits of random tokens (default: the "
        "logits where transformers is installed and the memory is free)",
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("convert.py", lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> int:
    from megaarch.interchange.convert import Conversion, convert

    if options.sentinels is not None and not 0 <= options.sentinels <= MOST_SENTINELS:
        raise UserError(
            f"--sentinels must be from 0 to {MOST_SENTINELS:,}, not {options.sentinels:,}"
        )
    job = vars(options)
    job.pop("debug")
    convert(Conversion(**job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
