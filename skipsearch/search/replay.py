"""Replay: what speculative decoding with a mask would accept, without decoding.

Greedy output is known in advance (the trace), so a draft that starts behind t committed tokens can be
run over the reference tokens t..t+K in one pass against the reference keys and values: up to its first
mismatch it is the real draft. Promises the accepted counts of real decoding, exactly (in fp32). Knows no
seconds. With a confidence exit, how far a draft goes *beyond* its first mismatch is taken from the
reference tokens too; that decides its cost by a fraction of a token, never what is accepted.

Shapes: R rows, each a block start; K drafted tokens; T reference positions; V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from skipsearch.decoding.policy import DraftPolicy, ExitRule
from skipsearch.decoding.rows import rows_may_differ
from skipsearch.mask import SkipMask
from skipsearch.model.cache import layer_windows
from skipsearch.model.masks import attention_masks
from skipsearch.model.sublayers import input_device, takes_positions
from skipsearch.model.view import draft_view
from skipsearch.search.trace import Trace

Start = tuple[int, int]  # (prompt, committed tokens)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a draft from one block start looks like.

    Attributes:
        matches: how many of its first K tokens equal the reference, up to the first that does not.
        confidence: the largest draft probability at each of K positions.
    """

    matches: int
    confidence: tuple[float, ...]


