"""The speculative loop through `model.generate`: the same output, the right counts, nothing ignored."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.errors import MaskError
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


def greedy(model: Any, ids: torch.Tensor, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    return model.generate(ids, **{**options, **changes})


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=8, max_size=8), k=st.integers(1, 9), new=st.integers(1, 30),
       threshold=st.sampled_from([None, 0.1, 0.5, 0.99]), eos=st.integers(3, 96))  # fmt: skip
def test_any_mask_policy_length_and_eos(bits: Any, k: int, new: int, threshold: Any, eos: int) -> None:
    """Prevents end-of-sequence and length limits from being missed inside a block."""
    from conftest import make_tiny

    model = _kept.setdefault("llama", make_tiny("llama"))
    ids = torch.arange(5, 14)[None]
    method = self_speculative(SkipMask.from_bits(bits), max_length=k, exit_threshold=threshold)
    options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": [eos, eos + 1 if eos < 96 else 3]}
    assert torch.equal(greedy(model, ids, custom_generate=method, **options), greedy(model, ids, **options))


_kept: dict[str, Any] = {}


def test_eos_inside_an_accepted_block(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents tokens behind the end of sequence: with the empty mask every draft is accepted whole."""
    model = tiny("gpt2")
    continuation = greedy(model, ids)[0, ids.shape[1] :].tolist()
    for end in sorted(set(continuation)):
        method = self_speculative(SkipMask(num_layers=4), max_length=6)
        out = greedy(model, ids, eos_token_id=end, custom_generate=method)[0, ids.shape[1] :].tolist()
        assert out == continuation[: continuation.index(end) + 1]
        assert method.stats.committed == len(out)


def test_empty_mask_accepts_everything(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents off-by-one counts: the full model as its own draft is right every time."""
    method = self_speculative(SkipMask(num_layers=4), max_length=4)
    greedy(tiny("llama"), ids, custom_generate=method)
    stats = method.stats
    assert stats.acceptance_rate == 1 and stats.drafted == stats.accepted
    # 40 tokens: one from the prefill, seven blocks of 4 + 1, one of 3 + 1.
    assert stats.blocks == {(4, 4): 7, (3, 3): 1} and stats.committed == 40


def test_wrong_arguments() -> None:
    """Prevents a silent default for a mask or a policy that makes no sense."""
    with pytest.raises(MaskError, match=r"max_length .* got 0"):
        self_speculative(MASK, max_length=0)
    with pytest.raises(MaskError, match=r"exit_threshold .* got 1"):
        self_speculative(MASK, exit_threshold=1.0)
    with pytest.raises(MaskError, match="must be a SkipMask"):
        self_speculative({"attention": [1]})  # type: ignore[arg-type]


def test_two_masks_in_two_threads(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents shared state between views of one model."""
    model = tiny("llama")
    expected = greedy(model, ids)
    wrong: list[int] = []

    def work(number: int) -> None:
        method = self_speculative(SkipMask(attention=[number], mlp=[3 - number], num_layers=4))
        for _ in range(3):
            if not torch.equal(greedy(model, ids, custom_generate=method), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stats_make_ratios_of_sums() -> None:
    """Prevents averages of ratios, and a division by zero before anything was drafted."""
    stats = DecodeStats()
    assert stats.acceptance_rate == 0 and stats.tau == 0
    stats.blocks.update({(4, 4): 1, (2, 0): 3})
    assert stats.acceptance_rate == 4 / 10 and stats.tau == 4 / 4 + 1


def test_buffers_are_freed_with_their_sequence(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a reference cycle from keeping keys and values alive until the next garbage collection."""
    gc.collect()
    gc.disable()
    try:
        sequences = Sequences(Target.of(tiny("llama")), ids, capacity=40, draft=draft_view(tiny("llama"), MASK))
        for _ in decode(sequences, Ending(max_length=30), policy=DraftPolicy()):
            pass
        buffer = weakref.ref(sequences.cache.cache.layers[0].buffers[0])
        del sequences
        assert buffer() is None
    finally:
        gc.enable()
