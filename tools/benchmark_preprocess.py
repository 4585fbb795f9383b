"""Compares the cost of shards with the tokenizer alone, in alternating pairs:
`python tools/benchmark_preprocess.py --input corpus.jsonl --tokenizer t.model`."""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.errors import UserError
from megaarch.ingest import corpus, shards
from megaarch.ingest.lines import Shard
from megaarch.ingest.tokenizer import Tokenizer

MOST_PAIRS = 1000


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="benchmark_preprocess.py",
        description="Bytes of text a second of the tokenizer library alone and of tokenizing a "
        "shard (reading, parsing, hashing, writing), in one process each, in alternating pairs.",
    )
    top.add_argument("--input", metavar="FILE", required=True, help="a file of text")
    top.add_argument("--tokenizer", metavar="FILE", required=True)
    top.add_argument("--pairs", metavar="N", type=int, default=7, help="default: 7")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("benchmark_preprocess.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    if not 1 <= options.pairs <= MOST_PAIRS:
        raise UserError(f"--pairs must be from 1 to {MOST_PAIRS}, not {options.pairs}")
    tokenizer = Tokenizer(options.tokenizer, sentinels=0)
    shard = Shard(Path(options.input))
    encode = _library(options.tokenizer)
    texts = list(dict.fromkeys(text for (text,) in corpus.read(shard)))
    if not texts:
        raise UserError(f"{options.input} holds no text")
    size = sum(len(text.encode()) for text in texts)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        # a share so small that all of the text is tokenized, and the split's work is done
        job = shards.Job(Path(folder), tokenizer, held_out=1e-9)
        shards.make(0, shard, job)  # warm
        for _ in range(options.pairs):
            alone = _seconds(lambda: [encode(text) for text in texts])
            ours = _seconds(lambda: shards.make(0, shard, job))
            ratios.append(alone / ours)
            print(f"alone {size / alone / 1e6:.2f} MB/s, shard {size / ours / 1e6:.2f} MB/s")
    print(
        f"throughput of a shard / of the library alone: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}; {size:,} bytes, {platform.machine()}, "
        f"Python {platform.python_version()}"
    )
    return 0


def _library(path: str) -> Callable[[str], object]:
    if Path(path).read_bytes().lstrip()[:1] == b"{":
        from tokenizers import Tokenizer

        model = Tokenizer.from_file(path)
        return lambda text: model.encode(text, add_special_tokens=False).ids
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=path).encode


def _seconds(work: Callable[[], object]) -> float:
    # processor time: both run on one core, and neighbours should not count
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
