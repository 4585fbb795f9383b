"""A tokenizer file of another kind, and a trained run, for conversions."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megaarch.training.trainer import Trainer
from tests.tools.conversions import PIECES


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
