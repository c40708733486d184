"""Accept rules: how much of a draft the target keeps, and the token that ends the block.

Shapes: K drafted tokens, V vocabulary entries; target tensors have K + 1 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipsearch.errors import DecodingError


def accept_greedy(draft_ids: list[int], target_ids: list[int]) -> int:
    """num_accepted: the length of the prefix on which draft [K] and the target's argmax [K + 1] agree."""
    for n, (drafted, wanted) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if drafted != wanted:
            return n
    return len(draft_ids)


def probabilities(scores_V: Tensor) -> Tensor:
    """Softmax in fp32 of processed scores [V].

    Raises:
        DecodingError: the scores hold NaN, or no finite entry at all.
    """
    probs_V = scores_V.float().softmax(-1)
    # Covers NaN, +inf and all -inf at once: each turns the whole row into NaN.
    if torch.isnan(probs_V[0]):
        raise DecodingError(
            "the logits hold NaN, +inf or no finite value, so nothing can be sampled; "
            "load the model in float32 or bfloat16, or check the logits processors"
        )
    return probs_V


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token from a distribution [V]."""
    return int(torch.multinomial(probs_V, 1, generator=generator))


def accept_sampling(
    target_probs_KV: Tensor, draft_probs_KV: Tensor, draft_ids: list[int], generator: torch.Generator
) -> tuple[int, int]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318).

    Args:
        target_probs_KV: [K + 1, V] processed probabilities of the target.
        draft_probs_KV: [K, V] the processed probabilities that the drafted tokens were drawn from.
        draft_ids: the K drafted tokens.
        generator: randomness of acceptance alone; the drawing of drafts must use another.

    Returns:
        num_accepted in 0..K, and the token that ends the block: drawn from the residual
        max(0, target - draft) after a rejection, from the target's last row otherwise.
    """
    for n, token in enumerate(draft_ids):
        target_probs_V, draft_probs_V = target_probs_KV[n], draft_probs_KV[n]
        u = torch.rand((), generator=generator, device=generator.device).item()
        # u < target / draft without the division: the draft's probability of its own token is positive.
        if u * draft_probs_V[token].item() < target_probs_V[token].item():
            continue
        residual_V = (target_probs_V - draft_probs_V).clamp_(min=0)
        total = residual_V.sum()
        # Equal distributions reject only by rounding; the residual is then empty and the target's row is it.
        return n, draw(residual_V / total if total > 0 else target_probs_V, generator)
    return len(draft_ids), draw(target_probs_KV[len(draft_ids)], generator)
