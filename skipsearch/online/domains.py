"""Domains: what was found for each kind of prompt, and which kind a prompt belongs to.

A prompt's feature is which tokens it holds, as a vector of length 1: no forward is needed, and code, prose and sums lie
apart (means of embeddings do not: a few frequent tokens make them all alike). The nearest known domain serves a prompt,
as in KNN-SSD (nearest stored mask by prompt features); one that is too far away is rejected, and founds a new one,
which begins with the nearest one's incumbent.

Shapes: V vocabulary; T tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skipsearch.decoding.scheduler import Scheduler
from skipsearch.mask import SkipMask
from skipsearch.online.incumbent import RECENT, Incumbent

MOST, REMEMBERED = 12, 64  # domains, and prompts of each, that are remembered
# Cosine from which a prompt belongs to a domain; of few prompts less will do, since their mean is not yet the domain's.
# Measured on code, instructions and sums: 0.42 to 0.62 within, 0.33 to 0.43 without.
NEAR, YOUNG = 0.44, 4


@dataclass(eq=False, slots=True)
class Domain:
    """Similar prompts, and how they are decoded.

    Attributes:
        centre: the mean feature [V].
        scheduler: estimates of what its sources of drafts bring.
        incumbent: serves it; domains share one until they prove to be different.
        served_with: the mask that the scheduler's estimates are of.
        recent: recently drafted and accepted tokens.
    """

    centre: Tensor
    scheduler: Scheduler
    incumbent: Incumbent
    served_with: SkipMask | None = None
    prompts: int = 0
    recent: Counter[str] = field(default_factory=Counter)

    def similarity(self, feature: Tensor) -> float:
        """Cosine of a prompt's feature and the centre."""
        return float(feature @ self.centre / self.centre.norm().clamp(min=1e-9))

    def threshold(self) -> float:
        """The similarity below which a prompt is of another domain."""
        return NEAR * math.sqrt(self.prompts / (self.prompts + YOUNG))


class Domains:
    """All domains met so far."""

    def __init__(self, vocabulary: int, incumbent: Incumbent) -> None:
        self.vocabulary, self.first, self.known = vocabulary, incumbent, list[Domain]()

    def feature(self, ids_T: Tensor) -> Tensor:
        """Of a prompt [V], of length 1."""
        found_V = torch.zeros(self.vocabulary)
        found_V[ids_T.cpu()] = 1
        feature: Tensor = found_V / found_V.norm().clamp(min=1e-9)
        return feature

    def drifts(self, domain: Domain, drafted: int, accepted: int, likely: list[SkipMask]) -> bool:
        """Take in what a domain has drafted; whether its acceptance fell after the search had paused.

        If so, the search resumes for this domain alone.

        Args:
            likely: masks to try where there is none.
        """
        if domain.incumbent.paused_at is None:
            return False
        domain.recent.update(drafted=drafted, accepted=accepted)
        if domain.recent["drafted"] < RECENT:
            return False
        fell = domain.incumbent.drifts(domain.recent["drafted"], domain.recent["accepted"])
        domain.recent.clear()
        if fell and any(other is not domain and other.incumbent is domain.incumbent for other in self.known):
            domain.incumbent = domain.incumbent.copy()
        elif fell:
            domain.incumbent.resume(likely)
        return fell

    def best(self) -> Incumbent | None:
        """The one with a mask that serves most prompts."""
        prompts = Counter[Incumbent]()
        for domain in self.known:
            prompts[domain.incumbent] += domain.prompts
        return max((found for found in prompts if found.mask is not None), key=prompts.__getitem__, default=None)

    def of(self, ids_T: Tensor) -> Domain:
        """The domain of a prompt, which from now on it belongs to."""
        feature = self.feature(ids_T)
        near = max(self.known, key=lambda domain: domain.similarity(feature), default=None)
        if near is None:
            near = Domain(torch.zeros_like(feature), Scheduler(self.first.policy.costs), self.first)
            self.known.append(near)
        elif near.similarity(feature) < near.threshold():
            scheduler = Scheduler()
            # Seconds are the same for all domains.
            scheduler.step, scheduler.verify = near.scheduler.step, dict(near.scheduler.verify)
            near = Domain(torch.zeros_like(feature), scheduler, near.incumbent)
            if len(self.known) == MOST:
                self.known.remove(min(self.known, key=lambda domain: domain.prompts))
            self.known.append(near)
        self.known.remove(near)
        self.known.append(near)  # in the order of their last prompts
        near.centre = near.centre + (feature - near.centre) / min(near.prompts + 1, REMEMBERED)
        near.prompts += 1
        return near
