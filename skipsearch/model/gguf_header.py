"""GGUF headers: whether a file can hold what its header claims.

The library's reader believes every count and length, and may read on behind the end for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from skipsearch.errors import first_line
from skipsearch.mask import MOST_LAYERS

STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
VERSIONS = (2, 3)  # that the library reads
MOST_DIMENSIONS = 8
# What models are as large as: more than any dimension of a tensor is more than the weights can fill.
SIZES = {
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
}  # fmt: skip


def excess_of(path: Path) -> str | None:
    """What a GGUF file claims beyond its length, in words; None if all that it claims fits."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except (ValueError, struct.error, OSError) as error:
        return first_line(error)
    return None


class _Header:
    """Reads a header from its begin to its end; `struct.error` beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 4, "<"
        self.version = self.number("I")
        if not self.version & 0xFFFF:  # of the other byte order
            self.order, self.at = ">", 4
            self.version = self.number("I")

    def number(self, code: str) -> int:
        found: int = struct.unpack_from(self.order + code, self.data, self.at)[0]
        self.at += struct.calcsize(self.order + code)
        return found

    def count(self, what: str, least: int) -> int:
        """Of things that take `least` bytes each."""
        found = self.number("Q")
        if found * least > len(self.data) - self.at:
            raise ValueError(f"it claims {found:,} {what}")
        return found

    def skip(self, count: int) -> int:
        """Go on behind so many bytes; returns where they begin."""
        begin, self.at = self.at, self.at + count
        return begin

    def text(self) -> bytes:
        length = self.count("bytes of a text", 1)
        return self.data[self.skip(length) : self.at]

    def value(self, kind: int) -> int | None:
        """Skip a value; returns it, or the largest one of an array, if they are whole numbers."""
        count = 1
        if kind == ARRAY:
            kind = self.number("I")
            count = self.count("values", 1)
        if kind == STRING:
            for _ in range(count):
                self.skip(self.count("bytes of a text", 1))
            return None
        if kind not in NUMBERS:
            raise ValueError(f"a field has type {kind}")
        code = f"{self.order}{count}{NUMBERS[kind]}"
        begin = self.skip(struct.calcsize(code))
        if self.at > len(self.data):
            raise ValueError(f"it claims {count:,} values")
        whole = code[-1] not in "fd?" and count <= MOST_LAYERS  # what has a value for each token is no size
        return max(struct.unpack_from(code, self.data, begin), default=0) if whole else None

    def check(self) -> None:
        """Read the whole header.

        Raises:
            ValueError, struct.error: it claims what the file does not hold.
        """
        if self.version not in VERSIONS:
            return  # the library says so
        tensors = self.count("tensors", 24)
        fields: dict[str, int | None] = {}
        for _ in range(self.count("fields", 13)):
            name = self.text().decode(errors="replace")
            fields[name] = self.value(self.number("I"))
        ends, largest = zip(*(self.tensor() for _ in range(tensors)), strict=True) if tensors else ((0,), (0,))
        align = fields.get("general.alignment") or 32
        begin = -(-self.at // align) * align
        if begin + max(ends) > len(self.data):
            raise ValueError(f"its tensors end at byte {begin + max(ends):,}, it has {len(self.data):,}")
        for name, value in fields.items():
            if name.partition(".")[2] in SIZES and value is not None and value > max(tensors, *largest):
                raise ValueError(f"{name} is {value:,}, its tensors are smaller")

    def tensor(self) -> tuple[int, int]:
        """Where a tensor ends, counted from the first one, and its largest dimension."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, count = self.text(), self.number("I")
        if count > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:40]!r} has {count:,} dimensions")
        shape = [self.number("Q") for _ in range(count)]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("I"))]
        return self.number("Q") + math.prod(shape) // block * size, max(shape, default=0)
