"""Text to tokens for training, in a batch job: `python tools/preprocess.py --help`."""

import argparse
import sys
import time

from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.ingest.manifest import DatasetManifest
from megaarch.ingest.preprocess import Request, preprocess
from megaarch.ingest.shards import SHARD_BYTES

EPILOG = """\
examples:
  python tools/preprocess.py --input corpus/ --tokenizer t.model --output data/corpus --workers 16
  mpiexec -n 64 python tools/preprocess.py --input corpus/ --tokenizer t.model --output data/corpus
  megaarch train CONFIG --set data.source=data/corpus.bin data.tokenizer=t.model

Run the same command again after a stop and it continues: finished shards are verified and kept.
The files do not depend on how many processes made them.
"""

OF_COMMAND = ("input", "workers", "debug")  # arguments that are none of the job's


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="preprocess.py",
        description="Tokenize text into OUTPUT.bin and OUTPUT.idx, which data.source reads, and "
        "hold documents out into OUTPUT.heldout.jsonl: the same documents and tokens that megaarch "
        "train makes of the text by itself.",
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
    top.add_argument(
        "--tokenizer",
        metavar="FILE",
        required=True,
        help="a SentencePiece .model (tools/tokenizer.py makes one) or Hugging Face tokenizer.json",
    )
    top.add_argument("--output", metavar="PREFIX", required=True, help="of the files that it makes")
    top.add_argument(
        "--workers", metavar="N", type=int, default=1, help="processes on this machine (default: 1)"
    )
    top.add_argument(
        "--text-field", metavar="NAME", default="text", help="of a record (default: text)"
    )
    top.add_argument(
        "--held-out",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="of the text's bytes, whole documents, chosen by the hash of their text "
        "(default: 0.1, as data.held_out; 0 holds out nothing)",
    )
    top.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token, as training expects",
    )
    top.add_argument(
        "--skip-malformed",
        action="store_true",
        help="count and name malformed records and go on; without it the first one ends the job",
    )
    top.add_argument(
        "--shard-bytes",
        metavar="N",
        type=int,
        default=SHARD_BYTES,
        help=f"of a JSON lines file or a parquet file's groups to a shard (default: {SHARD_BYTES})",
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("preprocess.py", lambda: run(options), options.debug, continues=True)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.ingest.sources import notes
    from megaarch.ingest.workers import workers
    from megaarch.study.progress_bar import ProgressDisplay

    given = {name: value for name, value in vars(options).items() if name not in OF_COMMAND}
    request = Request(sources=tuple(options.input), **given)
    with workers(options.workers) as (leads, executor):
        if not leads:
            return 0
        with ProgressDisplay(Console(stderr=True)) as display:
            made = preprocess(request, executor, Meter(display.show))
    _report(request.prefix, made)
    for note in notes(options.input) + made.notes:
        print(f"preprocess.py: {note}", file=sys.stderr)
    return 0


class Meter:
    """The progress line: documents and bytes of text, each a second, of what this job made."""

    def __init__(self, show):
        self.show, self.started = show, time.perf_counter()
        self.documents = self.bytes = self.kept = self.shards = 0

    def __call__(self, done: int, of: int, summary, found: bool) -> None:
        from megaarch.study.progress_bar import clock

        if found:
            self.kept += 1
            self.show("preprocess", None, f"{self.kept} of {of} shards were finished before")
            return
        self.shards += 1
        self.documents += summary.documents
        self.bytes += summary.bytes
        seconds = time.perf_counter() - self.started
        text = (
            f"shard {done} of {of}  {self.documents / seconds:,.0f} documents/s  "
            f"{self.bytes / seconds / 1e6:.2f} MB/s  "
            f"{clock(seconds * (of - done) / self.shards)} left"
        )
        self.show("preprocess", done / of, text)


def _report(prefix: str, made: DatasetManifest) -> None:
    print(
        f"{prefix}.bin: {made.train_documents:,} documents, {made.train_tokens:,} tokens of "
        f"{made.train_bytes:,} bytes"
    )
    if made.heldout_documents:
        print(
            f"{prefix}.heldout.jsonl: {made.heldout_documents:,} documents, "
            f"{made.heldout_bytes:,} bytes ({made.dropped_paragraphs:,} paragraphs that also "
            "stand in train left out)"
        )
    print(f"{made.duplicates:,} duplicates and {made.malformed:,} malformed records skipped")
    for record in made.malformed_records[:10]:
        print(f"  {record}")
    if made.malformed > 10:
        print(f"  and {made.malformed - 10:,} more (the first 100 in {prefix}.manifest.json)")


if __name__ == "__main__":
    sys.exit(main())
