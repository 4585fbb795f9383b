"""Text to token ids and back, from a SentencePiece model or a Hugging Face `tokenizers` file.

Ids run: the file's own pieces, the specials of `data/example.py`, the sentinels. Specials are
always appended here and never taken from the file, and no text encodes to them.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

import numpy as np

from megaarch.config.schema import MOST_SENTINELS
from megaarch.data.example import SPECIALS, Vocabulary
from megaarch.errors import UserError
from megaarch.files import parse_json, read_bytes, replacing
from megaarch.ingest.text_growth import check_growth
from megaarch.ingest.words import begins_word

SPACE = "\u2581"  # how SentencePiece spells a space
FIXED_PIECES = 1 + 1 + 256  # unknown, newline, bytes
LEAST_PIECES = FIXED_PIECES + 2
COVERAGE = 0.9999  # share of the characters that get a piece; the rest are spelt in bytes
LARGEST_VOCABULARY = 1 << 24  # ids
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")  # and the full-width ones


class Tokenizer:
    """A tokenizer file with megaarch's specials and sentinels behind its pieces.

    vocabulary: the ids; vocabulary_size of them if that is given, the ones that are left over
    standing unused between specials and sentinels. base_size: number of the file's own ids.
    pieces: the text that each id of the file spells, None for a control or unknown id.
    fingerprint: of the file and of the ids behind it. text_fingerprint: of what the ids of a
    text depend on: the file and the order of the specials. description: in words. Pickles as its
    path.
    """

    def __init__(
        self, path: str | os.PathLike, sentinels: int = 100, vocabulary_size: int | None = None
    ):
        """UserError where the file is missing, unreadable, of neither kind, or too large for
        `vocabulary_size`, and where there are more sentinels than a configuration may have."""
        if not 0 <= sentinels <= MOST_SENTINELS:
            raise UserError(f"a tokenizer has 0 to {MOST_SENTINELS:,} sentinels, not {sentinels:,}")
        self.path = os.fspath(path)
        self._made = (self.path, sentinels, vocabulary_size)
        content = _read(self.path)
        self._backend = _backend(self.path, content)
        spelt = self._backend.pieces
        self.pieces = [None if piece is None else piece.decode(errors="replace") for piece in spelt]
        self.base_size = len(self.pieces)
        least = self.base_size + len(SPECIALS) + sentinels
        if vocabulary_size is not None and vocabulary_size < least:
            raise UserError(
                f"tokenizer file {self.path} has {self.base_size} pieces, which with "
                f"{len(SPECIALS)} specials and {sentinels} sentinels make {least} ids: raise "
                f"model.vocabulary_size from {vocabulary_size} to at least that"
            )
        size = vocabulary_size or least
        self.vocabulary = _vocabulary(spelt, size, sentinels)
        self.description = f"{self._backend.name}, {self.base_size:,} pieces"
        mark = hashlib.blake2b(content, digest_size=16)
        of_text = mark.copy()
        of_text.update(f"{SPECIALS}".encode())
        self.text_fingerprint = of_text.hexdigest()
        mark.update(f"{SPECIALS} {sentinels} {size}".encode())
        self.fingerprint = mark.hexdigest()

    def __reduce__(self):
        return _load, (*self._made, self.fingerprint)

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [tokens], without any special. UserError where a word has no token (a
        WordLevel file without an unknown token)."""
        try:
            return np.array(self._backend.encode(text), dtype=np.int32)
        except BaseException as error:  # tokenizers raises bare exceptions, and panics as Rust does
            if not _of_library(error):
                raise
            if bad := re.search("[\ud800-\udfff]", text):
                raise UserError(
                    f"character {bad.start() + 1} of the text {text[:40]!r} is half a surrogate pair, or a byte "
                    "that is not UTF-8: give UTF-8 text"
                ) from error
            raise UserError(
                f"tokenizer file {self.path} cannot encode {text[:40]!r}: "
                f"{str(error).splitlines()[0][:120]}"
            ) from error

    def piece_id(self, piece: str) -> int | None:
        """Returns the id of a piece of the file, as the file spells it; its own specials too."""
        return self._backend.piece_id(piece)

    def decode(self, ids: np.ndarray | Iterable[int]) -> str:
        """Returns the text of the ids; specials and sentinels give none."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        return self._backend.decode([i for i in ids.tolist() if 0 <= i < self.base_size])


@lru_cache(maxsize=1)
def _load(path: str, sentinels: int, vocabulary_size: int | None, fingerprint: str) -> Tokenizer:
    """Unpickles a tokenizer. A process that is sent it with every task reads its file once."""
    return Tokenizer(path, sentinels, vocabulary_size)


class _SentencePiece:
    """A model of SentencePiece. pieces: as Tokenizer.pieces, in bytes of UTF-8."""

    name = "SentencePiece"

    def __init__(self, content: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model = model = SentencePieceProcessor(model_proto=content)
        self.pieces = [
            None
            if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            else _spelling(model.id_to_piece(i), model.is_byte(i))
            for i in range(model.get_piece_size())
        ]
        # The model takes a literal U+2581 for a space: spell it in bytes, if the model has them.
        names = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
        ids = [model.piece_to_id(name) for name in names]
        self._space = ids if all(model.is_byte(i) for i in ids) else None

    def piece_id(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def encode(self, text: str) -> list[int]:
        if self._space is None or SPACE not in text:
            return self.model.encode(text)
        first, *rest = text.split(SPACE)
        ids = self.model.encode(first)
        for part in rest:
            ids += self._space + self.model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _HuggingFace:
    """A file of Hugging Face's tokenizers, with the methods of _SentencePiece."""

    name = "Hugging Face tokenizers"

    def __init__(self, content: bytes):
        from tokenizers import Tokenizer as Backend

        text = content.decode()
        self.model = Backend.from_str(text)
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True  # "</s>" in a text is text
        self.pieces = _hugging_face_pieces(self.model.get_vocab(with_added_tokens=True), text)

    def piece_id(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)


