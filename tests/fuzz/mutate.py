"""Bad inputs from good ones, by a seeded generator: bytes changed, and JSON values replaced."""

import copy
import json
import random
from typing import Any

ODD = (
    None,
    True,
    -1,
    0,
    1 << 63,
    1e308,
    "",
    "x",
    "a\0b",
    "../../etc/passwd",
    "/dev/zero",
    [],
    {},
    [[]],
)
PIECES = (b"\0", b"\xff", b"{", b"[", b"]", b"}", b'"', b",", b"&a [*a]", b"-9e999", b"\n", b": ")


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four cuts, repetitions, flips or insertions."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            del found[at : at + rng.randint(1, 64)]
        elif kind == 2 and at < len(found):
            found[at] = rng.randrange(256)
        elif kind == 3:
            found[at:at] = rng.choice(PIECES) * rng.choice((1, 1, 1, 2000))
        else:
            found[at:at] = found[at : at + rng.randint(1, 256)]
    return bytes(found)


def of_json(value: Any, rng: random.Random) -> bytes:
    """One to three values, however deep, are something odd, gone, or in one another's place."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return json.dumps(rng.choice(ODD)).encode()
        holder, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif kind == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = rng.choice(ODD)
    return json.dumps(value).encode()


def _places(value: Any):
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
