"""Memory and processor time of the plan of an epoch, of made-up lengths alone (the `.bin` is a sparse file):

python -m tests.data.plan_memory FOLDER DOCUMENTS [SETTING=VALUE ...]
"""

import sys
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import yaml

from megaarch import config
from megaarch.data.dataset import Rows
from megaarch.ingest.indexed_dataset import HEADER, MAGIC, VERSION, IndexedDataset, IndexedDocuments
from tests.conftest import tiny_raw
from tests.data.toy_vocabulary import toy_vocabulary

HERE = Path(__file__).parent


def write(path: Path, documents: int) -> None:
    """Log-normal lengths, of 457 tokens in the mean."""
    lengths = np.random.default_rng(0).lognormal(np.log(250), 1.1, documents)
    lengths = np.clip(lengths, 2, 100_000).astype("<i4")
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with path.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for values in (lengths, ends - lengths.astype(np.int64) * 2, np.arange(documents + 1)):
            values.tofile(file)
    with path.with_suffix(".bin").open("wb") as file:
        file.truncate(int(ends[-1]))


def anonymous() -> int:
    """Bytes of memory that no other process has by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def main(folder: str, documents: str, *given: str) -> None:
    path, size = Path(folder) / documents, int(float(documents))
    if not path.with_suffix(".idx").exists():
        write(path, size)
    raw = tiny_raw(HERE, HERE)
    raw["model"] |= {"sequence_length": 2048, "vocabulary_size": 2000}
    raw["data"] |= {"sentinels": 300}
    for setting in given:
        name, value = setting.split("=", 1)
        config.set_path(raw, name, yaml.safe_load(value))
    settings = config.resolve(raw)
    before, done, seen = anonymous(), Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(anonymous())

    class Prepared:
        supervised, tokenizer = False, type("Tokenizer", (), {"vocabulary": toy_vocabulary()})

    Thread(target=watch, daemon=True).start()
    start = time.process_time()
    Prepared.train = [(IndexedDocuments(IndexedDataset(path)), 1.0)]
    rows = Rows(settings.model, settings.data, Prepared, 0)
    took = time.process_time() - start
    done.set()
    peak, held = ((n - before) / size for n in (max(seen), anonymous()))
    print(
        f"{rows.per_epoch:.0f} rows, {took:.1f} s, bytes a document: {peak:.1f} peak, {held:.1f} held"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