class _ReferenceLayer(DynamicLayer):  # type: ignore[misc]
    """Shows the draft the reference keys and values of its rows with its own in their places, and stores nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.reference = (keys, values)
        self.rows: Tensor | None = None
        self.slots_RK = torch.empty(0)
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = []
        row = torch.arange(len(key_states), device=key_states.device)[:, None]
        for reference, own in zip(self.reference, (key_states, value_states), strict=True):
            kept = reference[:, :, : self.length]
            kept = F.pad(kept if self.rows is None else kept[self.rows], (0, 0, 0, own.shape[2]))
            kept[row, :, self.slots_RK] = own.transpose(1, 2)
            out.append(kept)
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return self.length


class Replay:
    """Scores masks on one trace.

    Args:
        model: the target.
        trace: its own greedy continuations.
        max_length: the largest K that a policy may have.
        rows: block starts to run in one pass; bounds memory.
    """

    def __init__(self, model: PreTrainedModel, trace: Trace, max_length: int = 8, rows: int = 64) -> None:
        self.together = rows_may_differ(model)  # else each start is a pass of its own: slower, and the same
        rows = rows if self.together else 1
        self.model, self.trace, self.max_length, self.rows = model, trace, max_length, rows
        sequences = [p + c for p, c in zip(trace.prompts, trace.continuations, strict=True)]
        self.lengths = [len(s) for s in sequences]
        # Room behind each row, so that a draft near the end has (meaningless) tokens to read.
        self.ids = torch.zeros(
            (len(sequences), max(self.lengths) + max_length), dtype=torch.long, device=input_device(model)
        )
        for i, sequence in enumerate(sequences):
            self.ids[i, : len(sequence)] = torch.tensor(sequence)
        self.windows = layer_windows(DynamicCache(config=model.config))
        self.reference = self._reference()

    @torch.no_grad()
    def _reference(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [P, H, T, D] of every layer over the whole trace; padding is behind, so unseen."""
        config = self.model.config.get_text_config(decoder=True)
        kept: list[list[tuple[Tensor, Tensor]]] = []
        for chunk in self.ids.split(8):
            cache = Cache(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
            ids = chunk[:, : max(self.lengths)]
            self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            kept.append([(layer.keys, layer.values) for layer in cache.layers])
        return [
            (torch.cat([c[i][0] for c in kept]), torch.cat([c[i][1] for c in kept]))
            for i in range(config.num_hidden_layers)
        ]

    def of(self, mask: SkipMask) -> MaskReplay:
        """The replay of one mask."""
        return MaskReplay(self, mask)


class MaskReplay:
    """Drafts of one mask, run where they are asked for and remembered."""

    def __init__(self, replay: Replay, mask: SkipMask) -> None:
        self.replay, self.mask = replay, mask
        self.view = draft_view(replay.model, mask)
        self.layers = [_ReferenceLayer(*reference) for reference in replay.reference]
        self.drafts: dict[Start, Draft] = {}

    @torch.no_grad()
    def run(self, starts: Iterable[Start]) -> None:
        """Run the drafts of these block starts that are not known yet."""
        missing = [s for s in starts if s not in self.drafts]
        for first in range(0, len(missing), self.replay.rows):
            self._run(missing[first : first + self.replay.rows])

    def _run(self, starts: list[Start]) -> None:
        replay, k = self.replay, self.replay.max_length
        device = replay.ids.device
        prompts = torch.tensor([p for p, _ in starts], device=device)
        committed = torch.tensor([t for _, t in starts], device=device)
        length = int(committed.max()) - 1
        everyone = [p for p, _ in starts] == list(range(len(replay.lengths)))
        # A draft behind t committed tokens has the reference up to t - 2; token t - 1 is its first input.
        at_RK = committed[:, None] - 1 + torch.arange(k, device=device)
        for layer in self.layers:
            layer.rows, layer.length, layer.slots_RK = None if everyone else prompts, length, at_RK
        given: dict[str, Any] = {"position_ids": at_RK} if takes_positions(replay.model) else {}
        if replay.together:
            keys = torch.arange(length + k, device=device)[None]
            given["attention_mask"] = attention_masks(replay.model, replay.windows, at_RK, lambda _window: keys)
        logits_RKV = self.view(
            input_ids=replay.ids[prompts[:, None], at_RK], past_key_values=Cache(layers=list(self.layers)),
            use_cache=True, **given,
        ).logits  # fmt: skip
        highest_RK, token_RK = logits_RKV.max(-1)
        confidence_RK = (highest_RK.float() - logits_RKV.float().logsumexp(-1)).exp()
        ends = torch.tensor([replay.lengths[p] for p, _ in starts], device=device)
        right_RK = (token_RK == replay.ids[prompts[:, None], at_RK + 1]) & (at_RK + 1 < ends[:, None])
        matches = right_RK.long().cumprod(-1).sum(-1).tolist()
        for start, n, confidence in zip(starts, matches, confidence_RK.tolist(), strict=True):
            self.drafts[start] = Draft(n, tuple(confidence))

    def walk(self, policy: DraftPolicy) -> Counter[tuple[int, int]]:
        """Blocks by (drafted, accepted), as `DecodeStats.blocks` of real decoding with this policy.

        All prompts advance together, a block a round, so that each round is one pass.
        """
        assert policy.max_length <= self.replay.max_length
        trace, ends = self.replay.trace, self.replay.lengths
        blocks: Counter[tuple[int, int]] = Counter()
        rules = [ExitRule(policy) for _ in trace.prompts]
        at = {p: len(prompt) + 1 for p, prompt in enumerate(trace.prompts) if len(prompt) + 1 < ends[p]}
        while at:
            self.run(at.items())
            for p, t in list(at.items()):
                draft = self.drafts[p, t]
                k = rules[p].length(draft.confidence, len(trace.prompts[p]) + trace.new_tokens - t - 1)
                n = min(draft.matches, k)
                rules[p].learn(k, n)
                blocks[k, n] += 1
                at[p] = t + n + 1
                if at[p] >= ends[p]:
                    del at[p]
        return blocks

    def outlook(self) -> list[tuple[list[bool], list[float]]]:
        """For each prompt, position by position: would a draft be right there, and how sure was it?

        Read off the drafts run so far. Positions that no draft reached count as right and sure. Good for
        comparing policies, since where a block starts matters little; `walk` gives the exact counts.
        """
        rows = []
        for p, prompt in enumerate(self.replay.trace.prompts):
            size = self.replay.lengths[p] - len(prompt) - 1
            right, sure = [True] * max(0, size), [1.0] * max(0, size)
            for (q, t), draft in self.drafts.items():
                if q == p:
                    first = t - len(prompt) - 1
                    for j in range(min(draft.matches + 1, self.replay.max_length, size - first)):
                        right[first + j], sure[first + j] = j < draft.matches, draft.confidence[j]
            rows.append((right, sure))
        return rows
