"""Every option of `generate`: through plain generate and through ours, the same tokens; or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tiny
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StopStringCriteria,
)  # fmt: skip
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.errors import DecodingError
from skipsearch.model.load import DEMO
from skipsearch.model.sublayers import context_limit

MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


class Favour(LogitsProcessor):
    """Depends on the whole prefix: forbids the token seen two places back."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -2:-1], float("-inf"))


class StopAt(StoppingCriteria):
    """Row by row, once two tokens in a row sum to a multiple of five."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -2:].sum(1) % 5 == 0


class AsksForScores(StoppingCriteria):
    """Looks at what `output_scores` collects, as plain generate hands it over."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([len(scores) >= 6 and bool(scores[-1].isfinite().all())] * len(input_ids))


def run(model: Any, ids: torch.Tensor, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "attention_mask": (ids != 0).long(),
    }  # fmt: skip
    return model.generate(ids, **{**options, **changes})


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


@pytest.fixture
def batch() -> torch.Tensor:
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(4))
    ids[1, :4] = ids[2, :1] = 0
    return ids


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


@pytest.mark.parametrize("rows", [1, 3])
def test_returned_scores_and_logits_are_the_targets(rows: int, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents draft scores from being handed out, a row too many, or scores a criterion cannot see."""
    model = tiny("llama")
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
                               "repetition_penalty": 1.2, "stopping_criteria": [AsksForScores()]}  # fmt: skip
    ours = run(model, batch[:rows], custom_generate=self_speculative(MASK), **options)
    plain = run(model, batch[:rows], **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == 6
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(plain[name]), atol=1e-4, rtol=1e-4)


def test_scores_of_ended_rows_are_zeros(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents rows of uneven length from shifting the scores of others."""
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": [5, 9, 17, 33]}
    model = tiny("mistral")
    ours, plain = (
        run(model, batch, **options, **method) for method in ({"custom_generate": self_speculative(MASK)}, {})
    )
    assert torch.equal(ours.sequences, plain.sequences) and len(ours.scores) == len(plain.scores)
    for step, (mine, theirs) in enumerate(zip(ours.scores, plain.scores, strict=True)):
        for row in range(3):
            ended = step > 0 and int(ours.sequences[row, 10 + step]) in (0, 5, 9, 17, 33)
            wanted = torch.zeros(97) if ended else theirs[row]
            torch.testing.assert_close(mine[row], wanted, atol=1e-4, rtol=1e-4)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token_once(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents lost, doubled or rejected tokens in a stream, whichever way the streamer comes."""
    given, own = Collect(), Collect()
    out = run(tiny("llama"), batch[:1], streamer=given, custom_generate=self_speculative(MASK))
    assert given.tokens == out[0].tolist() and given.ended
    run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK, streamer=own))
    assert own.tokens == out[0, batch.shape[1] :].tolist() and own.ended
    with pytest.raises(DecodingError, match="streamer takes one sequence"):
        run(tiny("llama"), batch, streamer=Collect(), custom_generate=self_speculative(MASK))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("known", [1, 6, 9, 10])
def test_continuing_from_past_key_values(family: str, known: int, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents a handed-over cache from being ignored, processed twice, or left unusable for others."""
    model, ids = tiny(family), batch[:1]
    expected = run(model, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, :known], past_key_values=cache, use_cache=True)
    out = run(model, ids, past_key_values=cache, custom_generate=self_speculative(MASK))
    assert torch.equal(out, expected) and cache.get_seq_length() == out.shape[1] - 1
    # Plain generate goes on from where we stopped, and we from where it stops.
    longer = run(model, out, past_key_values=cache, max_new_tokens=5)
    assert torch.equal(longer, run(model, expected, max_new_tokens=5))
    last = run(model, longer, past_key_values=cache, max_new_tokens=5, custom_generate=self_speculative(MASK))
    assert torch.equal(last, run(model, expected, max_new_tokens=10))


def test_only_new_tokens_beside_a_cache(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents the short form of a continuation, new ids with the full attention mask, from losing its place."""
    model, ids = tiny("llama"), batch[:1]
    outs = []
    for method in ({}, {"custom_generate": self_speculative(MASK)}):
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        options: dict[str, Any] = {"past_key_values": cache, "attention_mask": torch.ones_like(ids), **method}
        outs.append(run(model, ids[:, 8:], **options))
    assert torch.equal(*outs)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams is 2"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions is True"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states is True"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "static cache": ({"cache_implementation": "static"}, "StaticLayer"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "offloads its layers"),
    "holes": ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]])}, "zeros inside the prompt"),
    "positions": ({"position_ids": torch.arange(5, 16)[None]}, "position_ids are not those"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents options from being ignored in silence."""
    options, said = REFUSED[name]
    with pytest.raises(DecodingError, match=said):
        run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK), **options)


def test_arguments_that_generate_drops_are_refused(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents an assistant, which generate does not hand on to a callable, from being ignored."""
    model = tiny("llama")
    with pytest.raises(DecodingError, match="assistant_model"):
        run(model, batch[:1], assistant_model=draft_view(model, MASK), custom_generate=self_speculative(MASK))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(DecodingError, match="StaticLayer"):
        run(model, batch[:1], past_key_values=cache, custom_generate=self_speculative(MASK))
    filled = DynamicCache(config=model.config)
    model(batch[:, :4], past_key_values=filled, use_cache=True)
    with pytest.raises(DecodingError, match="one by one"):
        run(model, batch, past_key_values=filled, custom_generate=self_speculative(MASK))


@pytest.mark.parametrize("known", [{}, {"max_position_embeddings": None}])
def test_a_config_may_know_no_end(known: dict[str, Any]) -> None:
    """Prevents a context of None, or none at all, from being compared with a number of tokens."""
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**known))
    assert context_limit(SimpleNamespace(config=config)) > 100_000  # type: ignore[arg-type]


def test_beyond_the_context(batch: torch.Tensor) -> None:
    """Prevents positions from standing still where plain generate counts on: rotary models may outrun their context."""
    model = make_tiny("llama", max_position_embeddings=16)
    expected = run(model, batch[:1])
    for deterministic in (False, True):
        method = self_speculative(MASK, deterministic=deterministic)
        assert torch.equal(run(model, batch[:1], custom_generate=method), expected)


def test_inputs_on_another_device_are_refused(tiny: Any, batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback from the middle of the model; one device here, so the model's is only said to be another."""
    monkeypatch.setattr("skipsearch.generate.method.input_device", lambda _model: torch.device("cuda:0"))
    with pytest.raises(DecodingError, match=r"input_ids lie on cpu, the model takes them on cuda:0; move them"):
        run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK))


def test_an_error_in_a_block_leaves_model_and_cache_usable(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents an exception between draft and commit from leaving drafts in a user's cache, or the model patched."""
    model, ids = tiny("llama"), batch[:1]
    expected = run(model, ids)

    class Breaks(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 9:
                raise KeyboardInterrupt
            return scores

    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    method = self_speculative(MASK)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, past_key_values=cache, logits_processor=LogitsProcessorList([Breaks()]), custom_generate=method)
    assert cache.get_seq_length() == 6
    assert torch.equal(run(model, ids, past_key_values=cache, custom_generate=method), expected)
    assert torch.equal(run(model, ids), expected)
