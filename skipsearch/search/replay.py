"""Replay: what speculative decoding with a mask would accept, without decoding.

Sampled output too: given that a token x stands in the target's own output, the chance that it came there as an accepted
draft is min(1, draft_probs(x) / target_probs(x)), whose mean over x is sum(min(target_probs, draft_probs)), the
acceptance of speculative sampling. A fixed random number for each token of the trace decides, the same for every mask.

Greedy output is known in advance (the trace), so a draft that starts behind t committed tokens can be
run over the reference tokens t..t+K in one pass against the reference keys and values: up to its first
mismatch it is the real draft. Promises the accepted counts of real decoding, exactly (in fp32). Knows no
seconds. With a confidence exit, how far a draft goes *beyond* its first mismatch is taken from the
reference tokens too; that decides its cost by a fraction of a token, never what is accepted.

Shapes: S block starts; P rows, each with G starts of one prompt; K drafted tokens; Q = G * K queries; T positions;
V vocabulary.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
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
from skipsearch.search.reference import Grid, ReferenceLayer, Start
from skipsearch.search.trace import Trace


@dataclass(frozen=True, slots=True)
class Draft:
    """What a draft from one block start looks like.

    Attributes:
        matches: how many of its first K tokens are accepted (greedily: equal the reference) before one is not.
        confidence: the largest draft probability at each of K positions.
    """

    matches: int
    confidence: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Lane:
    """A part of a prompt's continuation that is walked on its own: positions start..stop of prompt and continuation."""

    prompt: int
    start: int
    stop: int

    def end(self, tokens: int | None) -> int:
        """Where it ends if so many tokens are looked at."""
        return self.stop if tokens is None else min(self.stop, self.start + tokens)


