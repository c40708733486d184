"""Replay: what speculative decoding with a mask would accept, without decoding.

Greedy output is known in advance (the trace), so a draft that starts behind t committed tokens can be
run over the reference tokens t..t+K in one pass against the reference keys and values: up to its first
mismatch it is the real draft. Promises the accepted counts of real decoding, exactly (in fp32). Knows no
seconds. With a confidence exit, how far a draft goes *beyond* its first mismatch is taken from the
reference tokens too; that changes its cost by a fraction of a token, never what is accepted.

Sampled output too: given that a token x stands in the target's own output, the chance that it came there as an accepted
draft is min(1, draft_probs(x) / target_probs(x)), whose mean over x is sum(min(target_probs, draft_probs)), the
acceptance of speculative sampling. A fixed random number for each token of the trace decides, the same for every mask.

Shapes: P prompts, or rows of a pass, each with several starts of one prompt; K drafted tokens; Q queries of a row;
T positions; V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from skipsearch.decoding.rows import rows_may_differ
from skipsearch.evaluate.reference import Grid, ReferenceLayer, Start
from skipsearch.evaluate.trace import Trace
from skipsearch.model.device import free_memory
from skipsearch.model.target import Target

PREFILL_ROWS = 8  # prompts whose reference is made in one forward


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt's continuation that is walked on its own: positions start..stop of prompt and continuation."""

    prompt: int
    start: int
    stop: int

    def end(self, tokens: int | None) -> int:
        """Where it ends if only so many tokens are walked."""
        return self.stop if tokens is None else min(self.stop, self.start + tokens)


