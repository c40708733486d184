"""What a model's generation config asks for holds wherever its text is recorded, predicted, timed or generated."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence, quiet
from transformers import GenerationConfig

from skipsearch import SkipMask, search
from skipsearch.bench.bench import BenchOptions, bench
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.stats import DecodeStats
from skipsearch.errors import DecodingError, DecodingWarning
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.generate.continuation import GenerateSettings
from skipsearch.model.load import Loaded
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.revalidate import validate_file

PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[9], [11, 12]]}
SAMPLES: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 8, "top_p": 0.9}
MASK = SkipMask(attention=[1, 3], mlp=[2], num_layers=4)
POLICY = DraftPolicy(max_length=3)
PROMPTS = tuple((3 + i, 5, 7, 11 + i) for i in range(12))


@pytest.fixture
def model(tiny: Any) -> Any:
    return copy.deepcopy(tiny("llama"))


def asks(model: Any, **fields: Any) -> Any:
    model.generation_config = GenerationConfig(**{"eos_token_id": [2, 13], "pad_token_id": 0, **fields})
    return model


def test_the_rule_says_what_is_in_force(model: Any) -> None:
    """Prevents a summary that is silent about penalties and sampling, or says what does not hold."""
    assert SelectionRule.of(asks(model)) == GREEDY and str(GREEDY) == "greedy"
    greedy = SelectionRule.of(asks(model, **PENALTIES))
    assert str(greedy) == "greedy, repetition_penalty 1.4, no_repeat_ngram_size 2, bad_words_ids of 2"
    sampled = SelectionRule.of(asks(model, **SAMPLES, repetition_penalty=1.1))
    assert str(sampled) == "sampling, temperature 0.7, repetition_penalty 1.1, top_k 8, top_p 0.9"
    assert str(SelectionRule.of(model, 0.0)) == "greedy, repetition_penalty 1.1"
    assert str(SelectionRule.of(model, 0.5)).startswith("sampling, temperature 0.5, repetition_penalty 1.1, top_k 8")
    assert SelectionRule.of(asks(model, temperature=0.7, top_k=5)) == GREEDY, "they belong to sampling"


@pytest.mark.parametrize(
    "fields, named",
    [({"num_beams": 3}, "beam_search"), ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
     ({"do_sample": True, "temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_modes_that_cannot_be_drafted_for_are_refused(model: Any, fields: dict[str, Any], named: str) -> None:
    """Prevents a search for greedy decoding of a model whose `generate` does something else."""
    with pytest.raises(DecodingError) as caught:
        SelectionRule.of(asks(model, **fields))
    assert_one_sentence(caught, named)


def test_what_ends_a_text_is_not_asked_for(model: Any) -> None:
    """Prevents a config with stop strings from being refused for want of a tokenizer."""
    with pytest.warns(DecodingWarning, match="stop_strings and max_time .* not applied"):
        assert SelectionRule.of(asks(model, stop_strings=["x"], max_time=1.0)) == GREEDY


def test_recorded_and_timed_text_is_that_of_generate(model: Any) -> None:
    """Prevents: `generate` obeys the model's penalties and end tokens, run, validate and bench do not."""
    target = Target.of(asks(model, **PENALTIES, min_new_tokens=6))
    rule, limit = SelectionRule.of(model), 24
    trace = record(target, PROMPTS, DecodeSettings(new_tokens=limit, rule=rule), quiet)
    arms = [our_arm(target, rule=rule), our_arm(target, MASK, POLICY, rule)]
    arms.append(our_arm(target, None, DraftPolicy.ngrams_alone(), rule))
    changed = 0
    for prompt, continuation in zip(PROMPTS, trace.continuations, strict=True):
        ids = torch.tensor([prompt])
        plain = tuple(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit)[0].tolist()[4:])
        assert continuation == plain and [arm(prompt, limit).ids for arm in arms] == [plain] * 3
        changed += our_arm(target)(prompt, limit).ids != plain
    assert changed > len(PROMPTS) / 2, "the config must matter"


def test_replay_of_penalised_text_is_exact(model: Any) -> None:
    """Prevents drafts from being predicted without the penalties that decoding shows them."""
    target = Target.of(asks(model, **PENALTIES))
    rule = SelectionRule.of(model)
    trace = record(target, PROMPTS, DecodeSettings(new_tokens=24, rule=rule), quiet)
    replayed = DraftReplay(Replay(target, trace, 3), MASK).walk(POLICY)
    stats, arm = DecodeStats(), our_arm(target, MASK, POLICY, rule)
    for prompt in PROMPTS:
        stats.add(arm(prompt, 24).stats)
    assert sum(n * c for (_, n), c in replayed.items()) == stats.accepted > 0
    unaware = DraftReplay(Replay(target, replace(trace, rule=GREEDY), 3), MASK).walk(POLICY)
    assert unaware != replayed, "the penalties must matter"


