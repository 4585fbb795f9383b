"""The tokenizer files of a Hugging Face folder: they encode a text as training did.

Training ignores a file's template (tokens before a text and behind it), its truncation and its
padding, and takes the names of its special tokens in a text for text. `tokenizer.json` has none of
these, and megaarch's specials behind the pieces, under names that no text has. The file that was
trained with stands beside it, as it was, for the way back.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from megaarch.ingest.tokenizer import SPACE, Tokenizer
from megaarch.interchange.files import TRAINED

SPECIAL = "<|megaarch_{}|>"


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> tuple[dict[str, bytes], str | None]:
    """Contents by name, and why there is no tokenizer.json among them, or None.

    longest: tokens of a row.
    """
    content = Path(tokenizer.path).read_bytes()
    is_json = content.lstrip()[:1] == b"{"
    files = {TRAINED[0 if is_json else 1]: content}
    described = _without_template(json.loads(content)) if is_json else _of_sentencepiece(content)
    if described is None:
        return files, "its SentencePiece model is no BPE model over the plain text"
    described["added_tokens"] += _specials(tokenizer)
    text = json.dumps(described, ensure_ascii=False)
    if fault := _fault(tokenizer, text):
        return files, fault
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    names = ("pad", "bos", "eos", "mask")
    config |= {f"{name}_token": SPECIAL.format(name) for name in names}
    files["tokenizer.json"] = text.encode()
    files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    return files, None


def _without_template(file: dict[str, Any]) -> dict[str, Any]:
    vocabulary = file["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram's: [piece, score]
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added = []
    for token in file.get("added_tokens") or ():
        if not token["special"]:
            added.append(token)
        elif token["content"] not in vocabulary:  # its id stays taken, its name is text
            added.append(token | {"content": SPECIAL.format(f"unused_{token['id']}")})
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return file | nothing | {"added_tokens": added}


def _of_sentencepiece(content: bytes) -> dict[str, Any] | None:
    """A tokenizer.json with the pieces of a SentencePiece BPE model that neither normalizes nor adds
    a space ahead, as `data.tokenizer` trains them; None of another."""
    try:
        # protobuf makes the class when the module is imported
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:  # of protobuf
        return None
    model = ModelProto.FromString(content)
    rule = model.normalizer_spec
    plain = not (
        rule.precompiled_charsmap or rule.add_dummy_prefix or rule.remove_extra_whitespaces
    )
    if model.trainer_spec.model_type != model.trainer_spec.BPE or not plain:
        return None
    kinds = model.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    for piece in model.pieces:
        if piece.type == kinds.NORMAL:
            word = piece.piece
            halves = ((word[:i], word[i:]) for i in range(1, len(word)))
            known = [(ids[a], ids[b]) for a, b in halves if a in ids and b in ids]
            merges += [(-piece.score, pair) for pair in sorted(known)]
    merges.sort(key=lambda merge: merge[0])
    names = [piece.piece for piece in model.pieces]
    pairs = [(names[a], names[b]) for _, (a, b) in merges]
    unknown = names[model.trainer_spec.unk_id]
    backend = Backend(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    own = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    backend.add_tokens([AddedToken(name, normalized=False) for name in own])
    return json.loads(backend.to_str())


def _specials(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = tokenizer.vocabulary.special
    return [
        {"id": i, "content": SPECIAL.format(name), **flags, "special": True}
        for name, i in ids.items()
    ]


def _fault(tokenizer: Tokenizer, text: str) -> str | None:
    """What is wrong with a tokenizer.json: it is tried on all pieces and on what formats differ in."""
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # tokenizers raises bare exceptions
        return str(error)
    for name, i in tokenizer.vocabulary.special.items():
        if backend.token_to_id(SPECIAL.format(name)) != i:
            return f"its ids leave a gap, and {name} would not get {i}"
    pieces = [piece for piece in tokenizer.pieces if piece]
    tried = [
        "",
        " ",
        "a  b \n\n c\t",
        " 12 345",
        "\ufb01 \u2460 e\u0301 \u6f22",
        "</s> [SEP] <pad>",
    ]
    for probe in (*tried, "".join(pieces), " ".join(reversed(pieces))):
        if backend.encode(probe).ids != tokenizer.encode(probe).tolist():
            return f"it would encode {probe[:20]!r} in another way"
    return None