def _hugging_face_pieces(ids: dict[str, int], text: str) -> list[bytes | None]:
    """Returns the spelling of every id. Schemes: byte-level, WordPiece, words, metaspace."""
    file = parse_json(text, "the file")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        check_growth(file.get(name))
    model, steps = file["model"], [file.get("pre_tokenizer"), file.get("decoder")]
    added = {token["content"]: token["special"] for token in file.get("added_tokens") or ()}
    kinds = set(re.findall(r'"type": *"(\w+)"', json.dumps(steps)))
    byte_level = _byte_level() if "ByteLevel" in kinds else None
    prefix = model.get("continuing_subword_prefix") or "##"
    highest = max(ids.values(), default=-1)
    if highest >= LARGEST_VOCABULARY:
        raise UserError(f"it has the id {highest}, and ids go up to {LARGEST_VOCABULARY - 1}")
    pieces: list[bytes | None] = [None] * (highest + 1)
    for piece, i in ids.items():
        if added.get(piece) or piece == model.get("unk_token"):
            continue
        if piece in added:
            pieces[i] = piece.encode()
        elif byte_level:
            known = set(piece) <= byte_level.keys()
            pieces[i] = bytes(byte_level[c] for c in piece) if known else piece.encode()
        elif model["type"] == "WordPiece":
            inside = piece.startswith(prefix)
            pieces[i] = (piece[len(prefix) :] if inside else " " + piece).encode()
        elif model["type"] == "WordLevel":
            pieces[i] = (" " + piece).encode()
        else:
            is_byte = bool(model.get("byte_fallback")) and bool(re.fullmatch("<0x..>", piece))
            pieces[i] = _spelling(piece, is_byte)
    return pieces


