import base64
import itertools
import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megaarch.data.example import SPECIALS
from megaarch.ingest import embedded_corpus
from megaarch.ingest.text_growth import charsmap_growth, check_growth
from megaarch.ingest.tokenizer import LEAST_PIECES, Tokenizer, train_sentencepiece

pytestmark = pytest.mark.slow

PROSE = [
    "The quick brown fox jumps over the lazy dog.\nIs it lazy?\n\n    def dog(self):\n\treturn 1!",
    "Pack my box with five dozen liquor jugs. How vexingly quick daft zebras jump!",
] * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [text for _, text in embedded_corpus.documents()[:40]]
    return train_sentencepiece(texts, 1024, 100, path)


def test_ids_are_pieces_then_specials_then_sentinels(trained):
    vocabulary = trained.vocabulary
    assert vocabulary.size == 1024
    assert trained.base_size == 1024 - 100 - len(SPECIALS)
    assert [vocabulary.special[name] for name in SPECIALS] == list(range(912, 924))
    assert vocabulary.sentinel(0) == 1023
    assert vocabulary.sentinel(99) == 924
    assert not vocabulary.text[trained.base_size :].any()
    assert not vocabulary.text[0], "the unknown piece spells no text"
    assert vocabulary.text[1 : trained.base_size].all()


TRICKY = [
    "",
    " ",
    "  a  ",
    "\n\n \n",
    "\t",
    "\r\n",
    "\x00",
    "\u2581",
    "a \u2581 b\u2581",
    "<unk>",
    "<s>",
    "</s>",
    "<0x41>",
    "<|endoftext|>",
    "⁇",
    "\u2585",
    "\ufeff",
    "é\u0301",
    "🙂",
    "日本",
]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert trained.vocabulary.text[ids].all()
    assert trained.decode(ids) == text


