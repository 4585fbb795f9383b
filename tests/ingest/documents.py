"""What tests of preparation share: made-up documents, a file of them, and what training reads."""

import json
import random

WORDS = "time person year way day thing man world life hand part child eye woman place".split()  # noqa: SIM905


def text(seed, sentences=12):
    """A document of short paragraphs, all of its own."""
    rng = random.Random(seed)
    rows = [" ".join(rng.choices(WORDS, k=11)) + f" {seed}.{i}.\n" for i in range(sentences)]
    return "\n".join(rows)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def train_texts(prepared):
    """What training reads, decoded, a document each."""
    eos = prepared.tokenizer.vocabulary.eos
    found = []
    for dataset, _ in prepared.train:
        for i in range(len(dataset)):
            assert dataset[i][-1] == eos
            assert eos not in dataset[i][:-1]
            found.append(prepared.tokenizer.decode(dataset[i]))
    return found
