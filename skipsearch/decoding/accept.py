"""Accept rules: how much of a draft the target keeps, and the token that ends the block.

Shapes: B rows, K drafted tokens, V vocabulary entries; target tensors have K + 1 places. Rows may have
drafted fewer than K tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipsearch.errors import DecodingError


@dataclass(slots=True, kw_only=True)
class Sampling:
    """Generators of a sampled run, one for each use, so that no random number serves twice."""

    draft: torch.Generator
    accept: torch.Generator

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> Sampling:
        return cls(
            draft=torch.Generator(device).manual_seed(seed), accept=torch.Generator(device).manual_seed(seed + 1)
        )


def probabilities(scores: Tensor) -> Tensor:
    """Softmax in fp32 of processed scores [..., V].

    Raises:
        DecodingError: the scores hold NaN or +inf, or a row has no finite entry.
    """
    probs = scores.float().softmax(-1)
    # Covers NaN, +inf and all -inf at once: each turns its whole row into NaN.
    if torch.isnan(probs[..., 0]).any():
        raise DecodingError(
            "the logits hold NaN, +inf or no finite value, so nothing can be sampled; "
            "load the model in float32 or bfloat16, or check the logits processors"
        )
    return probs


def draft_probabilities(scores: Tensor) -> Tensor:
    """The same for a draft, which may say anything: where its scores hold no distribution, it draws the first token."""
    probs = scores.float().softmax(-1)
    broken = torch.isnan(probs[..., :1])
    first = torch.zeros_like(probs)
    first[..., 0] = 1
    return torch.where(broken, first, probs)


def draw(probs_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One token [B] from each distribution."""
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _leading(good_BK: Tensor, drafted_B: Tensor) -> Tensor:
    """How many of each row's first `drafted` places are good before the first that is not."""
    within = torch.arange(good_BK.shape[1], device=good_BK.device) < drafted_B[:, None]
    return (good_BK & within).long().cumprod(1).sum(1)


def accept_greedy(draft_ids_BK: Tensor, drafted_B: Tensor, target_ids_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the prefix on which the draft [B, K] and the target's argmax [B, K + 1] agree.

    Returns:
        num_accepted [B], and the target's own token [B] behind it.
    """
    n_B = _leading(draft_ids_BK == target_ids_BK[:, :-1], drafted_B)
    return n_B, target_ids_BK.gather(1, n_B[:, None])[:, 0]


def accept_sampling(
    target_probs_BKV: Tensor, draft_probs_BKV: Tensor, draft_ids_BK: Tensor, drafted_B: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318).

    Args:
        target_probs_BKV: [B, K + 1, V] processed probabilities of the target.
        draft_probs_BKV: [B, K, V] the processed probabilities that the drafted tokens were drawn from.
        draft_ids_BK, drafted_B: the drafted tokens, and how many of them each row has.
        generator: randomness of acceptance alone; the drawing of drafts must use another.

    Returns:
        num_accepted [B], and the token [B] that ends the block: drawn from the residual
        max(0, target - draft) after a rejection, from the target's last row otherwise.
    """
    rows, k = draft_ids_BK.shape
    device = draft_ids_BK.device
    u_BK = torch.rand((rows, k), generator=generator, device=device)
    of_target, of_draft = (
        p.gather(2, draft_ids_BK[..., None])[..., 0] for p in (target_probs_BKV[:, :k], draft_probs_BKV)
    )
    # u < target / draft without the division: the draft's probability of its own token is positive.
    n_B = _leading(u_BK * of_draft < of_target, drafted_B)
    target_BV = target_probs_BKV[torch.arange(rows, device=device), n_B]
    if k:
        draft_BV = draft_probs_BKV[torch.arange(rows, device=device), n_B.clamp(max=k - 1)]
        residual_BV = (target_BV - draft_BV).clamp_(min=0)
        # Equal distributions reject only by rounding; the residual is then empty and the target's row is it.
        rejected_B = (n_B < drafted_B) & (residual_BV.sum(1) > 0)
        target_BV = torch.where(rejected_B[:, None], residual_BV, target_BV)
    return n_B, draw(target_BV, generator)
