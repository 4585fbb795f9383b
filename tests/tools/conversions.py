"""What the tests of conversions share: folders of Hugging Face's own models, and the command."""

import json
import shutil

from tests.interchange.models import scattered
from tests.tools.run import tool

PIECES = 140  # of the vocabularies of 150: the rest are rows that no text has


def saved(name, words, folder, **options):
    model = scattered(name)
    model.save_pretrained(folder, **options)
    if name == "t5-v1.1":  # transformers 5 forgets that it is untied
        given = json.loads((folder / "config.json").read_text())
        given |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}
        (folder / "config.json").write_text(json.dumps(given))
    shutil.copyfile(words, folder / "tokenizer.json")
    return folder, model


def convert(*arguments):
    return tool("convert")([str(argument) for argument in arguments])
