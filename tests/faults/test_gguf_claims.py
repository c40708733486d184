"""GGUF headers that claim what the file does not hold."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from conftest import assert_one_sentence
from counts import tell
from strangers import little_memory

from skipsearch.errors import ModelLoadError
from skipsearch.model.load import load_model

HUGE = 10**9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(tensors: int, fields: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


BLOCKS = text("llama.block_count") + struct.pack("<II", 4, HUGE)
CLAIMS = {
    "tensors": gguf_file(2**60, 0),
    "fields": gguf_file(0, 2**40),
    "a name": gguf_file(0, 1, struct.pack("<Q", 2**50) + b"x" * 99),
    "a text": gguf_file(0, 1, text("a") + struct.pack("<IQ", 8, 2**50)),
    "texts": gguf_file(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**50)),
    "values": gguf_file(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 2**50)),
    "bytes": gguf_file(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 2**63)),
    "values, one too many": gguf_file(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 8) + bytes(31)),
    "arrays in arrays": gguf_file(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 3) + struct.pack("<IQ", 9, 1) * 99),
    "a type": gguf_file(0, 1, text("a") + struct.pack("<I", 77) + bytes(64)),
    "dimensions": gguf_file(1, 0, tensor("a", (2**40, 2**40))),
    "an overflow": gguf_file(1, 0, tensor("a", (2**32, 2**32, 2))),
    "many dimensions": gguf_file(1, 0, text("a") + struct.pack("<I", 2**31) + bytes(99)),
    "an offset": gguf_file(1, 0, tensor("a", (1,), offset=2**62) + bytes(99)),
    "a kind": gguf_file(1, 0, tensor("a", (1,), kind=999) + bytes(99)),
    "data": gguf_file(1, 0, tensor("a", (64, 64)) + bytes(99)),
    "layers": gguf_file(1, 1, BLOCKS + tensor("a", (4,)) + bytes(99)),
    "alignment": gguf_file(
        1, 1, text("general.alignment") + struct.pack("<II", 4, 2**31) + tensor("a", (4,)) + bytes(99)
    ),
    "nothing": b"GGUF",
    "version 1": gguf_file(2**30, 2**30, version=1),
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 2**60, 2**40),
}


def test_the_header_of_a_gguf_file_is_not_believed(tmp_path: Path) -> None:
    """Prevents hours and all memory for a file of a hundred bytes: the library's reader goes on behind the end."""
    pytest.importorskip("gguf")
    for name, data in CLAIMS.items():
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        with little_memory(20_000_000), pytest.raises(ModelLoadError) as error:
            load_model(str(path))
        assert_one_sentence(error, "is truncated or damaged", "download it again")
        assert name
    tell("claims of a GGUF header", len(CLAIMS), refused=len(CLAIMS))