@settings(max_examples=300)
@given(st.text())
def test_any_text_survives(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_specials_and_sentinels_decode_to_nothing(trained):
    v = trained.vocabulary
    ids = [v.bos, *trained.encode("a b"), v.sentinel(0), *trained.encode(" c"), v.eos, v.mask]
    assert trained.decode(ids) == "a b c"


def pieces_of(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_words_and_sentences(trained):
    text = "It is the name.\nIs the value here? The name"
    ids, v = trained.encode(text), trained.vocabulary
    pieces = pieces_of(trained, text)
    assert "".join(pieces) == text
    for piece, start, end in zip(pieces, v.word_start[ids], v.sentence_end[ids], strict=True):
        assert start == piece[0].isspace(), piece
        assert end == (piece == "\n" or piece.strip()[-1:] in (".", "?")), piece
    newline_byte = 1 + 1 + 0x0A  # behind the unknown and the newline piece
    assert v.word_start[newline_byte]
    assert v.sentence_end[newline_byte]


def test_training_is_deterministic_quiet_and_short(tmp_path, capfd):
    texts = [text for _, text in embedded_corpus.documents()[:40]]
    files = [tmp_path / "a.model", tmp_path / "b.model"]
    one, two = (train_sentencepiece(texts, 1024, 100, file) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert one.fingerprint == two.fingerprint
    other = Tokenizer(files[0], sentinels=10)
    assert other.fingerprint != one.fingerprint
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.iterdir()) == files
    text = "".join(texts)
    assert len(text.encode()) / sum(len(one.encode(t)) for t in texts) > 2.5, "bytes a token"


def test_no_line_is_dropped_from_training(tmp_path):
    # SentencePiece drops lines with tabs, NUL or U+2585, and ones past 4,192 bytes.
    texts = ["zyxwv\tzyxwv \x00", "zyxwv\u2585", "zyxwv " * 2000]
    for text in texts:
        tokenizer = train_sentencepiece([text], 400, 0, tmp_path / "t.model")
        assert len(tokenizer.encode("zyxwv")) == 1, text[:20]


def test_many_rare_characters_leave_room_for_words(tmp_path):
    han = "".join(map(chr, range(0x4E00, 0x5600)))
    tokenizer = train_sentencepiece(["hello " * 500 + han], 400, 0, tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(han)) == han
    assert len(tokenizer.encode("hello")) == 1


@pytest.mark.parametrize("sentinels", [0, 100])
def test_least_vocabulary(tmp_path, sentinels):
    least = LEAST_PIECES + len(SPECIALS) + sentinels
    said = f"vocabulary too small for the sentinels: .* use at least {least}"
    with pytest.raises(ValueError, match=said):
        train_sentencepiece(PROSE, least - 1, sentinels, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())
    tokenizer = train_sentencepiece(PROSE, least, sentinels, tmp_path / "t.model")
    assert tokenizer.vocabulary.size == least
    assert tokenizer.decode(tokenizer.encode(PROSE[0])) == PROSE[0]


def test_a_small_text_leaves_ids_unused(tmp_path):
    tokenizer = train_sentencepiece(["abc abc"], 8192, 100, tmp_path / "t.model")
    assert tokenizer.base_size < 300
    assert tokenizer.vocabulary.size == len(tokenizer.vocabulary.text) == 8192
    assert tokenizer.vocabulary.eos == tokenizer.base_size + 2
    assert tokenizer.vocabulary.sentinel(0) == 8191
    assert not tokenizer.vocabulary.text[tokenizer.base_size :].any()
    tight = Tokenizer(tmp_path / "t.model", 100)
    assert tight.vocabulary.size == tight.base_size + len(SPECIALS) + 100
    assert tight.fingerprint != tokenizer.fingerprint
    with pytest.raises(ValueError, match=f"make {tight.vocabulary.size} ids: raise model.vocab"):
        Tokenizer(tmp_path / "t.model", 100, tight.vocabulary.size - 1)
    with pytest.raises(ValueError, match="no text to train"):
        train_sentencepiece(["\t\n"], 1024, 100, tmp_path / "t.model")


def test_pickles(trained):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.vocabulary.size == 1024
    assert copy.fingerprint == trained.fingerprint
    assert np.array_equal(copy.encode(PROSE[0]), trained.encode(PROSE[0]))


# Hugging Face files ----------------------------------------------------------------------------


def byte_level():
    model = HuggingFace(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    model.train_from_iterator(PROSE, trainer)
    return model


def word_piece():
    model = HuggingFace(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    model.train_from_iterator(PROSE, trainer)
    return model


def metaspace():
    model = HuggingFace(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(PROSE, trainer)
    return model


@pytest.fixture(params=[byte_level, word_piece, metaspace], ids=lambda make: make.__name__)
def hugging_face(request, tmp_path):
    model = request.param()
    model.save(str(tmp_path / "tokenizer.json"))
    return model, Tokenizer(tmp_path / "tokenizer.json", sentinels=5)


def test_hugging_face_ids_are_the_files_own(hugging_face):
    model, tokenizer = hugging_face
    text = PROSE[1]
    assert tokenizer.encode(text).tolist() == model.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == model.decode(model.encode(text).ids)
    assert tokenizer.base_size == model.get_vocab_size()
    assert tokenizer.vocabulary.size == model.get_vocab_size() + len(SPECIALS) + 5


def test_hugging_face_word_starts_and_sentence_ends(hugging_face):
    model, tokenizer = hugging_face
    vocabulary = tokenizer.vocabulary
    encoding = model.encode(PROSE[1], add_special_tokens=False)
    ids = np.array(encoding.ids)
    words = [len(list(group)) for _, group in itertools.groupby(encoding.word_ids)]
    expected = np.zeros(len(ids), dtype=bool)
    expected[np.cumsum([0, *words[:-1]])] = True
    starts = vocabulary.word_start[ids]
    if isinstance(model.model, models.BPE):  # its words include punctuation without a space
        expected &= np.array([PROSE[1][a].isspace() for a, _ in encoding.offsets])
    assert np.array_equal(starts, expected), encoding.tokens
    ends = [
        token
        for token, end in zip(encoding.tokens, vocabulary.sentence_end[ids], strict=True)
        if end
    ]
    assert [token[-1] for token in ends] == [".", "!"]


def test_hugging_face_specials_are_no_text(hugging_face):
    model, tokenizer = hugging_face
    special = [token.content for token in model.get_added_tokens_decoder().values()]
    ids = [model.token_to_id(token) for token in special]
    assert special
    assert not tokenizer.vocabulary.text[ids].any()
    assert tokenizer.vocabulary.text.sum() == model.get_vocab_size() - len(ids)
    for token in set(special) - {"[UNK]", "<unk>"}:
        assert not set(ids) - {0, 1} & set(tokenizer.encode(f"a {token} b").tolist())


@settings(max_examples=100)
@given(st.text())
def test_byte_level_text_survives(byte_level_tokenizer, text):
    assert byte_level_tokenizer.decode(byte_level_tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    byte_level().save(str(path))
    return Tokenizer(path)


def test_a_word_without_a_token_is_one_sentence(tmp_path):
    model = HuggingFace(models.WordLevel({"the": 0, "dog": 1}))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer(tmp_path / "words.json")
    assert tokenizer.encode("the dog").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"words.json cannot encode 'the fox': .*[Uu][Nn][Kk]"):
        tokenizer.encode("the fox")


def test_byte_level_newline_starts_a_word_and_ends_a_sentence(byte_level_tokenizer):
    [newline] = byte_level_tokenizer.encode("\n")
    assert byte_level_tokenizer.vocabulary.word_start[newline]
    assert byte_level_tokenizer.vocabulary.sentence_end[newline]


# Files -----------------------------------------------------------------------------------------


def test_a_foreign_sentencepiece_model(tmp_path):
    (tmp_path / "text").write_text("\n".join(PROSE))
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(tmp_path / "m.model", 0)
    assert not tokenizer.vocabulary.text[:3].any(), "<unk>, <s> and </s>"
    assert tokenizer.decode(tokenizer.encode("five quick dogs")) == "five quick dogs"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "tokenizer file .*t does not exist"),
        (b"", "tokenizer file .*t is empty"),
        (b"\x01\x02garbage", "is neither a SentencePiece model nor"),
        (b'{"model": ', "is neither a SentencePiece model nor"),
        (b'{"model": {"type": "BPE"}}', "is neither a SentencePiece model nor"),
    ],
)
def test_bad_files_are_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        Tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("number", [1 << 24, 4_000_000_000])
def test_a_file_with_huge_ids_is_refused_before_a_table_of_them_is_made(number, tmp_path):
    path = tmp_path / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": number}, "unk_token": "a"}
    path.write_text(json.dumps({"version": "1.0", "model": words}))
    with pytest.raises(ValueError, match=f"it has the id {number}"):
        Tokenizer(path)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$"])
def test_a_normalizer_whose_pattern_explodes_is_told(pattern, tmp_path):
    """The library gives it up by a panic, which is no Exception of Python's."""
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    step = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "normalizer": step}))
    with pytest.raises(ValueError, match="cannot encode 'aaa"):
        Tokenizer(path).encode("a" * 40 + "!")


