"""Window: the tokens generated last, as a replay on which a mask is scored in one short pass.

The keys and values in front of each token are those of the live sequence: nothing is run again or copied. Drafts write
behind the last token, where no slot is committed.

Shapes: S block starts; K drafted tokens; V vocabulary.
"""

from __future__ import annotations

import torch
from transformers import TemperatureLogitsWarper

from skipsearch.decoding.rule import SelectionRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.objective import Score, estimate
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.scores import log_probs
from skipsearch.evaluate.trace import Trace
from skipsearch.evaluate.windows import PositionOutcomes
from skipsearch.mask import SkipMask

LENGTH = 8  # tokens that each draft of a window runs; then the next one begins
LONGEST, SHORTEST = 96, 24  # tokens of a window
EXIT, EXITS = 0.4, (0.3, 0.4, 0.5, 0.6, 0.7)  # confidence: the default exit, and the exits to choose from


class Window:
    """The last tokens of a sequence, for scoring masks.

    Args:
        sequences: of one row, which holds all its tokens, and is not used otherwise meanwhile.
        tokens: how many of the last ones.
        temperature: at which they were sampled; 0: greedily.
    """

    def __init__(self, sequences: Sequences, tokens: int, temperature: float = 0.0) -> None:
        assert len(sequences.rows) == 1 and sequences.offset >= 0
        text = sequences.ids[0, sequences.offset : sequences.lengths[0]].tolist()
        # A draft reads the token before its first one, and what a pass adds must fit behind the text.
        self.tokens = min(tokens, LONGEST, len(text) - 2)
        first = len(text) - self.tokens
        trace = Trace(
            prompts=(tuple(text[:first]),), continuations=(tuple(text[first:]),), new_tokens=self.tokens,
            rule=SelectionRule(temperature=temperature),
        )  # fmt: skip
        self.starts = [(0, t) for t in range(first, len(text), LENGTH)]
        room = len(self.starts) * LENGTH
        reference = sequences.cache.keys_and_values(len(text) + room)
        self.replay = Replay(sequences.target, trace, LENGTH, side=len(self.starts), reference=reference)
        processors = sequences.selection.of_drafts
        if any(type(processor) is not TemperatureLogitsWarper for processor in processors):
            self.replay.scores.processors = [processors]
        if temperature:
            self._read_target()

    @torch.no_grad()
    def _read_target(self) -> None:
        """The target's own log-probability of each token, on which acceptance of sampled text depends."""
        replay = self.replay
        (_, prompt_P), at_PQ, logits_PQV = replay.logits(replay.target.model, self.starts)
        scores_PQV = replay.scores(logits_PQV, prompt_P, at_PQ)
        replay.target_PT[0, at_PQ[0] + 1] = log_probs(scores_PQV, replay.ids[:, at_PQ[0] + 1])[0]

    def outcomes(self, mask: SkipMask) -> list[PositionOutcomes]:
        """What drafts with a mask do at each position: one pass."""
        correct_SK, confidence_SK = DraftReplay(self.replay, mask).evaluate(self.starts)
        correct, confidence = correct_SK.flatten().tolist(), confidence_SK.flatten().tolist()
        return [PositionOutcomes(correct[: self.tokens], confidence[: self.tokens], max(1, self.tokens - LENGTH))]


def score(outcomes: list[PositionOutcomes], mask: SkipMask, point: Point, choose: bool = False) -> Score:
    """What a mask reaches on one or several windows, with the exit of most masks.

    Args:
        choose: the best policy instead: of many windows only, since what suits one seldom suits the next.
    """
    lengths = [k for k in (1, 2, 3, 4, 6, 8) if k < len(point.verify)]
    return estimate(outcomes, mask, point, lengths if choose else lengths[-1:], EXITS if choose else [EXIT])
