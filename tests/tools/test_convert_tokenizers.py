"""The tokenizer that a conversion writes encodes as training did, and comes back as it was."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
import yaml
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from megaarch.checkpoint.record import SavedTokenizer
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.interchange import files, verify
from megaarch.interchange.convert import settings_of
from tests.tools.conversions import PIECES, convert, saved


def with_template(path):
    """A tokenizer.json that adds its own specials, cuts and pads; one of them is no piece."""
    own = ["<s>", "</s>", "<unk>", "<pad>"]
    names = [*own, *(f"word{n}" for n in range(PIECES - len(own) - 1))]
    backend = Backend(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([*own, "<|new|>"])
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(path))
    return path


TEXT = "word3 word4 </s> <|new|> word5  word6\nword7 word8 word9"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-v1.1", "bart"])
def test_what_goes_out_encodes_as_training_did_and_comes_back(family, tmp_path):
    words = with_template(tmp_path / "tokenizer.json")
    folder, _ = saved(family, words, tmp_path / "theirs")
    for source, target, to in (
        (folder, "run", "checkpoint"),
        (tmp_path / "run", "hf", "hf"),
        (tmp_path / "hf", "again", "checkpoint"),
    ):
        assert convert(source, tmp_path / target, "--to", to) == 0
    before, after = (files.read_checkpoint(tmp_path / name) for name in ("run", "again"))
    record = before.record.tokenizer
    settings = settings_of(before.record)
    size, sentinels = settings.model.vocabulary_size, settings.data.sentinels
    trained = Tokenizer(record.path, sentinels, size)
    encodes_as_trained(tmp_path / "hf", trained, TEXT)
    assert after.record.tokenizer.fingerprint == record.fingerprint
    assert settings_of(after.record).model == settings.model
    verify.check_tensors(before.weights, after.weights, "again")


def encodes_as_trained(folder, trained, text):
    ids, vocabulary = trained.encode(text).tolist(), trained.vocabulary
    assert len(ids) > 5
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs(text)["input_ids"] == ids
    assert Backend.from_file(str(folder / "tokenizer.json")).encode(text).ids == ids
    shown = theirs.decode([vocabulary.bos, *ids, vocabulary.eos], skip_special_tokens=True)
    assert shown == theirs.decode(ids)
    prompt = theirs(f"{theirs.bos_token}{text}{theirs.mask_token}")["input_ids"]
    assert prompt == [vocabulary.bos, *ids, vocabulary.mask]
    said = json.loads((folder / "config.json").read_text())
    generation = folder / "generation_config.json"
    assert generation.exists() or said["model_type"] == "bert"
    for name in ("pad", "bos", "eos"):
        row = vocabulary.special[name]
        assert said[f"{name}_token_id"] == getattr(theirs, f"{name}_token_id") == row
        if generation.exists():
            assert json.loads(generation.read_text())[f"{name}_token_id"] == row
            loaded = transformers.GenerationConfig.from_pretrained(folder)
            assert getattr(loaded, f"{name}_token_id") == row


def test_a_sentencepiece_model_goes_out_as_a_tokenizer_json_that_encodes_alike(run, tmp_path):
    folder, settings = run("gpt")
    assert convert(folder, tmp_path / "hf", "--to", "hf") == 0
    record = files.read_checkpoint(folder).record
    size, sentinels = settings.model.vocabulary_size, settings.data.sentinels
    trained = Tokenizer(record.tokenizer.path, sentinels, size)
    text = "The river carries  the stone.\n\n  near 1234 \u6f22 caf\u00e9\t</s> <unk> [MASK] "
    encodes_as_trained(tmp_path / "hf", trained, text)


def test_a_tokenizer_that_transformers_has_no_like_of_is_told(run, tmp_path, capsys):
    from sentencepiece import SentencePieceTrainer

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the river {n} carries the stone" for n in range(200)))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "t"), vocab_size=40, model_type="unigram"
    )
    folder, _ = run("gpt")
    weights, record = files.read_checkpoint(folder)
    settings = settings_of(record)
    size, sentinels = settings.model.vocabulary_size, settings.data.sentinels
    given = Tokenizer(tmp_path / "t.model", sentinels, size)
    record.tokenizer = SavedTokenizer(path=given.path, fingerprint=given.fingerprint)
    files.write_checkpoint(tmp_path / "other", files.Saved(weights, record))
    assert convert(tmp_path / "other", tmp_path / "hf", "--to", "hf") == 0
    assert "without tokenizer.json" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert convert(tmp_path / "hf", tmp_path / "again") == 0
    again = files.read_checkpoint(tmp_path / "again").record.tokenizer
    assert again.fingerprint == given.fingerprint


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
    """(a run whose tokenizer is named from the folder that it was started in, that file), seen from
    another folder."""
    folder, _ = run("gpt", logging__directory=str(tmp_path / "runs" / "gpt"))
    weights, record = files.read_checkpoint(folder)
    (tmp_path / "data").mkdir()
    file = shutil.copy(record.tokenizer.path, tmp_path / "data" / "t.model")
    record.tokenizer.path = "data/t.model"
    files.write_checkpoint(tmp_path / "runs" / "moved", files.Saved(weights, record))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "runs" / "moved", file


def test_a_tokenizer_is_found_from_any_folder(moved, tmp_path):
    folder, file = moved
    assert convert(folder, "hf", "--to", "hf", "--no-verify") == 0
    assert json.loads(Path("hf/config.json").read_text())["eos_token_id"] is not None
    assert Path("hf/tokenizer.megaarch.model").read_bytes() == file.read_bytes()
    assert convert(folder, tmp_path / "runs" / "gpt.safetensors", "--to", "safetensors") == 0
    for source in (folder, tmp_path / "runs" / "gpt.safetensors"):
        run = f"of-{source.name}"
        assert convert(source, run) == 0
        assert yaml.safe_load(Path(run, "start.yaml").read_text())["data"]["tokenizer"] == str(file)
        assert files.read_checkpoint(Path(run)).record.tokenizer.path == str(file)


@pytest.mark.parametrize("to", ["hf", "safetensors", "checkpoint"])
def test_a_given_tokenizer_takes_the_place_of_one_that_is_gone(to, moved, words, tmp_path, capsys):
    folder, file = moved
    other = file.rename(tmp_path / "elsewhere" / "u.model")
    given = (folder, "out", "--to", to, "--no-verify", "--tokenizer")
    assert convert(*given, words) == 2
    assert f"{words} is not the one that the run was trained with" in capsys.readouterr().err
    assert convert(*given, "/nowhere") == 2
    assert "/nowhere does not exist" in capsys.readouterr().err
    assert not Path("out").exists()
    assert convert(*given, "u.model") == 0
    if to == "hf":
        assert Path("out/tokenizer.megaarch.model").read_bytes() == other.read_bytes()
    else:
        read = files.read_safetensors if to == "safetensors" else files.read_checkpoint
        assert read(Path("out")).record.tokenizer.path == str(other)


@pytest.mark.parametrize(
    "said, trained", [({"extra_ids": 20}, 20), ({"extra_ids": 99}, 0), (None, 0)]
)
def test_sentinels_behind_the_pieces_of_a_sentencepiece_file_are_kept(
    said, trained, words, tmp_path, capsys
):
    """T5's file ends before them: <extra_id_0> is the last row of `extra_ids`, as transformers counts. Where
    there are no rows for so many, or for the usual 100, all start from the mean."""
    folder, model = saved("t5-v1.1", words, tmp_path / "theirs")
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"the quick fox jumps over {n} lazy dogs in {n * n}" for n in range(300))
    )
    kinds = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    given = {"input": str(text), "model_prefix": str(folder / "spiece"), "vocab_size": 90}
    sentencepiece.SentencePieceTrainer.train(**given, **kinds)
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert convert(folder, tmp_path / "out", "--sentinels", 30) == 0
    assert f"30 sentinels, {trained} of which were trained" in capsys.readouterr().out
    found = files.read_checkpoint(tmp_path / "out")
    rows, theirs = found.weights["embedding.weight"], model.shared.weight.detach()
    size = settings_of(found.record).model.vocabulary_size
    vocabulary = Tokenizer(found.record.tokenizer.path, 30, size).vocabulary
    for k in range(30):
        wanted = theirs[90 + trained - 1 - k] if k < trained else theirs[:90].mean(0)
        torch.testing.assert_close(rows[vocabulary.sentinel(k)], wanted, rtol=0, atol=1e-6)


def test_further_ids_that_end_an_answer_are_named(words, tmp_path, capsys):
    folder, _ = saved("llama", words, tmp_path / "theirs")
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | {"eos_token_id": [2, 7, 9]}))
    assert convert(folder, tmp_path / "out") == 0
    assert "an answer ends at id 2 alone, and no longer at 7, 9" in capsys.readouterr().out