class Replay:
    """The reference of one trace, and draft passes over it; `MaskReplay` walks them for one mask.

    Args:
        target: whose trace it is; run eagerly.
        trace: its own continuations.
        max_length: the largest K that a policy may have.
        rows: block starts to run in one pass, at most.
        segments: parts of each continuation that are walked at once. One is exact; more make fewer and larger passes,
            and a few blocks begin where decoding would not have begun them.
        reference: keys and values of every layer over the trace, with room for a pass behind them, of a model on which
            another replay was `together`; None: they are made by running it.
        memory: bytes that a pass may take beside the reference; None: a quarter of what the device has free.

    Attributes:
        together: whether starts can be drafted side by side in one pass.
    """

    def __init__(
        self, target: Target, trace: Trace, max_length: int = 8, *, rows: int = 128, memory: float | None = None,
        segments: int = 1, reference: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.target, self.trace, self.max_length, self.parts = target, trace, max_length, segments
        self.lengths = [len(p) + len(c) for p, c in zip(trace.prompts, trace.continuations, strict=True)]
        self.longest = max(self.lengths)
        self.side = max(2, segments)  # starts of a prompt in one row, at most
        self.segments = _segments(trace, segments)
        # Room behind each row, so that a draft near the end has (meaningless) tokens to read.
        self.ids, _ = trace.padded(target.device, max_length)
        self.temperature = trace.temperature
        # chances [P, T] of acceptance, and the target's own log-probability of each token; with sampling alone
        shape = (len(self.lengths), self.longest + max_length + 1)
        self.chance_PT = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.ids.device)
        self.target_PT = torch.zeros(shape, device=self.ids.device)
        self.reference = self._make_reference() if reference is None else reference
        scratch: dict[Any, Tensor] = {}
        self._layers = [ReferenceLayer(*pair, scratch) for pair in self.reference]
        self.together = True
        self.together = reference is not None or (rows_may_differ(target) and self._keys_may_move())
        # Else each start is a pass of its own: slower, and the same.
        self.rows = self._rows_that_fit(rows, memory) if self.together else 1

    @torch.no_grad()
    def _make_reference(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [P, H, T, D] of every layer over the whole trace; padding is last, so unseen."""
        kept: list[list[tuple[Tensor, Tensor]]] = []
        for first in range(0, len(self.ids), PREFILL_ROWS):
            part = slice(first, first + PREFILL_ROWS)
            cache = Cache(layers=[DynamicLayer() for _ in range(self.target.num_layers)])
            ids = self.ids[part, : self.longest]
            logits = self.target.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            if self.temperature:
                self.target_PT[part, 1 : ids.shape[1]] = self.log_probs(logits[:, :-1], ids[:, 1:])
            kept.append([(layer.keys, layer.values) for layer in cache.layers])
        room = (0, 0, 0, self.side * self.max_length)  # behind each row, for what a pass adds
        return [
            (F.pad(torch.cat([c[i][0] for c in kept]), room), F.pad(torch.cat([c[i][1] for c in kept]), room))
            for i in range(self.target.num_layers)
        ]

    @torch.no_grad()
    def _keys_may_move(self) -> bool:
        """Whether drafts side by side equal those run alone; false with ALiBi, whose bias depends on a key's slot."""
        model = self.target.model
        prompt = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        starts = [(prompt, max(1, self.longest - 1 - far)) for far in (2, 0)]
        try:
            _, at_PQ, logits_PQV = self.logits(model, starts)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model does not understand such masks
        alone = model(input_ids=self.ids[prompt : prompt + 1, : self.longest], use_cache=False).logits[0].float()
        known = at_PQ < self.longest
        far = (logits_PQV[known].float() - alone[at_PQ[known]]).abs().max()
        half = self.target.dtype in (torch.float16, torch.bfloat16)
        return bool(far <= (0.05 if half else 1e-3) * alone.abs().max())

    def _rows_that_fit(self, most: int, memory: float | None) -> int:
        """Rows of a pass: each has a copy of its prompt's keys and values in one layer, and its logits."""
        keys, values = max(self.reference, key=lambda pair: pair[0][0].numel() + pair[1][0].numel())
        of_layer = 2 * (keys[0].numel() * keys.element_size() + values[0].numel() * values.element_size())
        row = of_layer + 4 * 4 * self.max_length * self.target.vocabulary
        budget = memory if memory is not None else 0.25 * free_memory(self.ids.device)
        return int(max(1, min(most, budget // row)))

    def logits(self, view: PreTrainedModel, starts: list[Start]) -> tuple[Grid, Tensor, Tensor]:
        """One pass of a draft view, or of the model itself, over drafts from these starts.

        Returns:
            how the starts were laid out, the places [P, Q] of the tokens read, and the logits [P, Q, V] behind them.
        """
        k, device = self.max_length, self.ids.device
        # A draft behind t committed tokens has the reference up to t - 2; token t - 1 is its first input.
        length = self.longest if self.together else starts[0][1] - 1
        grid = Grid(starts, len(self.lengths) if self.together else 0, k, length, self.side, device)
        width = grid.start_PG.shape[1]
        first_PG = torch.tensor([t - 1 for _, t in starts], device=device)[grid.start_PG]
        at_PQ = (first_PG[..., None] + torch.arange(k, device=device)).flatten(1)
        for layer in self._layers:
            layer.grid = grid
        given: dict[str, Any] = {"position_ids": at_PQ} if self.target.takes_positions else {}
        if self.together:
            reference_T = torch.arange(length, device=device)
            keys_PT = torch.cat([reference_T.expand(len(at_PQ), -1), at_PQ], 1)
            before_PQT = reference_T < first_PG.repeat_interleave(k, 1)[..., None]
            of_Q = torch.arange(width, device=device).repeat_interleave(k)
            itself_PQT = (of_Q[:, None] == of_Q).expand(len(at_PQ), -1, -1)
            given["attention_mask"] = self.target.attention.masks(
                at_PQ, lambda _window: keys_PT, only_RQK=torch.cat([before_PQT, itself_PQT], 2)
            )
        logits_PQV = view(
            input_ids=self.ids[grid.prompt_P[:, None], at_PQ], past_key_values=Cache(layers=list(self._layers)),
            use_cache=True, **given,
        ).logits  # fmt: skip
        return grid, at_PQ, logits_PQV

    def log_probs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities [...] of ids [...] under logits [..., V] at the trace's temperature."""
        scores = logits.float() / self.temperature
        return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)

    def sample(self, count: int = 2) -> list[Segment]:
        """So many segments of every prompt, early ones and late ones in turn: a part that looks like the whole."""
        turns = sorted(range(self.parts), key=lambda turn: (turn % 2, turn))[:count]
        numbers = Counter[int]()
        chosen = []
        for segment in self.segments:
            if (numbers[segment.prompt] + segment.prompt) % self.parts in turns:
                chosen.append(segment)
            numbers[segment.prompt] += 1
        return chosen or self.segments


def _segments(trace: Trace, count: int) -> list[Segment]:
    """Each continuation in so many parts, behind the token that its prefill gives."""
    segments = []
    for p, (prompt, continuation) in enumerate(zip(trace.prompts, trace.continuations, strict=True)):
        first, length = len(prompt) + 1, len(prompt) + len(continuation)
        cuts = [first + (length - first) * number // count for number in range(count + 1)]
        segments += [Segment(p, a, b) for a, b in itertools.pairwise(cuts) if a < b]
    return segments
