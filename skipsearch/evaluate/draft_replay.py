"""DraftReplay: drafts of one plan on a replay, run where they are needed, walked as decoding would, and kept.

Shapes: P rows of a pass; S block starts; K drafted tokens; Q queries of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from skipsearch.decoding.exit_rule import ExitRule
from skipsearch.draft.view import draft_view
from skipsearch.errors import out_of_memory
from skipsearch.evaluate.reference import Start
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.scores import log_probs
from skipsearch.mask import SkipMask
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True)
class ReplayedDraft:
    """What a draft from one block start looks like.

    Attributes:
        matches: how many of its first K tokens are accepted (greedily: equal the reference) before one is not.
        confidence: the largest draft probability at each of K positions.
    """

    matches: int
    confidence: tuple[float, ...]


class DraftReplay:
    """Drafts of one plan.

    Attributes:
        drafts: those that were run so far, by block start.
        by_prompt: blocks of the last walk, by (drafted, accepted), for each prompt.
    """

    def __init__(self, replay: Replay, plan: SkipMask | DraftPlan) -> None:
        self.replay, self.plan = replay, DraftPlan.of(plan)
        self.view = draft_view(replay.target.model, self.plan)
        self.drafts: dict[Start, ReplayedDraft] = {}
        self.by_prompt: list[Counter[tuple[int, int]]] = []

    @torch.no_grad()
    def run(self, starts: Iterable[Start]) -> None:
        """Run the drafts of these block starts that were not run yet."""
        for part in self.replay.passes({s for s in starts if s not in self.drafts}):
            correct_SK, confidence_SK = self.evaluate(part)
            matches = correct_SK.long().cumprod(-1).sum(-1).tolist()
            for start, n, confidence in zip(part, matches, confidence_SK.tolist(), strict=True):
                self.drafts[start] = ReplayedDraft(n, tuple(confidence))

    def evaluate(self, starts: list[Start]) -> tuple[Tensor, Tensor]:
        """`_pass`, in two halves where it needs more memory than there is; later passes are then as small."""
        try:
            return self._pass(starts)
        except (MemoryError, RuntimeError) as error:
            if len(starts) == 1 or not out_of_memory(error):
                raise
        half = len(starts) // 2  # behind the handler, which keeps what the pass has allocated
        self.replay.rows = min(self.replay.rows, half)
        (correct, confidence), (other_correct, other_confidence) = map(self.evaluate, (starts[:half], starts[half:]))
        return torch.cat([correct, other_correct]), torch.cat([confidence, other_confidence])

    @torch.no_grad()
    def _pass(self, starts: list[Start]) -> tuple[Tensor, Tensor]:
        """One pass over drafts from these starts, which are in the order of prompts and share a group.

        Returns:
            [S, K] whether each token would be accepted if those before it were the reference's, and its confidence.
        """
        replay = self.replay
        (grid, prompt_P), at_PQ, logits_PQV = replay.logits(self.view, starts, self.plan.first)
        prompts = prompt_P[:, None]
        wanted_PQ = replay.ids[prompts, at_PQ + 1]
        logits_PQV = replay.scores(logits_PQV, prompt_P, at_PQ)
        highest_PQ, token_PQ = logits_PQV.max(-1)
        if replay.rule.temperature:
            draft_PQ = log_probs(logits_PQV, wanted_PQ)
            accepted_PQ = replay.chance_PT[prompts, at_PQ + 1] < (draft_PQ - replay.target_PT[prompts, at_PQ + 1]).exp()
            confidence_PQ = log_probs(logits_PQV, token_PQ).exp()
        else:
            accepted_PQ = token_PQ == wanted_PQ
            confidence_PQ = (highest_PQ.float() - logits_PQV.float().logsumexp(-1)).exp()
        correct_PQ = accepted_PQ & (at_PQ + 1 < torch.tensor(replay.lengths, device=at_PQ.device)[prompts])
        if replay.ranks_PT is not None and self.plan.head_ids is not None:
            correct_PQ &= replay.ranks_PT[prompts, at_PQ + 1] < len(self.plan.head_ids)
        return grid.of_starts(correct_PQ), grid.of_starts(confidence_PQ)

    def walk(self, policy: DraftPolicy) -> Counter[tuple[int, int]]:
        """Blocks by (drafted, accepted), as `DecodeStats.blocks` of real decoding with this policy.

        All prompts advance together, a block a round, so that each round is one pass over each group.
        """
        assert policy.max_length <= self.replay.max_length
        trace = self.replay.trace
        by_prompt: list[Counter[tuple[int, int]]] = [Counter() for _ in trace.prompts]
        rules = [ExitRule(policy) for _ in trace.prompts]
        # Behind the token that the prefill gives.
        at = {p: len(prompt) + 1 for p, prompt in enumerate(trace.prompts) if len(prompt) + 1 < self.replay.lengths[p]}
        while at:
            self.run(at.items())
            for p, t in list(at.items()):
                draft = self.drafts[p, t]
                room = len(trace.prompts[p]) + trace.new_tokens - t - 1
                k = rules[p].length(draft.confidence, room)
                n = min(draft.matches, k)
                rules[p].learn(k, n)
                by_prompt[p][k, n] += 1
                at[p] = t + n + 1
                if at[p] >= self.replay.lengths[p]:
                    del at[p]
        self.by_prompt = by_prompt
        return sum(by_prompt, Counter())
