"""Harms valid documents: bytes, JSON values at any position, and text."""

import copy
import json
import math
import struct
from random import Random
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 65_537, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63),
    10**12, 10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "..", "../outside/model.safetensors", "../../etc/passwd", "/etc/passwd", "~/x", "é",
    "\ud800", "\U0001d518" * 40, "a" * 10_000, "{0}", "{output.__class__}", "{output:>999999999999}", "{output!z}", "{",
    "%s%n", "{{ 7 * 7 }}", "line\nerror: another", "\x1b[2J", "(", "[", "(a+)+$", "(.*)*!", r"(?x)(\w|\w)#" + "\n*!",
    ".*.*.*.*.*.*!", "(?i)q_proj", "(" * 500, r"\1", "a{65536}{65536}", "true", "null", "1e999", "*", "-1", "nf4",
    "LoRA", "SBoRA", "model.layers.0.self_attn.q_proj", "layers/self_attn/q_proj/kernel", "F8_E4M3", "I64", "BF16",
)  # fmt: skip
RAW = {
    "@deep-list@": "[" * 100_000 + "]" * 100_000,
    "@list@": "[" * 300 + "]" * 300,
    "@deep-object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 6_000,
    "@exponent@": "1e99999",
    "@open@": '{"a": [1, ',
}
"""JSON that `json.dumps` does not write, by the text that stands for it."""


def harm_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """Bytes with some flips, cuts, insertions and extreme numbers."""
    out = bytearray(data)
    for _ in range(random.randint(1, most)):
        place = random.randrange(len(out) + 1)
        kind = random.randrange(7)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[place:] = b""
        elif kind == 2:
            out[place:place] = random.randbytes(random.choice((1, 2, 8, 64)))
        elif kind == 3:
            del out[place : place + random.choice((1, 4, 8, 40))]
        elif kind == 4:
            out[place : place + 8] = struct.pack("<Q", random.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
        elif kind == 5:
            out[place : place + 4] = struct.pack("<I", random.choice((0, 1, 9, 12, 2**16, 2**31, 2**32 - 1)))
        else:
            size = random.choice((1, 8, 32))
            out[place:place] = out[place : place + size]
    return bytes(out)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of keys to every value in a document, beginning with the document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def get(value: Any, place: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in place:
        value = value[key]
    return value


def hostile(random: Random) -> Any:
    """A value that no reader expects."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(TEXTS)
    if kind == 7:
        return random.choice(list(RAW))
    return copy.deepcopy(
        random.choice((None, True, False, [], {}, [[]], [None], {"type": "LoRA"}, {"slice": [0, 1, 0]}))
    )


def alike(random: Random, value: Any) -> Any:
    """Another value of the same type, which gets past a reader's first checks."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, value * 2, -value, random.choice(NUMBERS[:20])))
    if isinstance(value, float):
        return random.choice((value * 2, -value, random.choice(NUMBERS[20:])))
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        other = random.choice(TEXTS)
        return random.choice((value[:cut], value[:cut] + other + value[cut:], other, value * 2, value.upper()))
    if isinstance(value, list):
        return random.choice((value + value, value[1:], value[::-1], [value], value * 50))
    return {} if value else None


def harm(random: Random, document: Any, most: int = 3) -> Any:
    """A copy of a JSON document with a few values changed, removed, moved or added."""
    document = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, most))):
        place = random.choice(places(document))
        value, kind = get(document, place), random.randrange(12)
        if not place:
            if kind == 0:
                return hostile(random)
            continue
        *above, key = place
        parent = get(document, tuple(above))
        if kind < 5:
            parent[key] = alike(random, value)
        elif kind < 8:
            parent[key] = hostile(random)
        elif kind == 8:
            del parent[key]
        elif kind == 9:
            parent[key] = copy.deepcopy(get(document, random.choice(places(document))))
        elif isinstance(parent, dict):
            parent[random.choice((random.choice(TEXTS), f"{key}x", key))] = value if kind == 10 else hostile(random)
        else:
            parent.insert(random.randrange(len(parent) + 1), hostile(random))
    return document


def write(random: Random, document: Any) -> bytes:
    """A document as JSON, sometimes with a repeated key, in another encoding, or with harmed bytes."""
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    kind = random.randrange(25)
    if kind == 0 and text.startswith("{") and isinstance(document, dict) and document:
        key = random.choice(list(document))
        text = f"{{{json.dumps(key)}: {json.dumps(random.choice(TEXTS))}, {text[1:]}"
    if kind == 1:
        return text.encode(random.choice(("utf-16", "utf-8-sig", "utf-32")))
    if kind == 2:
        return harm_bytes(random, text.encode())
    return text.encode()


def harm_text(random: Random, text: str, pieces: tuple[str, ...]) -> str:
    """Text with stretches cut, doubled, moved, or replaced by one of the pieces."""
    for _ in range(random.choice((1, 1, 2, 4))):
        start, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
        kind = random.randrange(4)
        middle = ("", text[start:end] * 2, random.choice(pieces), random.choice(pieces) + text[start:end])[kind]
        text = text[:start] + middle + text[end:]
    return text
