"""Every option of `generate`: through plain generate and through ours, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_tiny
from generate_calls import MASK, run
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StopStringCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from skipsearch import SkipMask, self_speculative
from skipsearch.model.load import DEMO


class Favour(LogitsProcessor):
    """Depends on the whole prefix: forbids the token seen two places back."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -2:-1], float("-inf"))


class StopAt(StoppingCriteria):
    """Row by row, once two tokens in a row sum to a multiple of five."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -2:].sum(1) % 5 == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "several eos ids": {"eos_token_id": [5, 9, 17, 33, 40]},
    "max_length": {"max_new_tokens": None, "max_length": 21},
    "max_new_tokens 1": {"max_new_tokens": 1},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(3, 60))},
    "min_length": {"min_length": 20, "eos_token_id": list(range(3, 60))},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [9, 4], [3, 5, 6]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 90))},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "sequence_bias": {"sequence_bias": [[[11], 4.0], [[12, 13], 3.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 8},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "logits_processor": {"logits_processor": LogitsProcessorList([Favour()])},
    "stopping_criteria": {"stopping_criteria": [StopAt()], "eos_token_id": 2},
    "an end of one's own": {"stopping_criteria": [EosTokenCriteria(list(range(3, 30)))], "eos_token_id": 2},
    "a shorter length of one's own": {"stopping_criteria": [MaxLengthCriteria(17)]},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "watermarking_config": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
}


@pytest.mark.filterwarnings("ignore:decoding plainly")  # a batch with what the caller wrote
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_tokens_are_those_of_plain_generate(name: str, rows: int, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents an option from being ignored, applied once a block, applied to the target alone, or to a wrong row."""
    model, options = tiny("qwen2"), OPTIONS[name]
    expected = run(model, batch[:rows], **options)
    for method in (self_speculative(MASK, max_length=5), self_speculative(SkipMask(num_layers=4), max_length=4),
                   self_speculative(None)):  # fmt: skip
        assert torch.equal(run(model, batch[:rows], custom_generate=method, **options), expected)
    if rows == 1:
        fixed = [run(model, batch[:1], custom_generate=self_speculative(m, deterministic=True), **options)
                 for m in (None, MASK)]  # fmt: skip
        assert torch.equal(*fixed) and torch.equal(fixed[0], expected)


@pytest.mark.filterwarnings("ignore:decoding plainly")
def test_prefix_allowed_tokens_fn(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents a constrained continuation from being left, and a batch from being constrained by the wrong row."""

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [int(ids[-1]) % 90 + 3 + row, 50 + len(ids) % 7 + row]

    model = tiny("qwen2")
    for ids in (batch[:1], batch):
        expected = run(model, ids, prefix_allowed_tokens_fn=allowed, eos_token_id=[5, 60])
        method = self_speculative(MASK)
        out = run(model, ids, prefix_allowed_tokens_fn=allowed, eos_token_id=[5, 60], custom_generate=method)
        assert torch.equal(out, expected)


def test_stop_strings(demo: Any) -> None:
    """Prevents a stop string that ends inside a block from being overshot; the criterion has to be built by hand."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    inputs = tokenizer("def read(path):\n", return_tensors="pt")
    plain = demo.model.generate(**inputs, max_new_tokens=60, stop_strings=["\n\n", "return"], tokenizer=tokenizer)
    method = self_speculative(SkipMask(num_layers=20), max_length=6)
    criterion = StopStringCriteria(tokenizer, ["\n\n", "return"])
    ours = demo.model.generate(**inputs, max_new_tokens=60, stopping_criteria=[criterion], custom_generate=method)
    assert torch.equal(ours, plain) and ours.shape[1] < inputs["input_ids"].shape[1] + 60


def test_max_time(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents a time limit from being asked once a call; at least one token comes in any case."""
    out = run(tiny("qwen2"), batch[:1], max_new_tokens=100, max_time=0.0, custom_generate=self_speculative(MASK))
    assert out.shape[1] == batch.shape[1] + 1


def test_beyond_the_context(batch: torch.Tensor) -> None:
    """Prevents positions from standing still where plain generate counts on: rotary models may outrun their context."""
    model = make_tiny("llama", max_position_embeddings=16)
    expected = run(model, batch[:1])
    for deterministic in (False, True):
        method = self_speculative(MASK, deterministic=deterministic)
        assert torch.equal(run(model, batch[:1], custom_generate=method), expected)
