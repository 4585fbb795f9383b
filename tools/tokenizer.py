"""A tokenizer from text: `python tools/tokenizer.py --help`."""

import argparse
import sys
from pathlib import Path

from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.config.schema import MOST, MOST_SENTINELS
from megaarch.errors import UserError
from megaarch.ingest.corpus_sample import sample
from megaarch.ingest.sources import notes
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece

EPILOG = """\
example:
  python tools/tokenizer.py --input corpus/ --vocabulary-size 32000 --output t.model

The file holds the pieces of text. What the models need besides them stands behind the pieces in
every megaarch tokenizer and is counted in the vocabulary size: padding, start and end tokens, the
masks of BERT, BART and GLM, GLM's span tokens, XLNet's query, UL2's modes, T5's sentinels. So one
tokenizer serves every preset. The same documents give the same file.
"""


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="tokenizer.py",
        description="Train a SentencePiece BPE tokenizer (identity normalization, bytes for what "
        "has no piece, newlines kept), for data.tokenizer and tools/preprocess.py.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--input",
        metavar="PATH",
        nargs="+",
        required=True,
        help="text: .jsonl, .txt (.gz, .bz2, .xz, .zst too), .parquet, a folder or a glob of these",
    )
    top.add_argument("--output", metavar="FILE", required=True, help="FILE.model to write")
    top.add_argument(
        "--vocabulary-size",
        metavar="N",
        type=int,
        required=True,
        help="pieces, specials and sentinels together: model.vocabulary_size",
    )
    top.add_argument(
        "--sentinels",
        metavar="N",
        type=int,
        default=100,
        help="of T5's objective: data.sentinels (default: 100)",
    )
    top.add_argument(
        "--sample",
        metavar="DOCUMENTS",
        type=int,
        default=100_000,
        help="of a larger corpus, how many documents to train on, chosen by hash; they are held "
        "in memory (default: 100000)",
    )
    top.add_argument(
        "--held-out",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="leave out the documents that a split of this share may hold out (default: 0.1, as "
        "data.held_out; 0 leaves out none)",
    )
    top.add_argument(
        "--text-field", metavar="NAME", default="text", help="of a record (default: text)"
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("tokenizer.py", lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> int:
    bounds = {
        "sentinels": (0, MOST_SENTINELS),
        "vocabulary_size": (1, MOST),
        "sample": (1, 1 << 40),
    }
    for name, (least, most) in bounds.items():
        if not least <= getattr(options, name) <= most:
            flag, given = name.replace("_", "-"), getattr(options, name)
            raise UserError(f"--{flag} must be from {least} to {most:,}, not {given:,}")
    output = Path(options.output)
    if output.exists():
        raise UserError(f"{output} exists: give another --output, or delete it")
    texts = sample(options.input, options.text_field, options.sample, options.held_out)
    output.parent.mkdir(parents=True, exist_ok=True)
    made = train_sentencepiece(texts, options.vocabulary_size, options.sentinels, output)
    _report(made, len(texts))
    for note in notes(options.input):
        print(f"tokenizer.py: {note}", file=sys.stderr)
    return 0


def _report(made: Tokenizer, documents: int) -> None:
    words = made.vocabulary
    print(f"{made.path}: {made.description}, from {documents:,} documents")
    print(f"  {'pieces':<16}0 to {made.base_size - 1}")
    for name, number in words.special.items():
        print(f"  {name:<16}{number}")
    if words.sentinels:
        print(
            f"  {'sentinels':<16}{words.sentinel(0)} down to {words.sentinel(words.sentinels - 1)}"
        )
    print(
        f"settings: data.tokenizer={made.path} data.sentinels={words.sentinels} "
        f"model.vocabulary_size={words.size}"
    )


if __name__ == "__main__":
    sys.exit(main())
