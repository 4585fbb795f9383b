"""Where words begin in text without spaces, and what is made of it there."""

# ruff: noqa: RUF001 (full-width marks are what is tested)

import re
import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, decoders

from megaarch.config.schema import Evaluation
from megaarch.data.example import generator
from megaarch.data.objectives.cloze import MaskedLM
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.permutation import PermutationLM
from megaarch.data.objectives.spans import word_starts
from megaarch.errors import UserError
from megaarch.evaluation.items import cut, text_warnings
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece
from megaarch.ingest.words import begins_word

EVALUATION = Evaluation(prefix_tokens=12, continuation_tokens=6)
SAYINGS = {  # how each script says "this is a long text", more or less
    "Chinese": "这是一段很长的文字，没有空格。",
    "Japanese": "これは長い文章です、スペースがありません。",
    "Thai": "นี่คือข้อความยาวที่ไม่มีช่องว่าง",
    "Lao": "ນີ້ແມ່ນຂໍ້ຄວາມຍາວທີ່ບໍ່ມີຍະຫວ່າງ",
    "Khmer": "នេះជាអត្ថបទវែងដែលគ្មានដកឃ្លា",
    "Burmese": "ဤသည်မှာနေရာလွတ်မပါသောစာသားရှည်ဖြစ်သည်",
}
SPACED = (
    "The word, and 3 more.\n\tÄpfel für Émile; Привет, мир! שלום עולם مرحبا بالعالم नमस्ते दुनिया "
    "안녕하세요 ㅋㅋㅋ 「세계」 ㈜ ༄༅། བོད་ཡིག ሰላም, ዓለም 😀 ½ – “x” naïve\u00a0no\u3000wide ՀԱՅ"
)


@pytest.mark.parametrize("language", SAYINGS)
def test_a_letter_begins_a_word_where_no_spaces_do(language):
    text = SAYINGS[language]
    for character in text:
        letter = unicodedata.category(character) == "Lo"
        assert begins_word(character.encode()) == letter, character
        assert begins_word(f"{character}a".encode()) == letter
        assert not begins_word(f"a{character}".encode())
    assert sum(begins_word(c.encode()) for c in text) > len(text) / 3


def test_punctuation_marks_and_digits_begin_none():
    for character in "，。「」！？ー々゛ﾞ〇\u0e31\u0e34\u0e48\u0e51\u17b7\u102d１Ａ":
        assert not begins_word(character.encode()), character


def test_words_of_scripts_with_spaces_begin_as_they_did():
    for piece in [*SPACED, *SPACED.split(), *(f" {word}" for word in SPACED.split()), ""]:
        assert begins_word(piece.encode()) == piece[:1].isspace(), piece