def free_memory(device: torch.device) -> float:
    """Bytes that the device has free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not told here
        return 4e9


class Replay:
    """Scores masks on one trace.

    Args:
        model: the target.
        trace: its own continuations.
        max_length: the largest K that a policy may have.
        rows: block starts to run in one pass, at most.
        lanes: parts of each continuation that are walked at once. One is exact; more make fewer and larger passes,
            and a few blocks begin where decoding would not have begun them.
        memory: bytes that a pass may take beside the reference; None: a quarter of what the device has free.
    """

    def __init__(
        self, model: PreTrainedModel, trace: Trace, max_length: int = 8, rows: int = 128, memory: float | None = None,
        lanes: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.trace, self.max_length = model, trace, max_length
        self.lengths = [len(p) + len(c) for p, c in zip(trace.prompts, trace.continuations, strict=True)]
        self.lanes: list[Lane] = []
        self.parts, self.longest = lanes, max(self.lengths)
        self.side = max(2, lanes)  # starts of a prompt in one row, at most
        for p, (prompt, length) in enumerate(zip(trace.prompts, self.lengths, strict=True)):
            first = len(prompt) + 1  # the prefill gives the token before
            cuts = [first + (length - first) * lane // lanes for lane in range(lanes + 1)]
            self.lanes += [Lane(p, a, b) for a, b in itertools.pairwise(cuts) if a < b]
        # Room behind each row, so that a draft near the end has (meaningless) tokens to read.
        self.ids, _ = trace.padded(input_device(model), max_length)
        self.windows = layer_windows(DynamicCache(config=model.config))
        self.temperature = trace.temperature
        # chances [P, T] of acceptance, and the target's own log-probability of each token; with sampling alone
        shape = (len(self.lengths), self.longest + max_length + 1)
        self.chance_PT = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.ids.device)
        self.target_PT = torch.zeros(shape, device=self.ids.device)
        self.scratch: dict[Any, Tensor] = {}
        self.reference = self._reference()
        self.together = True
        self.together = rows_may_differ(model) and self._keys_may_move()
        # Else each start is a pass of its own: slower, and the same.
        self.rows = self._rows(rows, memory) if self.together else 1

    @torch.no_grad()
    def _reference(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [P, H, T, D] of every layer over the whole trace; padding is behind, so unseen."""
        config = self.model.config.get_text_config(decoder=True)
        kept: list[list[tuple[Tensor, Tensor]]] = []
        for first in range(0, len(self.ids), 8):
            cache = Cache(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
            ids = self.ids[first : first + 8, : max(self.lengths)]
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            if self.temperature:
                self.target_PT[first : first + 8, 1 : ids.shape[1]] = self.log_probs(logits[:, :-1], ids[:, 1:])
            kept.append([(layer.keys, layer.values) for layer in cache.layers])
        room = (0, 0, 0, self.side * self.max_length)  # behind each row, for what a pass adds
        return [
            (F.pad(torch.cat([c[i][0] for c in kept]), room), F.pad(torch.cat([c[i][1] for c in kept]), room))
            for i in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def _keys_may_move(self) -> bool:
        """Whether drafts side by side come out as they do alone: not where a key's bias follows from its place."""
        prompt = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        starts = [(prompt, max(1, self.longest - 1 - far)) for far in (2, 0)]
        drafts = MaskReplay(self, SkipMask(num_layers=len(self.reference)))
        try:
            _, at_PQ, logits_PQV = drafts.logits(starts)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model makes nothing of such masks
        alone = self.model(input_ids=self.ids[prompt : prompt + 1, : self.longest], use_cache=False).logits[0].float()
        known = at_PQ < self.longest
        far = (logits_PQV[known].float() - alone[at_PQ[known]]).abs().max()
        half = self.model.dtype in (torch.float16, torch.bfloat16)
        return bool(far <= (0.05 if half else 1e-3) * alone.abs().max())

    def _rows(self, most: int, memory: float | None) -> int:
        """Rows of a pass that fit: each has a copy of its prompt's keys and values in one layer, and its logits."""
        keys, values = max(self.reference, key=lambda pair: pair[0][0].numel() + pair[1][0].numel())
        of_layer = 2 * (keys[0].numel() * keys.element_size() + values[0].numel() * values.element_size())
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        row = of_layer + 4 * 4 * self.max_length * vocabulary
        budget = memory if memory is not None else 0.25 * free_memory(self.ids.device)
        return int(max(1, min(most, budget // row)))

    def log_probs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities [...] of ids [...] under logits [..., V] at the trace's temperature."""
        scores = logits.float() / self.temperature
        return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)

    def sample(self, count: int = 2) -> list[Lane]:
        """So many lanes of every prompt's, early ones and late ones by turns: a part that looks like the whole."""
        turns = sorted(range(self.parts), key=lambda turn: (turn % 2, turn))[:count]
        numbers = Counter[int]()
        chosen = []
        for lane in self.lanes:
            if (numbers[lane.prompt] + lane.prompt) % self.parts in turns:
                chosen.append(lane)
            numbers[lane.prompt] += 1
        return chosen or self.lanes

    def of(self, mask: SkipMask) -> MaskReplay:
        """The replay of one mask."""
        return MaskReplay(self, mask)


class MaskReplay:
    """Drafts of one mask, run where they are asked for and remembered."""

    def __init__(self, replay: Replay, mask: SkipMask) -> None:
        self.replay, self.mask = replay, mask
        self.view = draft_view(replay.model, mask)
        self.layers = [ReferenceLayer(*reference, replay.scratch) for reference in replay.reference]
        self.drafts: dict[Start, Draft] = {}
        self.by_lane: list[Counter[tuple[int, int]]] = []  # blocks of the last walk, lane by lane
        self.unfinished: dict[Lane, int] = {}  # where it left lanes

    @torch.no_grad()
    def run(self, starts: Iterable[Start]) -> None:
        """Run the drafts of these block starts that are not known yet."""
        missing = sorted({s for s in starts if s not in self.drafts})
        for first in range(0, len(missing), self.replay.rows):
            self._run(missing[first : first + self.replay.rows])

    def logits(self, starts: list[Start]) -> tuple[Grid, Tensor, Tensor]:
        """How the starts were laid out, places [P, Q] of the tokens read, and the draft's logits [P, Q, V]."""
        replay, k, device = self.replay, self.replay.max_length, self.replay.ids.device
        # A draft behind t committed tokens has the reference up to t - 2; token t - 1 is its first input.
        length = replay.longest if replay.together else starts[0][1] - 1
        prompts_in_all = len(replay.lengths) if replay.together else 0
        grid = Grid(starts, prompts_in_all, k, length, replay.side, device)
        prompts, width = grid.prompt_P[:, None], grid.start_PG.shape[1]
        first_PG = torch.tensor([t - 1 for _, t in starts], device=device)[grid.start_PG]
        at_PQ = (first_PG[..., None] + torch.arange(k, device=device)).flatten(1)
        for layer in self.layers:
            layer.grid = grid
        given: dict[str, Any] = {"position_ids": at_PQ} if takes_positions(replay.model) else {}
        if replay.together:
            reference_T = torch.arange(length, device=device)
            keys_PT = torch.cat([reference_T.expand(len(at_PQ), -1), at_PQ], 1)
            before_PQT = reference_T < first_PG.repeat_interleave(k, 1)[..., None]
            of_Q = torch.arange(width, device=device).repeat_interleave(k)
            itself_PQT = (of_Q[:, None] == of_Q).expand(len(at_PQ), -1, -1)
            given["attention_mask"] = attention_masks(
                replay.model, replay.windows, at_PQ, lambda _window: keys_PT,
                only_RQK=torch.cat([before_PQT, itself_PQT], 2),
            )  # fmt: skip
        logits_PQV = self.view(
            input_ids=replay.ids[prompts, at_PQ], past_key_values=Cache(layers=list(self.layers)), use_cache=True,
            **given,
        ).logits  # fmt: skip
        return grid, at_PQ, logits_PQV

    def _run(self, starts: list[Start]) -> None:
        replay = self.replay
        grid, at_PQ, logits_PQV = self.logits(starts)
        prompts = grid.prompt_P[:, None]
        wanted_PQ = replay.ids[prompts, at_PQ + 1]
        highest_PQ, token_PQ = logits_PQV.max(-1)
        if replay.temperature:
            draft_PQ = replay.log_probs(logits_PQV, wanted_PQ)
            accepted_PQ = replay.chance_PT[prompts, at_PQ + 1] < (draft_PQ - replay.target_PT[prompts, at_PQ + 1]).exp()
            confidence_PQ = replay.log_probs(logits_PQV, token_PQ).exp()
        else:
            accepted_PQ = token_PQ == wanted_PQ
            confidence_PQ = (highest_PQ.float() - logits_PQV.float().logsumexp(-1)).exp()
        right_PQ = accepted_PQ & (at_PQ + 1 < torch.tensor(replay.lengths, device=at_PQ.device)[prompts])
        matches = grid.of_starts(right_PQ).long().cumprod(-1).sum(-1).tolist()
        for start, n, confidence in zip(starts, matches, grid.of_starts(confidence_PQ).tolist(), strict=True):
            self.drafts[start] = Draft(n, tuple(confidence))

    def walk(
        self, policy: DraftPolicy, tokens: int | None = None, lanes: Sequence[Lane] | None = None, least: float = 0.0,
    ) -> Counter[tuple[int, int]]:  # fmt: skip
        """Blocks by (drafted, accepted), as `DecodeStats.blocks` of real decoding with this policy.

        All lanes advance together, a block a round, so that each round is one pass.

        Args:
            tokens: stop each lane once so many are committed; what ran is remembered, so that going on costs no more.
            lanes: some of the replay's; by default all.
            least: leave the last lanes unfinished once fewer than this share of them goes on: small passes are dear.
        """
        assert policy.max_length <= self.replay.max_length
        trace, lanes = self.replay.trace, self.replay.lanes if lanes is None else lanes
        by_lane: list[Counter[tuple[int, int]]] = [Counter() for _ in lanes]
        rules = [ExitRule(policy) for _ in lanes]
        at = {number: lane.start for number, lane in enumerate(lanes)}
        while len(at) > least * len(lanes):
            self.run((lanes[number].prompt, t) for number, t in at.items())
            for number, t in list(at.items()):
                lane = lanes[number]
                draft = self.drafts[lane.prompt, t]
                k = rules[number].length(draft.confidence, len(trace.prompts[lane.prompt]) + trace.new_tokens - t - 1)
                n = min(draft.matches, k)
                rules[number].learn(k, n)
                by_lane[number][k, n] += 1
                at[number] = t + n + 1
                if at[number] >= lane.end(tokens):
                    del at[number]
        self.by_lane, self.unfinished = by_lane, {lanes[number]: t for number, t in at.items()}
        return sum(by_lane, Counter())

    def outlook(self, lanes: Sequence[Lane] | None = None) -> list[tuple[list[bool], list[float], int]]:
        """For each lane, position by position: would a draft be right there, and how sure was it?

        Read off the drafts run so far. Positions that no draft reached count as right and sure. Good for
        comparing policies, since where a block starts matters little; `walk` gives the exact counts.

        Returns:
            both, beyond the lane's end as far as its last block may reach, and the positions where blocks begin.
        """
        of_prompt: dict[int, list[tuple[int, Draft]]] = {}
        for (p, t), draft in self.drafts.items():
            of_prompt.setdefault(p, []).append((t, draft))
        rows = []
        for lane in self.replay.lanes if lanes is None else lanes:
            begins = self.unfinished.get(lane, lane.stop) - lane.start
            size = min(begins + self.replay.max_length, self.replay.lengths[lane.prompt] - lane.start)
            right, sure = [True] * size, [1.0] * size
            for t, draft in of_prompt.get(lane.prompt, []):
                first = t - lane.start
                if 0 <= first < size:
                    for j in range(min(draft.matches + 1, self.replay.max_length, size - first)):
                        right[first + j], sure[first + j] = j < draft.matches, draft.confidence[j]
            rows.append((right, sure, begins))
        return rows
