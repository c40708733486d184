"""A state machine over one sequence: whatever is drafted, accepted, cut or handed over, cache and output stay right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from skipsearch import SkipMask
from skipsearch.compiled.backend import with_backend
from skipsearch.decoding.batch import Layout
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

MODELS = {family: make_tiny(family) for family in ("llama", "gemma3_text", "gpt2")}
ROOM = 60


class Decoding(RuleBasedStateMachine):
    """Rows of one or two sequences; the reference is the model itself on the tokens so far."""

    @initialize(family=st.sampled_from(sorted(MODELS)), rows=st.integers(1, 2), pad=st.integers(0, 3),
                length=st.integers(4, 12))  # fmt: skip
    def start(self, family: str, rows: int, pad: int, length: int) -> None:
        self.model = MODELS[family]
        ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(length))
        self.pads = [0, pad][:rows]
        self.open(ids, SkipMask(attention=[0], num_layers=4))
        self.texts = [row.tolist() for row in ids]
        self.commit([0] * rows)

    def open(self, ids: torch.Tensor, mask: SkipMask, past: Any = None) -> None:
        layout = Layout(pads=tuple(self.pads), past=past)
        draft = draft_view(self.model, mask)
        self.sequences = Sequences(Target.of(self.model), ids, capacity=ROOM + 12, draft=draft, layout=layout)

    def commit(self, drafted: list[int]) -> None:
        before = list(self.sequences.lengths)
        for b, block in enumerate(self.sequences.verify(drafted)):
            self.texts[block.row] += block.tokens
            assert self.sequences.lengths[b] == before[b] + len(block.tokens)
            assert 0 <= block.accepted <= block.drafted

    @precondition(lambda self: max(self.sequences.lengths) < ROOM)
    @rule(k=st.integers(1, 6), threshold=st.sampled_from([None, 0.2]))
    def draft_and_verify(self, k: int, threshold: float | None) -> None:
        policy = DraftPolicy(max_length=k, exit_threshold=threshold)
        drafted, _ = self.sequences.draft(
            [min(policy.max_length, ROOM + 8 - length) for length in self.sequences.lengths],
            lambda place, token, confidence: policy.exit_threshold is not None and confidence < policy.exit_threshold,
        )  # fmt: skip
        self.commit(drafted)

    @precondition(lambda self: max(self.sequences.lengths) < ROOM)
    @rule(good=st.integers(0, 4), bad=st.integers(0, 3))
    def accept_so_many_and_reject_the_rest(self, good: int, bad: int) -> None:
        """A draft that is right for `good` tokens and wrong behind."""
        drafted = []
        for b, row in enumerate(self.sequences.rows):
            text = self.texts[row][self.pads[row] :]
            wanted = self.model.generate(
                torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long), do_sample=False,
                max_new_tokens=good + 1, eos_token_id=None, pad_token_id=0,
            )[0, len(text) :].tolist()  # fmt: skip
            tokens = [*wanted[:good], *[(wanted[good] + 1) % 97] * bad]
            length = self.sequences.lengths[b]
            self.sequences.ids[b, length : length + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            drafted.append(len(tokens))
        before = [len(self.texts[row]) for row in self.sequences.rows]
        self.commit(drafted)
        assert all(len(self.texts[row]) == n + good + 1 for row, n in zip(self.sequences.rows, before, strict=True))

    @rule(bits=st.lists(st.booleans(), min_size=8, max_size=8))
    def switch_mask(self, bits: list[bool]) -> None:
        self.sequences.draft_with(draft_view(self.model, SkipMask.from_bits(bits)))

    @rule(cut=st.integers(1, 5), which=st.integers(0, 1))
    def truncate(self, cut: int, which: int) -> None:
        b = which % len(self.sequences.rows)
        row = self.sequences.rows[b]
        length = max(self.pads[row] + 2, self.sequences.lengths[b] - cut)
        self.sequences.truncate(b, length)
        self.texts[row] = self.texts[row][:length]
        self.commit([0] * len(self.sequences.rows))

    @precondition(lambda self: len(self.sequences.rows) == 2)
    @rule(which=st.integers(0, 1))
    def end_of_sequence(self, which: int) -> None:
        self.sequences.drop([which])

    @precondition(lambda self: len(self.sequences.rows) == 1 and not any(self.sequences.pads))
    @rule(bits=st.lists(st.booleans(), min_size=8, max_size=8))
    def continue_from_past_key_values(self, bits: list[bool]) -> None:
        past = DynamicCache(config=self.model.config)
        self.sequences.cache.hand_over(past)
        text = self.texts[self.sequences.rows[0]]
        self.pads, self.texts = [0], [text]
        self.open(torch.tensor([text]), SkipMask.from_bits(bits), past)
        self.commit([0])

    @invariant()
    @torch.no_grad()
    def committed_keys_and_greedy_tokens_are_the_models_own(self) -> None:
        if not hasattr(self, "sequences"):
            return
        for b, row in enumerate(self.sequences.rows):
            pad = self.pads[row]
            text = self.texts[row]
            fresh = DynamicCache(config=self.model.config)
            logits = self.model(torch.tensor([text[pad:-1]]), **{CACHE: fresh}, use_cache=True).logits
            assert int(logits[0, -1].argmax()) == text[-1]
            assert self.sequences.ids[b, : len(text)].tolist() == text
            committed = self.sequences.cache.committed[b]
            assert committed == len(text) - 1 - self.sequences.offset
            for mine, theirs in zip(self.sequences.cache.cache.layers, fresh.layers, strict=True):
                seen = theirs.keys.shape[-2]
                torch.testing.assert_close(
                    mine.buffers[0][b, :, committed - seen : committed], theirs.keys[0], atol=1e-4, rtol=1e-4
                )


Decoding.TestCase.settings = settings(max_examples=40, stateful_step_count=14, deadline=None)
TestDecoding = Decoding.TestCase


def poisoned(sequences: Any) -> None:
    """Overwrite every slot that is not committed."""
    for layer in sequences.cache.cache.layers:
        for buffer in layer.buffers:
            for b, committed in enumerate(sequences.cache.committed):
                buffer[b, :, committed:] = 50.0


@pytest.mark.parametrize(("family", "backend"), [("llama", "eager"), ("gemma3_text", "eager"), ("llama", "compiled")])
def test_nothing_attends_to_what_is_forgotten(tiny: Any, family: str, backend: Any) -> None:
    """Prevents keys of rejected drafts from reaching a later token: slots are poisoned after each block."""
    model = tiny(family)
    prompts = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = prompts if backend == "eager" else prompts[:1]
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(rows, attention_mask=torch.ones_like(rows), **options)[:, 9:].tolist()
    target = with_backend(Target.of(model), backend)
    draft = draft_view(model, SkipMask(attention=[0, 2], mlp=[1], num_layers=4))
    sequences = Sequences(target, rows, capacity=40, draft=draft)
    stats, found = DecodeStats(), [list[int]() for _ in rows]
    for block in decode(sequences, Ending(max_length=39), policy=DraftPolicy(max_length=4, ngram=6), stats=stats):
        found[block.row] += block.tokens
        poisoned(sequences)
    assert found == expected and stats.accepted < stats.drafted


def test_poison_is_seen_where_it_is_committed(tiny: Any) -> None:
    """Prevents the test above from passing because poison does nothing."""
    ids = torch.arange(9)[None] + 3
    tokens = []
    for spoil in (False, True):
        sequences = Sequences(Target.of(tiny("llama")), ids, capacity=40)
        sequences.verify([0])
        if spoil:
            sequences.cache.commit(0, sequences.cache.committed[0] - 1)
            poisoned(sequences)
            sequences.cache.commit(0, sequences.cache.committed[0] + 1)
        tokens.append([sequences.verify([0])[0].tokens[0] for _ in range(6)])
    assert tokens[0] != tokens[1]
