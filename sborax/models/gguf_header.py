"""Counts and lengths in the header of a GGUF file, checked against its size before the package `gguf` uses them."""

import mmap
import struct
from pathlib import Path

from sborax.adapters.core import SboraxError
from sborax.config.documents import check_plain

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type: integers, floats and booleans."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_VALUES = 1 << 22
"""Bound of the values in arrays: the package makes an object of each. The largest vocabularies have 2^18 entries."""
MOST_FIELDS = 1 << 16
MOST_TENSORS = 1 << 17
"""Bounds for a file. Real files have some dozens of fields and a few thousand tensors."""
LEAST_FIELD, LEAST_TENSOR = 13, 24
"""Bytes of the shortest field and tensor: lengths, types, sizes and offsets without a name."""
MOST_AXES = 4
"""The bound of llama.cpp."""


class _Walk:
    """A position in the header that never leaves the file."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.position, self.values = raw, 0, 0

    def skip(self, size: int) -> None:
        if size > len(self.raw) - self.position:
            raise ValueError("it ends within its header")
        self.position += size

    def number(self, form: str) -> int:
        start = self.position
        self.skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self.raw, start)[0]

    def text(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY:
            self.array(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"its header has a value of unknown type {kind}")

    def array(self, kind: int, count: int) -> None:
        self.values += count
        if kind == ARRAY or self.values > MOST_VALUES:
            raise ValueError(f"its header has arrays of arrays or of more than {MOST_VALUES:,} values")
        if kind in SIZES:
            self.skip(count * SIZES[kind])
            return
        for _ in range(count):
            self.value(kind)


def check_header(file: Path) -> None:
    """Raise SboraxError unless everything that the header announces lies within the file."""
    check_plain(file)
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            _walk(_Walk(raw))
    except (ValueError, OSError) as failure:
        raise SboraxError(f"{file}: not a readable GGUF file ({failure}); fetch it again") from None


def _walk(walk: _Walk) -> None:
    if walk.number("I") != int.from_bytes(b"GGUF", "little"):
        raise ValueError("it does not begin with GGUF")
    if (version := walk.number("I")) not in VERSIONS:
        raise ValueError(f"its version is {version}, known: 2, 3")
    tensors, fields = walk.number("Q"), walk.number("Q")
    if fields * LEAST_FIELD + tensors * LEAST_TENSOR > len(walk.raw) - walk.position:
        raise ValueError("it ends within its header")
    if fields > MOST_FIELDS or tensors > MOST_TENSORS:
        raise ValueError(f"its header announces more than {MOST_FIELDS:,} fields or {MOST_TENSORS:,} tensors")
    for _ in range(fields):
        walk.text()
        walk.value(walk.number("I"))
    for _ in range(tensors):
        walk.text()
        axes = walk.number("I")
        if axes > MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        walk.skip(8 * axes + 4 + 8)
