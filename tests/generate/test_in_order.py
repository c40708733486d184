"""What people hang on `generate`: it is called as plain decoding calls it, and a reader never waits for ever."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
)

from skipsearch import SkipMask, self_speculative
from skipsearch.errors import BackendWarning, DecodingError

MASKS = {"everything runs": SkipMask(num_layers=4), "half": SkipMask(attention=[0, 2], mlp=[1, 3], num_layers=4)}
GREEDY: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class EverySecondCall(LogitsProcessor):
    """Bans even tokens at every second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        if self.calls % 2:
            scores[:, ::2] = -torch.inf
        return scores


class Automaton(LogitsProcessor):
    """As grammars are enforced: a state that each token moves, and that allows some tokens alone."""

    def __init__(self) -> None:
        self.state, self.seen = 1, list[int]()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(int(ids[0, -1]))
        self.state = (3 * self.state + int(ids[0, -1])) % 7
        allowed = torch.arange(scores.shape[-1]) % 7 != self.state
        return scores.masked_fill(~allowed, -torch.inf)


class AfterCalls(StoppingCriteria):
    """Ends after so many calls, and returns a plain bool."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left <= 0


def run(model: Any, ids: Tensor, method: Any = None, **given: Any) -> Tensor:
    options = {**GREEDY, "attention_mask": (ids != 0).long(), **given}
    out: Tensor = model.generate(ids, custom_generate=method, **options)
    return out


@pytest.mark.parametrize("make", [EverySecondCall, Automaton])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_processors_with_a_memory(tiny: Any, ids: Tensor, make: Any, mask: str, backend: Any) -> None:
    """Prevents a processor from seeing tokens that are rejected, or a token twice."""
    model = tiny("llama")
    for length in (1, 3, 7):
        method = self_speculative(MASKS[mask], max_length=length, ngram=length if length > 1 else 0, backend=backend)
        ours, plain = make(), make()
        out = run(model, ids, method, logits_processor=LogitsProcessorList([ours]))
        assert torch.equal(out, run(model, ids, logits_processor=LogitsProcessorList([plain])))
        assert vars(ours) == vars(plain)
        assert make is Automaton or method.stats.drafted > 0


def test_nothing_is_asked_behind_the_end(tiny: Any, ids: Tensor) -> None:
    """Prevents a processor that serves several calls from having seen more than it would have."""
    model, seen = tiny("llama"), Automaton()
    end = int(run(model, ids, logits_processor=LogitsProcessorList([seen]))[0, ids.shape[1] + 11])
    ours, plain = Automaton(), Automaton()
    method = self_speculative(MASKS["everything runs"], max_length=7)
    out = run(model, ids, method, logits_processor=LogitsProcessorList([ours]), eos_token_id=end)
    assert torch.equal(out, run(model, ids, logits_processor=LogitsProcessorList([plain]), eos_token_id=end))
    assert vars(ours) == vars(plain)
    assert out.shape[1] < ids.shape[1] + 30
    ours, plain = Automaton(), Automaton()
    criteria = [StoppingCriteriaList([AfterCalls(9), AfterCalls(14)]) for _ in range(2)]
    out = run(model, ids, method, logits_processor=LogitsProcessorList([ours]), stopping_criteria=criteria[0])
    assert torch.equal(
        out, run(model, ids, logits_processor=LogitsProcessorList([plain]), stopping_criteria=criteria[1])
    )
    assert vars(ours) == vars(plain) and [c.left for c in criteria[0]] == [c.left for c in criteria[1]]


def test_sampling_in_order_has_the_distribution_of_plain(tiny: Any) -> None:
    """Prevents acceptance token by token from preferring the draft's tokens."""
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7]])
    count = 500

    def drawn(method: Any) -> Tensor:
        torch.manual_seed(0)
        found = torch.zeros(97)
        for _ in range(count):
            processors = LogitsProcessorList([EverySecondCall()])
            found[int(run(model, ids, method, logits_processor=processors, do_sample=True, top_k=8,
                          temperature=0.05, max_new_tokens=3)[0, -1])] += 1  # fmt: skip
        return found / count

    ours, plain = drawn(self_speculative(MASKS["half"], max_length=2)), drawn(None)
    assert (plain > 0).sum() > 2
    assert 0.5 * float((ours - plain).abs().sum()) < 0.1


def test_watermarks_and_guidance_of_the_library(tiny: Any, ids: Tensor) -> None:
    """Prevents the library's own processors with a memory from being refused, or called out of order."""
    model, method = tiny("llama"), self_speculative(MASKS["half"], max_length=4)
    keys = SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)
    options: dict[str, Any] = {"do_sample": True, "top_k": 1, "max_new_tokens": 12}
    for given in ({"guidance_scale": 1.5}, {**options, "watermarking_config": keys}):
        assert torch.equal(run(model, ids, method, **given), run(model, ids, **given))


