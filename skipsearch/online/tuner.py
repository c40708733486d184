"""OnTheFly: finds masks while it serves, from the tokens just generated, in a share of the time.

SWIFT (arXiv 2410.06916) searches while decoding, by matchness of 32 tokens at a fixed skip ratio. Here a candidate is
scored by replay on the last tokens in tokens per second, the incumbent and its challenger on the same window; a
challenger that wins has to win again on other windows, so that none is chosen for its luck. Search takes at most its
share of the time that decoding took, on the clock. Kinds of prompts share an incumbent until one proves different.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from skipsearch import maskfile
from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.evaluate.mask_replay import Outlook
from skipsearch.evaluate.objective import Score
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.load import model_card
from skipsearch.model.sublayers import context_limit
from skipsearch.online.budget import Budget
from skipsearch.online.candidates import Candidates, nearest_masks, opening
from skipsearch.online.domains import Domain, Domains
from skipsearch.online.incumbent import PATIENCE, RECENT, Contest
from skipsearch.online.live_costs import corner_views, measure, point
from skipsearch.online.served_sequence import Served
from skipsearch.online.window import LENGTH, LONGEST, SHORTEST, Window, score

SHARE = 0.05  # of decoding's seconds that search may take
BEFORE = 0.4  # of that share, while nothing that was found pays for it
HALVED = 16  # proposals without a winner that halve its share
LONG_REST = 20_000  # tokens after which it looks again where no mask was found
AGAIN = (32, 256)  # passes after which prices are measured once more
LONGER = 2  # and they are at contexts so many times as long
STATES_OF = 16  # tokens whose hidden states tell what to skip first
SAME_FOR_ALL = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # that scoring can do without


class OnTheFly:
    """A `Tuner` for one model.

    Args:
        model: the target.
        free: sublayers that may be skipped.
        policy: how to draft; its length and exit are chosen anew for each mask.
        mask: where to start, if anything is known.
        share: of decoding's seconds that search may take at most.
        seed: of what is random in the search.

    Attributes:
        budget: seconds so far; those at load, before anything was served, are `prepared`.
        events: what happened: (seconds, tokens, what).
    """

    def __init__(
        self, model: PreTrainedModel, free: list[Any], layers: int, policy: DraftPolicy, mask: SkipMask | None = None,
        share: float = SHARE, seed: int = 0,
    ) -> None:  # fmt: skip
        self._model = weakref.ref(model)  # whoever keeps a tuner for a model does not keep the model
        self.free, self.layers, self.seed, self.budget = free, layers, seed, Budget(share)
        self.context = context_limit(model)
        first = Contest(policy, mask)
        if mask is None:
            first.queue.append(opening(free, layers))
        else:
            first.rejected = PATIENCE // 2  # there is little to find
        self.domains = Domains(model.config.get_text_config(decoder=True).vocab_size, first)
        self.corners = corner_views(model, layers)
        self.tokens, self.prepared = 0, 0.0
        self.events: list[tuple[float, int, str]] = []
        self.steps: dict[str, float] = {}  # prices, and those of verifies
        self.verifies: dict[int, float] = {}
        self.priced_at = 0  # tokens
        self.candidates: Candidates | None = None  # what flips bring is mostly the model's, not the domain's
        self._views: dict[SkipMask, PreTrainedModel] = {}
        self._lock, self._beginning = threading.Lock(), threading.Lock()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "a tuner is used while its model serves"
        return model

    # -- what decoding tells -----------------------------------------------------------------------------------

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        """The domain's incumbent drafts."""
        with self._beginning:  # no waiting for another sequence's search
            begun = time.perf_counter()
            domain = self.domains.of(sequences.ids[0, max(0, sequences.offset) : sequences.lengths[0]])
            domain.pace.knows_of(self.verifies)
            self.budget.searching += time.perf_counter() - begun
            mask = domain.contest.mask
            if mask != domain.served_with:  # found on other domains' text meanwhile
                domain.pace.forget_mask()
                domain.served_with = mask
            sequences.draft_with(None if mask is None else self._view(mask))
            return Served(sequences, domain, temperature)

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """Search, if there is a share of time left for it, and let the drafter have what was found."""
        assert isinstance(drafter, Served)
        served, sequences = drafter, drafter.sequences
        served.note(draft, block)
        if not ended and sequences.lengths[0] < served.due:
            return
        served.due = sequences.lengths[0] + SHORTEST
        if not self._lock.acquire(blocking=False):
            return  # another sequence's turn
        try:
            with self.budget.search():
                self._look(served)
        except RuntimeError as error:  # out of memory, or a layer that cannot be called alone: the request goes on
            self.budget.share = 0.0
            sequences.draft_with(None if served.domain.contest.mask is None else self._view(served.domain.contest.mask))
            warnings.warn(f"the search for masks has stopped: {error}", BackendWarning, stacklevel=2)
        finally:
            self._lock.release()

    def _look(self, served: Served) -> None:
        domain, sequences = served.domain, served.sequences
        self.budget.decoding += served.decoding
        self.budget.improvable += served.improvable
        self.tokens += served.tokens
        self._watch(domain, served.drafted, served.accepted)
        served.forget()
        rested = domain.contest.rested_at
        if rested is not None and domain.contest.mask is None and self.tokens > rested + LONG_REST:
            self._wake(domain.contest)
            self._note("looks again")
        if domain.contest.rested_at is None and domain.pace.knows and self._can_score(sequences):
            self._search(served)

    def _can_score(self, sequences: Sequences) -> bool:
        """Whether the text is known and says what the target alone would say, and passes stay within the context."""
        return (
            sequences.offset >= 0 and not any(sequences.pads) and not sequences.aligned
            and sequences.lengths[0] - sequences.offset + LENGTH < self.context
            and all(type(processor).__name__ in SAME_FOR_ALL for processor in sequences.processors)
        )  # fmt: skip

    def _watch(self, domain: Domain, drafted: int, accepted: int) -> None:
        """Acceptance below what it was when the search came to rest wakes it, for this domain alone."""
        if domain.contest.rested_at is None:
            return
        domain.recent.update(drafted=drafted, accepted=accepted)
        if domain.recent["drafted"] < RECENT:
            return
        if domain.contest.drifts(domain.recent["drafted"], domain.recent["accepted"]):
            if any(other is not domain and other.contest is domain.contest for other in self.domains.known):
                domain.contest = domain.contest.apart()
            else:
                self._wake(domain.contest)
            self._note("drift")
        domain.recent.clear()

    def _wake(self, contest: Contest) -> None:
        contest.wake()
        if contest.mask is None:
            contest.queue += self._likely()

    def _likely(self) -> list[SkipMask]:
        """What to try where there is no mask."""
        return [opening(self.free, self.layers), *(self.candidates.first() if self.candidates else [])]

    # -- search ------------------------------------------------------------------------------------------------

    def _search(self, served: Served) -> None:
        """The next steps that there is time for: prices, states, and masks scored on the fresh text."""
        sequences, counts, contest, pace = served.sequences, self.budget.counts, served.domain.contest, served.pace
        fresh = sequences.lengths[0] - served.seen
        part = (BEFORE if contest.mask is None else 1) / (1 + contest.rejected / HALVED)
        may = partial(self.budget.may, plain_seconds=pace.verify_seconds(0), part=part)
        times = counts["prices"]
        dearer = sequences.lengths[0] > LONGER * self.priced_at  # attention costs more by now
        if dearer or (times < len(AGAIN) and counts["pass"] >= AGAIN[times]):
            if not may("prices"):
                return
            with self.budget.step("prices"):
                self.measure(sequences)
        if fresh < SHORTEST:
            return
        if self.candidates is None and (contest.mask is not None or not contest.queue):
            if not may("states"):
                return
            with self.budget.step("states"):
                self.candidates = self._candidates(sequences)
            if contest.mask is None or contest.won:  # a given mask is better than these
                contest.queue += self.candidates.first()
        if not may("pass", times=contest.passes):
            return
        window = Window(self.model, sequences, fresh, served.temperature)
        served.seen = sequences.lengths[0]
        served.due = served.seen + LONGEST
        prices = point(self.steps, pace, self.layers, LENGTH)

        def read(mask: SkipMask) -> tuple[Score, Outlook]:
            with self.budget.step("pass"):
                outlook = window.outlook(mask)
                return score(outlook, mask, prices), outlook

        before, policy = contest.mask, contest.policy
        what = contest.look(read, self.candidates, partial(may, "pass")) or contest.reconsider(prices)
        if what is not None:
            self._note(what)
        if contest.mask != before:
            if contest.mask is None:
                contest.queue += self._likely()
            served.change(None if contest.mask is None else self._view(contest.mask), contest.policy)
            served.domain.served_with = contest.mask
        elif contest.policy != policy:
            served.adopt(contest.policy)
        if contest.rest(self.tokens):
            self._note("at rest")

    def measure(self, sequences: Sequences) -> None:
        """Time steps on a sequence, which is left as it was."""
        steps, verifies = measure(sequences, self.corners)
        if sequences.lengths[0] > LONGER * self.priced_at:
            self.steps, self.verifies, self.priced_at = steps, verifies, sequences.lengths[0]
            for known in self.domains.known:
                known.pace.verify.update(verifies)
        # A disturbance only ever adds.
        self.steps = {name: min(seconds, self.steps[name]) for name, seconds in steps.items()}
        self.verifies = {k: min(seconds, self.verifies.get(k, seconds)) for k, seconds in verifies.items()}
        for known in self.domains.known:
            known.pace.knows_of(self.verifies)

    def _candidates(self, sequences: Sequences) -> Candidates:
        first = max(sequences.offset, 0, sequences.lengths[0] - STATES_OF)
        ids, halves = sequences.ids[:1, first : sequences.lengths[0]], [self.corners[kind] for kind in KINDS]
        near = nearest_masks(self.model, halves, ids, self.free, self.layers)
        return Candidates(self.free, self.layers, near, self.seed)

    # -- what is known -----------------------------------------------------------------------------------------

    def _view(self, mask: SkipMask) -> PreTrainedModel:
        if mask not in self._views:
            self._views[mask] = draft_view(self.model, mask)
        return self._views[mask]

    def _note(self, what: str) -> None:
        self.events.append((self.budget.decoding + self.budget.searching, self.tokens, what))

    def best(self) -> Contest | None:
        """That with a mask which serves most prompts."""
        prompts = Counter[Contest]()
        for domain in self.domains.known:
            prompts[domain.contest] += domain.prompts
        return max((c for c in prompts if c.mask is not None), key=prompts.__getitem__, default=None)

    def save(self, path: str | Path, name: str | None = None) -> None:
        """Write its mask and policy as a mask file, without evidence: `skipsearch validate` adds it.

        Raises:
            DecodingError: no mask has been found to pay so far.
        """
        found = self.best()
        if found is None or found.mask is None:
            raise DecodingError(
                f"no mask was found to pay: {self.tokens} tokens, {self.budget.improvable:.1f} of "
                f"{self.budget.decoding:.1f} s without n-grams, {self.budget.counts['pass']} masks scored; "
                "serve more text, or raise share"
            )
        card = model_card(self.model, name or self.model.config._name_or_path or "model")
        draft = maskfile.Draft(**asdict(replace(found.policy, costs=())))
        origin = maskfile.Provenance(study="on the fly", seed=self.seed)
        maskfile.MaskFile.of(found.mask, model=card, draft=draft, provenance=origin).save(path)

    def report(self) -> dict[str, Any]:
        """Plain figures of what was done."""
        return {
            "decoding_s": round(self.budget.decoding, 3), "searching_s": round(self.budget.searching, 3),
            "prepared_s": round(self.prepared, 3), "share": round(self.budget.spent, 4),
            "passes": self.budget.counts["pass"], "domains": len(self.domains.known),
            "contests": len({domain.contest for domain in self.domains.known}),
            "events": [(round(at, 3), tokens, what) for at, tokens, what in self.events],
        }  # fmt: skip
