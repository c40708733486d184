"""Scores: what the tokens of a draft are chosen by, at many places of a trace at once.

Shapes: P rows of a pass; Q places of a row; V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from skipsearch.decoding.processors import process
from skipsearch.evaluate.trace import Trace
from skipsearch.model.target import Target

# Processors that do not read the prefix, so that all places are given to them at once.
PREFIX_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
    "LogitNormalization", "InfNanRemoveLogitsProcessor",
}  # fmt: skip


class Scores:
    """Logits as the trace's rule changes them for drafts.

    Args:
        ids: of the trace, padded [P, T].
    """

    def __init__(self, target: Target, trace: Trace, ids: Tensor) -> None:
        self.rule, self.ids = trace.rule, ids
        # of each prompt, since some depend on its length; none: the bare logits, or a temperature
        self.processors = [
            self.rule.selection(target.model, target.ids(prompt), trace.new_tokens).of_drafts
            for prompt in trace.prompts if self.rule.fields
        ]  # fmt: skip

    def __call__(self, logits_PQV: Tensor, prompt_P: Tensor, at_PQ: Tensor) -> Tensor:
        """Scores [P, Q, V] of the token behind each place of these prompts."""
        if not self.processors:
            temperature = self.rule.temperature
            return logits_PQV.float() / temperature if temperature else logits_PQV
        flat_RV = logits_PQV.flatten(0, 1).float()
        if all(type(processor).__name__ in PREFIX_FREE for processor in self.processors[0]):
            found: Tensor = self.processors[0](None, flat_RV)
            return found.view_as(logits_PQV)
        scores_RV = flat_RV.clone()
        places = ((p, at) for p, row in zip(prompt_P.tolist(), at_PQ.tolist(), strict=True) for at in row)
        for row, (prompt, at) in enumerate(places):
            known = self.ids[prompt : prompt + 1, : at + 1]
            scores_RV[row] = process(self.processors[prompt], [0], known, flat_RV[row : row + 1])[0]
        return scores_RV.view_as(logits_PQV)


def log_probs(scores: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [...] of ids [...] under scores [..., V]."""
    scores = scores.float()
    return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)
