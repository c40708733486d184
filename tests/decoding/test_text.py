"""Text piece by piece: every character once, whole, and with the right source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.text import pieces
from skipsearch.model.load import DEMO

BYTES = AutoTokenizer.from_pretrained(DEMO)
MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: the first token loses its space, and what is no word is bytes."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁one", "▁two", "▁", "."]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@given(st.text(max_size=12), st.integers(0, 30))
def test_characters_that_tokens_share_are_whole(text: str, end: int) -> None:
    """Prevents U+FFFD in place of a character that several tokens make, and a text that is not what was decoded."""
    ids = BYTES(text)["input_ids"][:end]
    found = pieces(BYTES, ids, map(str, range(len(ids))))
    whole = BYTES.decode(ids)
    assert "".join(piece for piece, _ in found) == whole
    assert sum(piece.count("\ufffd") for piece, _ in found) == whole.count("\ufffd")
    assert [int(source) for _, source in found] == sorted({int(source) for _, source in found})


def test_the_token_that_completes_a_character_names_it() -> None:
    """Prevents a character of three tokens from coming early or thrice, and a lost space before a word."""
    tokenizer = sentence_pieces()
    ids = tokenizer.convert_tokens_to_ids(["▁one", "▁", "<0xE2>", "<0x82>", "<0xAC>", "▁two", "<0xE2>"])
    found = pieces(tokenizer, ids, ["mask", "mask", "mask", "ngram", "target", "mask", "target"])
    expected = [("one", "mask"), (" ", "mask"), ("€", "target"), (" two", "mask"), ("\ufffd", "target")]
    assert found == expected and "".join(text for text, _ in found) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="shorter"):
        pieces(tokenizer, ids, ["mask"])
    assert pieces(tokenizer, [], []) == []


@pytest.mark.parametrize("settings", [{}, {"ngram": 6, "never_slower": True}, {"decoding": "mtad"}], ids=str)
def test_every_token_has_a_source(settings: dict[str, Any], tiny: Any, ids: torch.Tensor) -> None:
    """Prevents sources that are not those of the tokens: the prefill's missing, or more drafted than were accepted."""
    method = self_speculative(MASK, **settings)
    model = tiny("llama")
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False}
    new = model.generate(ids, custom_generate=method, **options)[0, ids.shape[1] :]
    sources, stats = method.stats.trails[0].sources, method.stats
    assert len(sources) == len(new) == stats.committed
    assert {name: sources.count(name) for name in stats.accepted_from} == stats.accepted_from
    end = int(new[20])  # decoding ends inside a block as well as behind one
    first = model.generate(ids, custom_generate=method, eos_token_id=end, pad_token_id=0, **options)[0, ids.shape[1] :]
    assert len(method.stats.trails[0].sources) == len(first)


def test_sources_of_a_batch(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents the rows of a batch, which advance by what each accepts, from getting each other's sources."""
    method = self_speculative(MASK)
    given = {"attention_mask": (batch != 0).long(), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    out = tiny("llama").generate(batch, custom_generate=method, **given)[:, batch.shape[1] :].tolist()
    lengths = [next((i for i, token in enumerate(row) if not any(row[i:])), 20) for row in out]
    assert [len(method.stats.trails[b].sources) for b in range(3)] == lengths and min(lengths) < 20
    assert sum(trail.sources.count("mask") for trail in method.stats.trails.values()) == method.stats.accepted > 0
