"""How much longer than a text the steps of a tokenizer file may make it.

Normalizers and decoders may put a text in place of each character, one after the other: forty steps of a small file
write "a" as a thousand billion of them, and the libraries end the process where memory runs out.
"""

import base64
import math
import struct
from typing import Any

from megaarch.errors import UserError

# Bytes for each byte. A charsmap of NFKC may give 33, a step that replaces runs 2.
MOST_GROWTH = 4096


def check_growth(steps: Any) -> None:
    """UserError where the steps of a tokenizer.json, a list or a tree of them, multiply a text by more than
    MOST_GROWTH."""
    found = _growth(steps)
    if found > MOST_GROWTH:
        raise UserError(
            f"its steps may make a text {found:.0e} times as long, and {MOST_GROWTH:,} is the most"
        )


def charsmap_growth(charsmap: bytes) -> int:
    """Returns the most bytes that a precompiled charsmap of SentencePiece puts in place of one: its
    table is the length of a trie, the trie, and texts that end in a zero byte each."""
    if len(charsmap) < 4:
        return 1
    (trie,) = struct.unpack("<I", charsmap[:4])
    return max(1, *map(len, charsmap[4 + trie :].split(b"\0")))


def _growth(step: Any) -> float:
    if isinstance(step, list):
        return math.prod(map(_growth, step), start=1.0)
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern"), str(step.get("content", "")).encode()
        replaced = str(pattern.get("String", "")).encode() if isinstance(pattern, dict) else b""
        # a regular expression may match between any two bytes and keep both
        return max(1.0, len(content) / len(replaced)) if replaced else 1.0 + len(content)
    if step.get("type") == "Precompiled":
        return charsmap_growth(base64.b64decode(step.get("precompiled_charsmap") or ""))
    return _growth([value for value in step.values() if isinstance(value, (list, dict))])
