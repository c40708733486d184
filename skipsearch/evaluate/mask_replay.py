"""MaskReplay: drafts of one mask on a replay, run where they are needed, walked as decoding would, and kept.

Shapes: P rows of a pass; S block starts; K drafted tokens; Q queries of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipsearch.decoding.exit_rule import ExitRule
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.reference import Start
from skipsearch.evaluate.replay import Replay, Segment
from skipsearch.mask import SkipMask
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True)
class PositionOutcomes:
    """What drafts over one stretch of text would do, position by position.

    Attributes:
        correct: whether a drafted token would be accepted there.
        confidence: the draft's largest probability there.
        starts: how many of the positions blocks may begin at; the rest is what the last block may reach.
    """

    correct: list[bool]
    confidence: list[float]
    starts: int


@dataclass(frozen=True, slots=True)
class ReplayedDraft:
    """What a draft from one block start looks like.

    Attributes:
        matches: how many of its first K tokens are accepted (greedily: equal the reference) before one is not.
        confidence: the largest draft probability at each of K positions.
    """

    matches: int
    confidence: tuple[float, ...]


class MaskReplay:
    """Drafts of one mask.

    Attributes:
        drafts: those that were run so far, by block start.
        by_segment: blocks of the last walk, by (drafted, accepted), for each segment.
        unfinished: where the last walk left segments before their end.
    """

    def __init__(self, replay: Replay, mask: SkipMask) -> None:
        self.replay, self.mask = replay, mask
        self.view = draft_view(replay.target.model, mask)
        self.drafts: dict[Start, ReplayedDraft] = {}
        self.by_segment: list[Counter[tuple[int, int]]] = []
        self.unfinished: dict[Segment, int] = {}

    @torch.no_grad()
    def run(self, starts: Iterable[Start]) -> None:
        """Run the drafts of these block starts that were not run yet."""
        missing = sorted({s for s in starts if s not in self.drafts})
        for first in range(0, len(missing), self.replay.rows):
            self._run(missing[first : first + self.replay.rows])

    @torch.no_grad()
    def evaluate(self, starts: list[Start]) -> tuple[Tensor, Tensor]:
        """One pass over drafts from these starts, which are in the order of prompts.

        Returns:
            [S, K] whether each token would be accepted if those before it were the reference's, and its confidence.
        """
        replay = self.replay
        grid, at_PQ, logits_PQV = replay.logits(self.view, starts)
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
        correct_PQ = accepted_PQ & (at_PQ + 1 < torch.tensor(replay.lengths, device=at_PQ.device)[prompts])
        return grid.of_starts(correct_PQ), grid.of_starts(confidence_PQ)

    def _run(self, starts: list[Start]) -> None:
        correct_SK, confidence_SK = self.evaluate(starts)
        matches = correct_SK.long().cumprod(-1).sum(-1).tolist()
        for start, n, confidence in zip(starts, matches, confidence_SK.tolist(), strict=True):
            self.drafts[start] = ReplayedDraft(n, tuple(confidence))

    def walk(
        self, policy: DraftPolicy, tokens: int | None = None, segments: Sequence[Segment] | None = None,
        least: float = 0.0,
    ) -> Counter[tuple[int, int]]:  # fmt: skip
        """Blocks by (drafted, accepted), as `DecodeStats.blocks` of real decoding with this policy.

        All segments advance together, a block a round, so that each round is one pass.

        Args:
            tokens: stop each segment once so many are committed; drafts are kept, so that going on costs no more.
            segments: some of the replay's; by default all.
            least: leave the last segments unfinished once fewer than this share of them goes on: small passes cost
                more a draft.
        """
        assert policy.max_length <= self.replay.max_length
        trace, segments = self.replay.trace, self.replay.segments if segments is None else segments
        by_segment: list[Counter[tuple[int, int]]] = [Counter() for _ in segments]
        rules = [ExitRule(policy) for _ in segments]
        at = {number: segment.start for number, segment in enumerate(segments)}
        while len(at) > least * len(segments):
            self.run((segments[number].prompt, t) for number, t in at.items())
            for number, t in list(at.items()):
                segment = segments[number]
                draft = self.drafts[segment.prompt, t]
                room = len(trace.prompts[segment.prompt]) + trace.new_tokens - t - 1
                k = rules[number].length(draft.confidence, room)
                n = min(draft.matches, k)
                rules[number].learn(k, n)
                by_segment[number][k, n] += 1
                at[number] = t + n + 1
                if at[number] >= segment.end(tokens):
                    del at[number]
        self.by_segment, self.unfinished = by_segment, {segments[number]: t for number, t in at.items()}
        return sum(by_segment, Counter())

    def position_outcomes(self, segments: Sequence[Segment] | None = None) -> list[PositionOutcomes]:
        """What the drafts that were run so far say of each segment's positions, and of those its last block may reach.

        Positions that no draft reached count as correct and certain. Good for comparing policies, since where a block
        starts matters little; `walk` gives the exact counts.
        """
        of_prompt: dict[int, list[tuple[int, ReplayedDraft]]] = {}
        for (p, t), draft in self.drafts.items():
            of_prompt.setdefault(p, []).append((t, draft))
        found, longest = [], self.replay.max_length
        for segment in self.replay.segments if segments is None else segments:
            starts = self.unfinished.get(segment, segment.stop) - segment.start
            size = min(starts + longest, self.replay.lengths[segment.prompt] - segment.start)
            correct, confidence = [True] * size, [1.0] * size
            for t, draft in of_prompt.get(segment.prompt, []):
                first = t - segment.start
                if 0 <= first < size:
                    for j in range(min(draft.matches + 1, longest, size - first)):
                        correct[first + j], confidence[first + j] = j < draft.matches, draft.confidence[j]
            found.append(PositionOutcomes(correct, confidence, starts))
        return found
