"""A continuation that copies its prefix: every comparable architecture learns to read it, and the prefix
gain shows that it does. The encoder-decoder can do so by cross-attention alone."""

import copy
import json
import random

import numpy as np
import pytest

from megaarch import config
from megaarch.config.schema import Evaluation
from megaarch.evaluation import yardsticks
from megaarch.evaluation.items import Item
from megaarch.evaluation.scorer import Scorer
from megaarch.ingest.prepare import prepare
from megaarch.training.trainer import Trainer
from tests.conftest import tiny_raw

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijklmnop"
LENGTH = 6  # letters of a prefix


def letters(rng):
    return " " + " ".join(rng.sample(LETTERS, LENGTH))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Pairs whose target is their input, and the same as text: a prefix and its copies."""
    folder, rng = tmp_path_factory.mktemp("copy"), random.Random(0)
    drawn = [letters(rng) for _ in range(3000)]
    pairs = [{"input": each, "target": each} for each in drawn]
    for name, records in (("pairs", pairs), ("text", [{"text": each * 6} for each in drawn])):
        lines = [json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found = tiny_raw(folder / "text.jsonl", folder / "cache")
    shape = {"hidden_size": 64, "feed_forward_size": 128, "kv_heads": 4, "sequence_length": 36}
    found["model"] |= shape
    found["training"] |= {"steps": 300, "micro_batch_size": 32, "global_batch_size": 32}
    return found


@pytest.mark.parametrize(
    "preset, objective",
    [
        ("gpt", "supervised"),
        ("prefix_lm", "supervised"),
        ("t5", "supervised"),
        ("xlnet", "permutation_lm"),
    ],
)
def test_every_architecture_reads_the_prefix_that_it_is_to_copy(raw, tmp_path, preset, objective):
    given = copy.deepcopy(raw)
    given["model"]["preset"] = preset
    given["data"]["objective"] = objective
    if objective == "supervised":
        given["data"]["source"] = given["data"]["source"].replace("text.jsonl", "pairs.jsonl")
    given["logging"]["directory"] = str(tmp_path / "run")
    settings = config.resolve(given)
    prepared = prepare(settings.data, settings.model.vocabulary_size)
    trainer = Trainer(settings, prepared)
    trainer.run()
    rng, items = random.Random(1), []
    for document in range(64):
        tokens = prepared.tokenizer.encode(letters(rng)).astype(np.int64)
        size = len(prepared.tokenizer.decode(tokens).encode())
        items.append(Item(document, tokens, tokens, tokens[:0], size, {len(tokens): size}))
    lengths = Evaluation(lengths=tuple({len(item.span) for item in items})).lengths
    scorer = Scorer(trainer.model, settings, prepared.tokenizer.vocabulary, 32)
    found = yardsticks._by_length(scorer, items, lengths)
    gains = found["continuation"][str(max(lengths))].paired_gain.amounts
    assert np.mean(gains) / max(lengths) > 1  # bits a token
    assert found["prefix_gain"] > 1 and found["reads_prefix"]  # bits a byte
