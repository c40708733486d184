"""Windows of a served sequence and their prices: what replay sees, and the sequence as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from online_parts import sequence_of
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from skipsearch import SkipMask
from skipsearch.decoding.processors import TokenSelection
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace
from skipsearch.model.target import Target
from skipsearch.online.live_costs import LiveCosts
from skipsearch.online.window import LENGTH, Window


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_window_sees_what_replay_sees(tiny: Any, ids: torch.Tensor, family: str) -> None:
    """Prevents scoring against keys that are not the sequence's, and a sequence that is not as it was afterwards."""
    model = tiny(family)
    layers = model.config.num_hidden_layers
    mask = SkipMask(attention=[0], mlp=[layers - 1], num_layers=layers)
    sequences = sequence_of(model, ids, 40)
    text = sequences.ids[0, : sequences.lengths[0]].tolist()
    window = Window(sequences, 30)
    (found,) = window.outcomes(mask)
    first = len(text) - 30
    trace = Trace(prompts=(tuple(text[:first]),), continuations=(tuple(text[first:]),), new_tokens=30)
    correct_SK, confidence_SK = DraftReplay(Replay(Target.of(model), trace, LENGTH), mask).evaluate(
        [(0, t) for t in range(first, len(text), LENGTH)]
    )
    assert found.correct == correct_SK.flatten().tolist()[:30]
    np.testing.assert_allclose(found.confidence, confidence_SK.flatten().tolist()[:30], atol=1e-4)
    assert sum(found.correct) > 0 or family != "llama"
    following = [sequences.verify([0])[0].tokens[0] for _ in range(6)]
    untouched = sequence_of(model, ids, 40)
    assert following == [untouched.verify([0])[0].tokens[0] for _ in range(6)]


def test_prices_leave_the_sequence_as_it_was(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents timing from committing tokens."""
    model = tiny("llama")
    sequences = sequence_of(model, ids, 5)
    before, committed = sequences.ids[:, : sequences.lengths[0]].clone(), list(sequences.cache.committed)
    costs = LiveCosts(Target.of(model))
    costs.measure(sequences)
    assert set(costs.steps) == {"attention", "mlp", "rest"}
    assert all(v > 0 for v in (*costs.steps.values(), *costs.verifies.values()))
    assert torch.equal(before, sequences.ids[:, : sequences.lengths[0]]) and sequences.draft_model is None
    untouched = sequence_of(model, ids, 5)
    assert committed == untouched.cache.committed
    assert sequences.verify([0])[0].tokens == untouched.verify([0])[0].tokens


def test_a_window_of_penalised_text_accepts_the_model_itself(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents masks from being compared with the bare argmax where the text was chosen under a penalty."""
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2)])
    model = tiny("llama")
    sequences = Sequences(Target.of(model), ids, capacity=80, selection=TokenSelection(processors=penalty))
    for _ in range(40):
        sequences.verify([0])
    (found,) = Window(sequences, 30).outcomes(SkipMask(num_layers=model.config.num_hidden_layers))
    assert all(found.correct)
    bare = Window(sequences, 30)
    bare.replay.scores.processors = []
    assert not all(bare.outcomes(SkipMask(num_layers=model.config.num_hidden_layers))[0].correct), "it must matter"