def _byte_level() -> dict[str, int]:
    """Maps the characters that spell bytes in GPT-2's vocabulary to them: printable ones of Latin-1 to themselves,
    those from U+0100 on to the others."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(themselves))
    spelt = [*themselves, *range(0x100, 0x100 + len(others))]
    return dict(zip(map(chr, spelt), themselves + others, strict=True))


def _spelling(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


def _vocabulary(pieces: list[bytes | None], size: int, sentinels: int) -> Vocabulary:
    base = len(pieces)
    text, word_start, sentence_end = (np.zeros(size, dtype=bool) for _ in range(3))
    for i, spelt in enumerate(pieces):
        if spelt is not None:
            piece = spelt.decode(errors="replace")
            text[i] = True
            word_start[i] = begins_word(spelt)
            sentence_end[i] = "\n" in piece or piece.strip().endswith(SENTENCE_ENDS)
    special = {name: base + k for k, name in enumerate(SPECIALS)}
    return Vocabulary(size, sentinels, special, text, word_start, sentence_end)


def _read(path: str) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist") from None
    except ValueError as error:
        raise UserError(f"tokenizer file {error}") from None
    except OSError as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error.strerror}") from error


def _backend(path: str, content: bytes) -> _SentencePiece | _HuggingFace:
    kind = _HuggingFace if content.lstrip()[:1] == b"{" else _SentencePiece
    if not content:
        raise UserError(f"tokenizer file {path} is empty")
    try:
        return kind(content)
    except BaseException as error:  # both libraries raise bare exceptions of their own
        if not _of_library(error):
            raise
        raise UserError(
            f"tokenizer file {path} is neither a SentencePiece model nor a Hugging Face "
            f"tokenizer.json ({kind.name} says: {str(error).splitlines()[0][:120]})"
        ) from error


def _of_library(error: BaseException) -> bool:
    """Whether it is an error, or a panic of Rust's code, which Python counts among what ends it."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def train_sentencepiece(
    documents: Iterable[str], vocabulary_size: int, sentinels: int, path: str | os.PathLike
) -> Tokenizer:
    """Trains a SentencePiece BPE model on the documents and writes it to `path`.

    vocabulary_size counts the model's pieces, the specials and the sentinels. Any text survives
    encode and decode: identity normalization, no dummy prefix, runs of spaces kept, a newline is a
    piece of its own, and what has no piece is spelt in bytes. A text too small to fill the
    vocabulary leaves ids unused. The same documents give the same file.

    BPE rather than unigram: on the embedded corpus equally short (3.0 bytes a token at 2,048) and
    about ten times faster.
    UserError: the vocabulary cannot hold bytes, specials and sentinels; there is no text.
    """
    from sentencepiece import SentencePieceTrainer

    reserved = len(SPECIALS) + sentinels
    pieces = vocabulary_size - reserved
    if pieces < LEAST_PIECES:
        raise UserError(
            f"vocabulary too small for the sentinels: model.vocabulary_size {vocabulary_size} less "
            f"{sentinels} sentinels and {len(SPECIALS)} specials leaves no room for {LEAST_PIECES} "
            f"pieces; use at least {LEAST_PIECES + reserved}, or lower data.sentinels"
        )
    lines = _training_lines(documents, (pieces - FIXED_PIECES) // 2)
    if not lines:
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,  # rare characters are gone already
        max_sentence_length=1 << 30,  # longer ones would be dropped without a word
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with replacing(path) as aside:
        aside.write_bytes(model.getvalue())
    return Tokenizer(path, sentinels, vocabulary_size)


def _training_lines(documents: Iterable[str], most_characters: int) -> list[str]:
    """Returns the lines of the text, broken at characters that get no piece of their own.

    Those are control characters and U+2581, some of which the trainer would drop whole lines for,
    and the rarest characters, so that at most `most_characters` take a piece.
    """
    texts = list(documents)
    counts = Counter(chain.from_iterable(texts))
    reserved = {c for c in counts if c < " " or c in (SPACE, "\u2585", "\x7f")}
    ranked = sorted(counts.keys() - reserved, key=lambda c: (-counts[c], c))
    left = sum(counts.values()) * (1 - COVERAGE)
    while ranked and (len(ranked) > most_characters or left > counts[ranked[-1]]):
        left -= counts[ranked.pop()]
    breaks = {ord(c): "\n" for c in set(counts) - set(ranked)}
    return [line for text in texts for line in text.translate(breaks).split("\n") if line]
