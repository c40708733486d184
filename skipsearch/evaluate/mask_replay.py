"""Drafts of one mask on a replay: run where they are asked for, walked as decoding would, remembered.

Shapes: P rows, each with several starts of one prompt; K drafted tokens; Q queries of a row; T positions; V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from skipsearch.decoding.policy import DraftPolicy, ExitRule
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.reference import Grid, ReferenceLayer, Start
from skipsearch.mask import SkipMask
from skipsearch.model.masks import attention_masks
from skipsearch.model.sublayers import takes_positions

if TYPE_CHECKING:
    from skipsearch.evaluate.replay import Replay


# For each stretch of text, position by position: would a draft be right, and how sure; and how many of the positions
# blocks may begin at.
Outlook = list[tuple[list[bool], list[float], int]]


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

    @torch.no_grad()
    def look(self, starts: list[Start]) -> tuple[Tensor, Tensor]:
        """Behind each start: would each of K tokens be accepted after the reference's before it; how sure is it [S, K].

        In the order of prompts. One pass.
        """
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
        return grid.of_starts(right_PQ), grid.of_starts(confidence_PQ)

    def _run(self, starts: list[Start]) -> None:
        right_SK, confidence_SK = self.look(starts)
        matches = right_SK.long().cumprod(-1).sum(-1).tolist()
        for start, n, confidence in zip(starts, matches, confidence_SK.tolist(), strict=True):
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

    def outlook(self, lanes: Sequence[Lane] | None = None) -> Outlook:
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