def test_a_batch_with_a_memory_is_decoded_plainly(tiny: Any, batch: Tensor) -> None:
    """Prevents a processor or criterion that thinks in rows from being called with some of them."""
    model, method = tiny("llama"), self_speculative(MASKS["half"], max_length=4)
    plain = run(model, batch, logits_processor=LogitsProcessorList([EverySecondCall()]))
    with pytest.warns(BackendWarning, match="decoding plainly: a batch with EverySecondCall; decode rows one by one"):
        assert torch.equal(run(model, batch, method, logits_processor=LogitsProcessorList([EverySecondCall()])), plain)
    with pytest.warns(BackendWarning, match="a batch with AfterCalls"):
        out = run(model, batch, method, stopping_criteria=StoppingCriteriaList([AfterCalls(6)]))
    assert torch.equal(out, run(model, batch, stopping_criteria=StoppingCriteriaList([AfterCalls(6)])))


def test_criteria_that_return_a_bool(tiny: Any, ids: Tensor) -> None:
    """Prevents a criterion from the wild from raising where plain decoding takes it."""
    model, method = tiny("llama"), self_speculative(MASKS["half"], max_length=4)

    class Long(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]
            return ids.shape[1] > 20

    criteria = StoppingCriteriaList([Long()])
    assert torch.equal(run(model, ids, method, stopping_criteria=criteria), run(model, ids, stopping_criteria=criteria))


class Broken(LogitsProcessor):
    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ValueError("the grammar has no such token")
        return scores


@pytest.mark.parametrize("wrapped", [False, True])
def test_streams_arrive_through_a_wrapper_and_end_when_decoding_raises(
    tiny: Any, ids: Tensor, wrapped: bool, tokenizer: Any
) -> None:  # fmt: skip
    """Prevents a reader in another thread from waiting for ever."""
    model, method = tiny("llama"), self_speculative(MASKS["half"], max_length=4)
    called = (lambda *args, **given: method(*args, **given)) if wrapped else method

    def streamed(**given: Any) -> tuple[str, list[BaseException]]:
        streamer = TextIteratorStreamer(tokenizer, timeout=20)
        failed: list[BaseException] = []

        def decode() -> None:
            try:
                run(model, ids, called, streamer=streamer, **given)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=decode)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text, failed

    whole, failed = streamed()
    assert not failed and whole.endswith(tokenizer.decode(run(model, ids)[0, -8:]))
    part, failed = streamed(logits_processor=LogitsProcessorList([Broken(9)]))
    assert isinstance(failed[0], ValueError) and len(part) < len(whole)
    _, failed = streamed(output_attentions=True, return_dict_in_generate=True)
    assert isinstance(failed[0], DecodingError)


def test_random_memories(tiny: Any, ids: Tensor) -> None:
    """Prevents a length, an n-gram or an exit with which the order breaks."""
    model, rng = tiny("llama"), random.Random(0)
    plain = Automaton()
    expected = run(model, ids, logits_processor=LogitsProcessorList([plain]))
    for _ in range(12):
        mask = SkipMask.from_bits([rng.random() < 0.4 for _ in range(8)])
        method = self_speculative(
            mask, max_length=rng.randint(1, 8), ngram=rng.choice([0, 4, 10]), exit_threshold=rng.choice([None, 0.05])
        )
        ours = Automaton()
        assert torch.equal(run(model, ids, method, logits_processor=LogitsProcessorList([ours])), expected)
        assert vars(ours) == vars(plain)


def test_functions_of_allowed_tokens_see_what_is_committed(tiny: Any, ids: Tensor) -> None:
    """Prevents a grammar's function from being asked behind the end, or behind tokens that it forbids."""
    model, length = tiny("llama"), ids.shape[1]
    words = [[5, 6, 7, 11, 13, 2], [5, 6, 8, 9, 2]]

    def allowed(_row: int, prefix: Tensor) -> list[int]:
        said = prefix[length:].tolist()
        assert 2 not in said and any(word[: len(said)] == said for word in words), said
        return sorted({word[len(said)] for word in words if word[: len(said)] == said})

    method = self_speculative(MASKS["half"], max_length=5, ngram=4)
    options: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": 2}
    assert torch.equal(run(model, ids, method, **options), run(model, ids, **options))


def test_criteria_are_asked_at_the_end_token_too(tiny: Any, ids: Tensor) -> None:
    """Prevents a criterion that notes tokens from missing the last one."""
    model = tiny("llama")
    end = int(run(model, ids)[0, ids.shape[1] + 9])

    class Notes(StoppingCriteria):
        def __init__(self) -> None:
            self.seen = list[int]()

        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]
            self.seen.append(int(ids[0, -1]))
            return False

    ours, plain = Notes(), Notes()
    method = self_speculative(MASKS["everything runs"], max_length=6)
    run(model, ids, method, stopping_criteria=StoppingCriteriaList([ours]), eos_token_id=end)
    run(model, ids, stopping_criteria=StoppingCriteriaList([plain]), eos_token_id=end)
    assert ours.seen == plain.seen and ours.seen[-1] == end
