"""Where words begin: at a space and, in scripts that put none between words, at a letter."""

import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import product

# The scripts in modern use whose lines may end between any two letters: those of which CLDR's scriptMetadata.txt says
# "LB letters: YES". Each is what the names of its letters begin with in Unicode, where names never change.
WITHOUT_SPACES = (
    "BOPOMOFO ",
    "CJK ",
    "HALFWIDTH KATAKANA ",
    "HIRAGANA ",
    "KATAKANA ",
    "KHMER ",
    "LAO ",
    "MYANMAR ",
    "NEW TAI LUE ",
    "TAI LE ",
    "TAI THAM ",
    "TAI VIET ",
    "THAI ",
    "YI ",
)
LEAST_LEAD = 0xE0  # of the bytes that begin a character: no such script has a lower one


def begins_word(piece: bytes) -> bool:
    """Whether a piece of text in UTF-8 begins a word: with a space, or with a letter of a script without spaces.

    A piece may hold only the first bytes of a character, where a tokenizer spells it in several. It begins a word if
    every letter that begins so does: e4 does (all are Chinese), ea does not (Korean among others).
    """
    first = piece.decode(errors="replace")[:1]
    if first == "\ufffd" and piece[0] >= LEAST_LEAD:
        return _all_begin_words(piece)
    return first.isspace() or (_is_letter(first) and _without_spaces(first))


@cache
def _all_begin_words(head: bytes) -> bool:
    one, two = (product(range(0x80, 0xC0), repeat=missing) for missing in (1, 2))
    found = _ended(head, one) or _ended(head, two)
    letters = list(filter(_is_letter, found))
    return bool(letters) and all(map(_without_spaces, letters))


def _ended(head: bytes, ends: Iterable[tuple[int, ...]]) -> str:
    return "".join((head + bytes(end)).decode(errors="ignore") for end in ends)


def _is_letter(character: str) -> bool:
    """Whether it is one by itself: signs that repeat or lengthen the one before (Lm) are none."""
    return bool(character) and unicodedata.category(character) in ("Lo", "Lu", "Ll", "Lt")


def _without_spaces(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(WITHOUT_SPACES)
