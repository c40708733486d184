"""What strangers' files are tried with: a saved model, and little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import make_tiny
from transformers import AutoTokenizer

from skipsearch.model.load import DEMO


def saved_llama(folder: Path) -> Path:
    """A saved tiny Llama with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    make_tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def little_memory(most: int = 150_000_000) -> Iterator[None]:
    """At most so many bytes of Python's and numpy's memory at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