def test_replay_of_sampled_text_agrees_with_decoding(model: Any) -> None:
    """Prevents acceptance at a temperature alone from being reported for top-k, top-p and a penalty."""
    target = Target.of(asks(model, **SAMPLES, repetition_penalty=1.3))
    rule = SelectionRule.of(model)
    prompts = tuple((3 + i, 5, 7, 11 + i) for i in range(40))
    trace = record(target, prompts, DecodeSettings(new_tokens=40, rule=rule), quiet)
    replayed = DraftReplay(Replay(target, trace, 3), MASK).walk(POLICY)
    stats = DecodeStats()
    for i, prompt in enumerate(prompts):  # other random numbers than the trace's
        stats.add(our_arm(target, MASK, POLICY, rule)((*prompt, 17, 19 + i % 5), 40).stats)
    predicted = sum(n * c for (_, n), c in replayed.items()) / sum(k * c for (k, _), c in replayed.items())
    spread = (stats.acceptance_rate * (1 - stats.acceptance_rate) / stats.drafted) ** 0.5
    assert 0.05 < stats.acceptance_rate < 0.95 and abs(predicted - stats.acceptance_rate) < 6 * spread
    full = DraftReplay(Replay(target, trace, 3), SkipMask(num_layers=4)).walk(POLICY)
    assert sum(c for (k, n), c in full.items() if n < k) <= len(prompts), "the model accepts itself to a text's end"


def test_bench_compares_what_obeys_the_same_config(model: Any) -> None:
    """Prevents bench from calling plain decoding unequal to a `generate` that obeys penalties."""
    groups = {"one": PROMPTS[:2]}
    options = BenchOptions(new_tokens=12, rounds=1, backend="eager", only=("HF eager", "mask"))
    data = bench(Target.of(asks(model, **PENALTIES)), groups, DraftPlan(MASK), POLICY, options, quiet)
    assert all(row["greedy_equal"] == row["prompts"] for row in data["rows"])
    assert "repetition_penalty 1.4" in data["settings"]["decoding"]
    data = bench(Target.of(asks(model, **SAMPLES)), groups, DraftPlan(MASK), POLICY, options, quiet)
    assert {row["greedy_equal"] for row in data["rows"]} == {None}


def test_a_run_and_a_validation_obey_and_say_so(shallow: Any, tmp_path: Path) -> None:
    """Prevents evidence of greedy decoding for a model that samples with penalties, and a summary that hides it."""
    model = copy.deepcopy(shallow.model)
    asks(model, eos_token_id=[0, 5], repetition_penalty=1.2)
    loaded = Loaded(name="tuned", model=model, tokenizer=shallow.tokenizer, preset=None)
    (tmp_path / "masks.toml").write_text('[space]\nforms = ["skip"]\n')
    small = SearchOptions(
        trials=3, prompts=2, held_out=2, prompt_tokens=16, new_tokens=12, trial_tokens=6, rounds=1, backend="eager",
        space=tmp_path / "masks.toml", time_budget=30,
    )  # fmt: skip
    result = search(loaded, out=tmp_path, options=small)
    assert result.file.evidence is not None and result.file.evidence.greedy_equal
    assert result.file.evidence.decoding == "greedy, repetition_penalty 1.2"
    assert json.loads((tmp_path / "summary.json").read_text())["evidence"]["decoding"] == result.file.evidence.decoding
    fresh = validate_file(loaded, result.file, small, quiet).evidence
    assert fresh is not None and fresh.greedy_equal and fresh.decoding == result.file.evidence.decoding


def test_generate_passes_only_what_was_asked_for() -> None:
    """Prevents defaults of the command from overriding the model's own."""
    assert GenerateSettings().sampling == {}
    assert GenerateSettings(temperature=0.0, top_k=5).sampling == {"do_sample": False}
    assert GenerateSettings(top_p=0.5).sampling == {"top_p": 0.5}
    asked = GenerateSettings(temperature=0.5, top_k=3).sampling
    assert asked == {"do_sample": True, "temperature": 0.5, "top_k": 3}
