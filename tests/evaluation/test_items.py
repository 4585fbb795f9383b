"""Which windows of held-out documents become items."""

import numpy as np
import pytest

from megaarch.config.schema import Evaluation
from megaarch.evaluation.items import cut
from megaarch.ingest.tokenizer import train_sentencepiece

EVALUATION = Evaluation(prefix_tokens=12, continuation_tokens=6)
WORDS = ("river", "stone", "light", "garden", "teacher", "opens", "keeps", "finds")


def prose(words: int) -> str:
    drawn = np.random.default_rng(0).integers(len(WORDS), size=words)
    return " ".join(WORDS[k] for k in drawn)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece([prose(500)], 400, 20, tmp_path_factory.mktemp("t") / "t.model")


@pytest.mark.parametrize("at", [0, 15, 20, 250])  # words before the run: within either step, too
def test_a_run_without_a_word_start_ends_no_document(tokenizer, at):
    before, run, after = prose(at), "x9" * 150, prose(300)
    items = cut([f"{before} {run} {after}"], tokenizer, EVALUATION)
    whole = cut([f"{before} {after}"], tokenizer, EVALUATION)
    assert len(whole) - 2 <= len(items) <= len(whole)
    for item in items:
        assert tokenizer.vocabulary.word_start[item.span[0]]
        assert run[:20] not in tokenizer.decode(item.span)
