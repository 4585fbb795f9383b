"""For conversions a tokenizer file of another kind and a trained run; for preprocessing its input and
what it makes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megaarch.ingest.tokenizer import train_sentencepiece
from megaarch.training.trainer import Trainer
from tests.tools.conversions import PIECES
from tests.tools.preprocessing import command, document
from tests.tools.run import tool


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A Hugging Face tokenizer file with specials and a sentinel of its own."""
    own = ["<unk>", "<pad>", "</s>", "[MASK]", "<extra_id_0>"]
    names = [*own, *(f"word{n}" for n in range(PIECES - len(own)))]
    backend = Backend(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def run(tiny, prepared):
    """A tiny trained run of a preset: its folder and settings."""

    def make(preset="gpt", **given):
        settings = tiny(preset, **{"training__steps": 2, **given})
        Trainer(settings, prepared).run()
        return Path(settings.logging.directory), settings

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """JSON lines with duplicates near and far, blank lines and a blank document."""
    texts = [document(seed) for seed in range(90)]
    texts = [*texts[:60], texts[59], texts[3], " \n", *texts[60:], texts[80]]
    path = tmp_path_factory.mktemp("source") / "text.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\n\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece([document(seed) for seed in range(9)], 400, 10, path)
    return str(path)


@pytest.fixture(scope="module")
def made(source, tokenizer, tmp_path_factory):
    """The prefix of what one process makes."""
    prefix = tmp_path_factory.mktemp("made") / "deep" / "x"
    assert tool("preprocess")(command(source, tokenizer, prefix)) == 0
    return prefix
