"""OnTheFly: finds masks while it serves, from the tokens just generated, in a share of the time.

SWIFT (arXiv 2410.06916) searches while decoding, by matchness of 32 tokens at a fixed skip ratio. Here a candidate is
scored by replay on the last tokens in tokens per second, the incumbent and its challenger on the same window; a
challenger that wins has to win again on other windows, so that none is chosen by luck. The search takes at most its
share of the seconds that decoding took. Kinds of prompts share an incumbent until one proves different.
"""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.windows import PositionOutcomes
from skipsearch.mask import KINDS, SkipMask
from skipsearch.maskfile import MaskFile, Provenance
from skipsearch.model.identity import model_card
from skipsearch.model.target import Target
from skipsearch.online.budget import Budget
from skipsearch.online.candidates import Candidates, nearest_masks, opening
from skipsearch.online.domains import Domains
from skipsearch.online.incumbent import PATIENCE, Incumbent
from skipsearch.online.live_costs import LiveCosts
from skipsearch.online.served_sequence import ServedSequence
from skipsearch.online.window import LENGTH, LONGEST, SHORTEST, Window, score
from skipsearch.policy import DraftPolicy

SHARE = 0.05  # of decoding's seconds that the search may take
WITHOUT_MASK = 0.4  # of that share, while no mask is served whose gain pays for it
HALVED = 16  # proposals without a winner that halve its share
LONG_PAUSE = 20_000  # tokens after which it searches again where no mask was found
AGAIN = (32, 256)  # passes after which costs are measured once more
STATES_OF = 16  # tokens whose hidden states tell what to skip first