@pytest.mark.parametrize("place", ["normalizer", "decoder"])
@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}, {"Regex": ""}])
def test_steps_that_multiply_a_text_are_refused_before_one_is_encoded(place, pattern, tmp_path):
    """The library aborts the process where such a text takes all memory."""
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    step = {"type": "Replace", "pattern": pattern, "content": "aa"}
    for count, refused in ((3, False), (40, True)):
        nested = {"type": "Sequence", f"{place}s": [step] * (count - 1)}
        steps = {"type": "Sequence", f"{place}s": [step, nested]}
        path.write_text(json.dumps({"version": "1.0", "model": model, place: steps}))
        if refused:
            with pytest.raises(ValueError, match=r"may make a text \de\+\d\d times as long"):
                Tokenizer(path)
        else:
            assert Tokenizer(path).encode("a").tolist() == [0]


def test_a_charsmap_grows_a_text_by_its_longest_entry():
    charsmap = struct.pack("<I", 8) + bytes(8) + b"one\0" + "five\u2581".encode() + b"\0"
    assert charsmap_growth(charsmap) == 7
    assert charsmap_growth(b"") == 1
    large = struct.pack("<I", 0) + b"a" * 4000 + b"\0"
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(large).decode()}
    with pytest.raises(ValueError, match="may make a text inf times as long"):
        check_growth([step] * 400)


def test_a_process_that_is_sent_a_tokenizer_twice_reads_its_file_once(tmp_path):
    path = tmp_path / "t.model"
    sent = pickle.dumps(train_sentencepiece(["one two three " * 9], 350, 10, path))
    first, second = pickle.loads(sent), pickle.loads(sent)
    assert first is second
    other = train_sentencepiece(["four five six seven " * 9], 350, 10, path)
    assert pickle.loads(pickle.dumps(other)).fingerprint == other.fingerprint != first.fingerprint