def test_part_of_a_character_begins_a_word_if_all_that_it_may_be_do():
    letters: dict[bytes, set[bool]] = {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in ("Lo", "Lu", "Ll", "Lt"):
            spelt = character.encode()
            for end in range(1, len(spelt)):
                letters.setdefault(spelt[:end], set()).add(begins_word(spelt))
    for head, begin in letters.items():
        assert begins_word(head) == (begin == {True}), head


def test_bytes_of_chinese_begin_a_word_and_those_of_korean_do_not():
    assert [begins_word(bytes([b])) for b in (0xE4, 0xE9, 0xE3, 0xEA, 0xE0, 0xF0, 0x80, 0xC3)] == [
        *[True] * 2,
        *[False] * 6,
    ]
    assert begins_word("ひ".encode()[:2]) and begins_word("ก".encode()[:2])
    assert not begins_word("ㄱ".encode()[:2]) and not begins_word("😀".encode()[:3])


# A vocabulary -----------------------------------------------------------------------------------


def chinese(characters: int, seed: int = 0) -> str:
    """Made-up words of one to three characters, with a comma or a full stop behind some."""
    rng = np.random.default_rng(seed)
    words = ["".join(map(chr, 0x4E00 + rng.integers(300, size=n))) for n in (1, 2, 2, 3) * 50]
    text = ""
    while len(text) < characters:
        text += words[rng.integers(len(words))] + ["", "", "", "", "，", "。"][rng.integers(6)]
    return text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = [chinese(2000, seed) for seed in range(4)]
    return train_sentencepiece(documents, 1200, 40, tmp_path_factory.mktemp("t") / "t.model")


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return tokenizer.encode(chinese(2000, 1))[:512].astype(np.int64)


def test_items_are_cut_from_text_without_spaces(tokenizer):
    text = chinese(2000, 9)
    items = cut([text], tokenizer, EVALUATION)
    assert len(items) > len(tokenizer.encode(text)) / 30
    for item in items:
        span = tokenizer.decode(item.span)
        assert span in text and item.span_bytes == len(span.encode())


def test_objectives_find_words_in_text_without_spaces(tokenizer, tokens):
    """As many as in text whose every token begins a word, or nearly."""
    vocabulary = tokenizer.vocabulary
    starts = word_starts(tokens, vocabulary)
    assert starts.mean() > 0.7
    made = [Denoising()(tokens, vocabulary, generator(0, k)) for k in range(20)]
    assert np.mean([(each.inputs == vocabulary.mask).sum() for each in made]) > 20
    permutation = PermutationLM()
    spans = [permutation.spans(starts, generator(0, k)).sum() for k in range(20)]
    assert np.mean(spans) > 0.7 * permutation.lengths(len(tokens)).targets
    whole_words = MaskedLM(whole_word_masking=True)
    assert len(whole_words(tokens, vocabulary, generator(0, 0)).targets) > 70


def test_a_character_spelt_in_bytes_begins_a_word_with_the_first(tokenizer):
    ids = tokenizer.encode("\u9f98\u9f98")
    starts = tokenizer.vocabulary.word_start[ids]
    assert starts.tolist() == [True, False, False] * 2
    assert not tokenizer.vocabulary.word_start[tokenizer.encode("\u3142\uac00")].any()


def test_a_byte_level_tokenizer_has_the_same_words(tmp_path):
    model = ByteLevelBPETokenizer()
    model.train_from_iterator([SPACED, *SAYINGS.values()] * 2, vocab_size=400, show_progress=False)
    model.save(str(tmp_path / "bytes.json"))
    tokenizer = Tokenizer(tmp_path / "bytes.json")
    decode = decoders.ByteLevel().decode
    for piece, i in model.get_vocab().items():
        assert tokenizer.pieces[i] == decode([piece])
    text, end, expected = SAYINGS["Chinese"].encode(), 0, []
    tokens = model.encode(SAYINGS["Chinese"]).tokens
    for piece in tokens:  # each of its characters is a byte
        expected.append(begins_word(text[end : end + 3]))
        end += len(piece)
    found = tokenizer.vocabulary.word_start[tokenizer.encode(SAYINGS["Chinese"])]
    assert found.tolist() == expected and 6 < found.sum() < len(tokens)
    ids = tokenizer.encode(SPACED)
    pieces = [tokenizer.pieces[i] for i in ids]
    starts = tokenizer.vocabulary.word_start[ids]
    assert starts.tolist() == [piece[:1].isspace() for piece in pieces]


def test_text_with_too_few_words_is_said_to_be_that(tokenizer):
    text = "0123456789" * 40
    with pytest.raises(
        UserError, match=r"^0\.0% of the tokens of held-out text begin a word, too few"
    ):
        cut([text], tokenizer, EVALUATION)
    with pytest.raises(UserError, match="no held-out document has 18 tokens for one item"):
        cut([text[:9], chinese(10)], tokenizer, EVALUATION)
    [said] = text_warnings([text, chinese(10)], tokenizer)
    assert re.match(r"Of the tokens of held-out text [12]\.\d% begin a word: items are cut", said)
    assert not text_warnings([chinese(100), "", text[:20]], tokenizer)
    assert not text_warnings([""], tokenizer)