class OnTheFly:
    """A `Tuner` for one model, which it does not keep alive.

    Args:
        target: the model.
        policy: how to draft; its length and exit are chosen anew for each mask.
        mask: where to start, if a mask is known.
        share: of decoding's seconds that the search may take at most.
        seed: of what is random in the search.

    Attributes:
        budget: seconds so far; those at load, before anything was served, are `prepared`.
        events: what happened: (seconds, tokens, what).
    """

    def __init__(
        self, target: Target, policy: DraftPolicy, mask: SkipMask | None = None, share: float = SHARE, seed: int = 0
    ) -> None:
        self.layers, self.context, self.seed, self.budget = target.num_layers, target.context, seed, Budget(share)
        self.card = model_card(target, target.model.config._name_or_path or "model")
        first = Incumbent(policy, mask, queue=[opening(self.layers)] if mask is None else [])
        first.rejected = 0 if mask is None else PATIENCE // 2  # a given mask was searched for already
        self.domains = Domains(target.vocabulary, first)
        self.costs = LiveCosts(target)
        self.tokens, self.prepared = 0, 0.0
        self.events: list[tuple[float, int, str]] = []
        # One for all domains: what a flip brings depends on the model more than on the text.
        self.candidates: Candidates | None = None
        self._views: dict[SkipMask, PreTrainedModel] = {}
        self._searching, self._beginning = threading.Lock(), threading.Lock()

    # -- called by decoding ------------------------------------------------------------------------------------

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        """The domain's incumbent drafts."""
        with self._beginning:  # does not wait for a search on another sequence
            begun = time.perf_counter()
            domain = self.domains.of(sequences.ids[0, max(0, sequences.offset) : sequences.lengths[0]])
            domain.scheduler.fill_in(self.costs.verifies)
            self.budget.searching += time.perf_counter() - begun
            mask = domain.incumbent.mask
            if mask != domain.served_with:  # found on another domain's text meanwhile
                domain.scheduler.forget_mask()
                domain.served_with = mask
            sequences.draft_with(self._view(sequences.target, mask))
            return ServedSequence(sequences, domain, temperature)

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """Search, if there is a share of time left for it; the drafter continues with the mask that was found."""
        assert isinstance(drafter, ServedSequence)
        served, sequences = drafter, drafter.sequences
        served.note(draft, block)
        if not ended and sequences.lengths[0] < served.due:
            return
        served.due = sequences.lengths[0] + SHORTEST
        if not self._searching.acquire(blocking=False):
            return  # a search on another sequence is under way
        try:
            with self.budget.search():
                self._account(served)
                if self._can_score(served):
                    self._search(served)
        except RuntimeError as error:  # out of memory, or a layer that cannot be called alone: the request goes on
            self.budget.share = 0.0
            sequences.draft_with(self._view(sequences.target, served.domain.incumbent.mask))
            warnings.warn(f"the search for masks has stopped: {error}", BackendWarning, stacklevel=2)
        finally:
            self._searching.release()

    def _account(self, served: ServedSequence) -> None:
        """Take in what was decoded since the last time, and resume a search that has paused for too long."""
        domain = served.domain
        self.budget.decoding += served.decoding
        self.budget.improvable += served.improvable
        self.tokens += served.tokens
        if self.domains.drifts(domain, served.drafted, served.accepted, self._likely()):
            self._note("drift")
        served.reset()
        paused = domain.incumbent.paused_at
        if paused is not None and domain.incumbent.mask is None and self.tokens > paused + LONG_PAUSE:
            domain.incumbent.resume(self._likely())
            self._note("searches again")

    def _can_score(self, served: ServedSequence) -> bool:
        """Whether its search goes on, its text is known and the target's own, and passes stay within the context."""
        sequences = served.sequences
        return (
            served.domain.incumbent.paused_at is None and served.domain.scheduler.knows_plain
            and sequences.offset >= 0 and not any(sequences.pads) and not sequences.aligned
            and sequences.lengths[0] - sequences.offset + LENGTH < self.context
            and not sequences.selection.in_order  # which replay cannot call
        )  # fmt: skip

    def _likely(self) -> list[SkipMask]:
        """What to try where there is no mask."""
        return [opening(self.layers), *(self.candidates.first() if self.candidates else [])]

    # -- search ------------------------------------------------------------------------------------------------

    def _search(self, served: ServedSequence) -> None:
        """The next steps that there is time for: costs, hidden states, and masks scored on the new text."""
        sequences, counts, incumbent = served.sequences, self.budget.counts, served.domain.incumbent
        new = sequences.lengths[0] - served.searched
        part = (WITHOUT_MASK if incumbent.mask is None else 1) / (1 + incumbent.rejected / HALVED)
        allows = partial(self.budget.allows, plain_seconds=served.scheduler.verify_seconds(0), part=part)
        times = counts["costs"]
        if self.costs.outgrown(sequences.lengths[0]) or (times < len(AGAIN) and counts["pass"] >= AGAIN[times]):
            if not allows("costs"):
                return
            with self.budget.step("costs"):
                self.measure(sequences)
        if new < SHORTEST:
            return
        if self.candidates is None and (incumbent.mask is not None or not incumbent.queue):
            if not allows("states"):
                return
            with self.budget.step("states"):
                self.candidates = self._find_candidates(sequences)
            if incumbent.mask is None or incumbent.won:  # a given mask is better than these
                incumbent.queue += self.candidates.first()
        if allows("pass", times=incumbent.passes):
            self._score_window(served, new, partial(allows, "pass"))

    def _score_window(self, served: ServedSequence, tokens: int, may: partial[bool]) -> None:
        """Compare masks on the last tokens; what wins drafts from now on."""
        sequences, incumbent = served.sequences, served.domain.incumbent
        window = Window(sequences, tokens, served.temperature)
        served.searched = sequences.lengths[0]
        served.due = served.searched + LONGEST
        point = self.costs.point(served.scheduler, LENGTH)

        def read(mask: SkipMask) -> tuple[Score, list[PositionOutcomes]]:
            with self.budget.step("pass"):
                outcomes = window.outcomes(mask)
                return score(outcomes, mask, point), outcomes

        before, policy = incumbent.mask, incumbent.policy
        what = incumbent.evaluate(read, self.candidates, may) or incumbent.reconsider(point)
        if what is not None:
            self._note(what)
        if incumbent.mask != before:
            if incumbent.mask is None:
                incumbent.queue += self._likely()
            served.change(self._view(sequences.target, incumbent.mask), incumbent.policy)
            served.domain.served_with = incumbent.mask
        elif incumbent.policy != policy:
            served.adopt(incumbent.policy)
        if incumbent.pause(self.tokens):
            self._note("pauses")

    def measure(self, sequences: Sequences) -> None:
        """Time steps on a sequence, which is left as it was."""
        longer = self.costs.outgrown(sequences.lengths[0])
        self.costs.measure(sequences)
        for domain in self.domains.known:
            if longer:
                domain.scheduler.verify.update(self.costs.verifies)
            domain.scheduler.fill_in(self.costs.verifies)

    def _find_candidates(self, sequences: Sequences) -> Candidates:
        first = max(sequences.offset, 0, sequences.lengths[0] - STATES_OF)
        ids, halves = sequences.ids[:1, first : sequences.lengths[0]], [self.costs.views[kind] for kind in KINDS]
        return Candidates(self.layers, nearest_masks(sequences.target, halves, ids), self.seed)

    # -- results -----------------------------------------------------------------------------------------------

    def _view(self, target: Target, mask: SkipMask | None) -> PreTrainedModel | None:
        if mask is not None and mask not in self._views:
            self._views[mask] = draft_view(target.model, mask)
        return None if mask is None else self._views[mask]

    def _note(self, what: str) -> None:
        self.events.append((self.budget.decoding + self.budget.searching, self.tokens, what))

    def save(self, path: str | Path, name: str | None = None) -> None:
        """Write its mask and policy as a mask file, without evidence: `skipsearch validate` adds it.

        Raises:
            DecodingError: no mask has been found to pay so far.
        """
        found = self.domains.best()
        if found is None or found.mask is None:
            raise DecodingError(
                f"no mask was found to pay: {self.tokens} tokens, {self.budget.improvable:.1f} of "
                f"{self.budget.decoding:.1f} s without n-grams, {self.budget.counts['pass']} masks scored; "
                "serve more text, or raise share"
            )
        card = self.card if name is None else self.card.model_copy(update={"id": name})
        draft = replace(found.policy, costs=())
        origin = Provenance(study="on the fly", seed=self.seed)
        MaskFile.of(found.mask, model=card, draft=draft, provenance=origin).save(path)

    def report(self) -> dict[str, Any]:
        """Plain figures of what was done."""
        return {
            "decoding_s": round(self.budget.decoding, 3), "searching_s": round(self.budget.searching, 3),
            "prepared_s": round(self.prepared, 3), "share": round(self.budget.spent, 4),
            "passes": self.budget.counts["pass"], "domains": len(self.domains.known),
            "incumbents": len({domain.incumbent for domain in self.domains.known}),
            "events": [(round(at, 3), tokens, what) for at, tokens, what in self.events],
        }  # fmt: skip
