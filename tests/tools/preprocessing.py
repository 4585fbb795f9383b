"""The documents and the command line that tests of preprocessing share."""

import os
import random
import signal

from tests.conftest import made_up_text

OUTPUTS = (".bin", ".idx", ".heldout.jsonl", ".manifest.json")
SHARED = "A paragraph which stands in several documents, and so is no test of any model."


def document(seed):
    """Returns a text of several paragraphs, some of them in other documents too; not all of it ASCII."""
    rng = random.Random(seed)
    text = made_up_text(seed, rng.randint(1, 30)) + f"\n\nÜber № {seed}.\n\n\n"
    return text + (SHARED if seed % 3 == 0 else "") * rng.randint(1, 2)


def command(source, tokenizer, output, *more):
    given = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(output)]
    return [*given, "--shard-bytes", "6000", *more]


def stuck(*_):
    """In the place of shards.make: says who is at work, and works for ever."""
    print(os.getpid(), flush=True)
    while True:
        signal.pause()
