"""Tokenizers of every kind go out as ones that encode as training did."""

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megaarch.ingest.tokenizer import Tokenizer
from megaarch.interchange.tokenizer_files import tokenizer_files
from tests.conftest import made_up_text

TEXTS = [made_up_text(seed, 8) for seed in range(20)]
ODD = "<|begin|> [SEP] </s> <|end|>  <extra word> \u00e9 \ufb01\n\n x\t\u6f22 1234 "


def byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(["<|spare|>", "<|begin|>"])  # behind the pieces, as Llama 3's
    begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[begin])
    return backend


def word_piece():
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=own)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(20)
    return backend


def unigram():
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    own = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=own, unk_token="<unk>")
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    backend.add_tokens(["<extra word>"])
    return backend


@pytest.mark.parametrize("kind", [byte_level, word_piece, unigram])
def test_it_encodes_as_training_did(kind, tmp_path):
    kind().save(str(tmp_path / "trained.json"))
    trained = Tokenizer(tmp_path / "trained.json", sentinels=4)
    files, fault = tokenizer_files(trained, longest=9999)
    assert fault is None
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert files["tokenizer.megaarch.json"] == (tmp_path / "trained.json").read_bytes()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*TEXTS, ODD, ""):
        ids = trained.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert kind().encode(text).ids != ids  # the file as it stands adds tokens
    for name in ("pad", "bos", "eos", "mask"):
        assert getattr(theirs, f"{name}_token_id") == trained.vocabulary.special[name]


def test_a_gap_in_the_ids_is_told(tmp_path):
    pieces = {"<unk>": 0, "word": 1, "other": 5}
    Backend(models.WordLevel(pieces, unk_token="<unk>")).save(str(tmp_path / "trained.json"))
    files, fault = tokenizer_files(Tokenizer(tmp_path / "trained.json", sentinels=4), longest=9)
    assert "leave a gap" in fault and list(files) == ["tokenizer.megaarch.json"]
