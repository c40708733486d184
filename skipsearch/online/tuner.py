"""OnTheFly: finds masks while it serves, from the tokens just generated, in a share of the time.

SWIFT (arXiv 2410.06916) searches while decoding, by matchness of 32 tokens at a fixed skip ratio. Here a candidate is
scored by replay on the last tokens in tokens per second, the incumbent and its challenger on the same window; a
challenger that wins has to win again on other windows, so that none is chosen for its luck. Search takes at most its
share of the time that decoding took, on the clock. Each kind of prompt has an incumbent of its own.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from skipsearch import maskfile
from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.errors import DecodingError
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.load import model_card
from skipsearch.model.view import draft_view
from skipsearch.online.candidates import Candidates, nearest_masks
from skipsearch.online.domains import Challenger, Domain, Domains
from skipsearch.online.prices import corner_views, measure, point
from skipsearch.online.window import LENGTH, LONGEST, SHORTEST, Window, score
from skipsearch.search.drafts import Outlook
from skipsearch.search.objective import Score

SHARE = 0.05  # of decoding's seconds that search may take
BEFORE = 0.5  # of that share, while nothing that was found pays for it
PAYS = 1.03  # speed-up on a window from which a first mask is served
MARGIN = 0.06  # mean log-ratio from which a challenger takes over on one window; on n of them the n-th part will do
LAST = 5  # windows that a challenger has
BEHIND = -0.01  # mean log-ratio below which it is given up
KEPT = 4  # windows that an incumbent's policy is chosen on
PATIENCE = 40  # proposals without a winner: the search comes to rest
DRIFT, RECENT = 3.0, 240  # standard errors of acceptance that wake it, over so many drafted tokens
LONG_REST = 20_000  # tokens after which it looks again where no mask was found
AGAIN = (8, 32, 128)  # passes after which prices are measured once more
FIRST_GUESS = {"prices": 24.0, "states": 24.0, "pass": 8.0}  # seconds, in plain steps, before any was timed
STATES_OF = 32  # tokens whose hidden states tell what to skip first
SAME_FOR_ALL = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # that scoring can do without


@dataclass(slots=True)
class _Served:
    """A sequence under way: its domain, where its generated text begins, and what was looked at up to where."""

    domain: Domain
    first: int
    seen: int
    temperature: float


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
        decoding, searching: seconds so far.
        events: what happened: (seconds of both, tokens, what).
    """

    def __init__(
        self, model: PreTrainedModel, free: list[Any], layers: int, policy: DraftPolicy, mask: SkipMask | None = None,
        share: float = SHARE, seed: int = 0,
    ) -> None:  # fmt: skip
        self._model = weakref.ref(model)  # whoever keeps a tuner for a model does not keep the model
        self.free, self.layers, self.share, self.seed = free, layers, share, seed
        text = model.config.get_text_config(decoder=True)
        self.context = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        self.domains = Domains(text.vocab_size, policy, mask)
        self.corners = corner_views(model, layers)
        self.decoding, self.searching, self.tokens = 0.0, 0.0, 0
        self.events: list[tuple[float, int, str]] = []
        self.counts = Counter[str]()
        self.seconds: dict[str, float] = {}  # of a step of each kind
        self.steps: dict[str, float] = {}  # prices
        self.candidates: Candidates | None = None  # what flips bring is mostly the model's, not the domain's
        self._served: weakref.WeakKeyDictionary[Drafter, _Served] = weakref.WeakKeyDictionary()
        self._views: dict[SkipMask, PreTrainedModel] = {}
        self._lock = threading.Lock()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "a tuner is used while its model serves"
        return model

    # -- what decoding tells -----------------------------------------------------------------------------------

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        """The domain's incumbent drafts."""
        begun, length = time.perf_counter(), sequences.lengths[0]
        with self._lock:
            domain = self.domains.of(sequences.ids[0, max(0, sequences.offset) : length])
            sequences.draft_with(None if domain.mask is None else self._view(domain.mask))
            drafter = Drafter(sequences, domain.policy, domain.pace)
            self._served[drafter] = _Served(domain, length, length, temperature)
            self.searching += time.perf_counter() - begun
        return drafter

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """Search, if there is a share of time left for it, and let the drafter have what was found."""
        begun, served, sequences = time.perf_counter(), self._served[drafter], drafter.sequences
        if not self._lock.acquire(blocking=False):
            return  # another sequence's turn
        try:
            domain = served.domain
            self.decoding += drafter.seconds
            self.tokens += len(block.tokens)
            if draft.of_mask:
                self._watch(domain, min(draft.of_mask, block.drafted), min(draft.of_mask, block.accepted))
            if domain.rested_at is not None and domain.mask is None and self.tokens > domain.rested_at + LONG_REST:
                self._wake(domain, "looks again")
            if domain.rested_at is None and domain.pace.knows and self._can_score(sequences):
                fresh = sequences.lengths[0] - served.seen
                self._search(served, drafter, begun, fresh if fresh >= LONGEST or ended else 0)
            self.searching += time.perf_counter() - begun
        finally:
            self._lock.release()

    def _can_score(self, sequences: Sequences) -> bool:
        """Whether the text is known and says what the target alone would say, and passes stay within the context."""
        return (
            sequences.offset >= 0 and not any(sequences.pads) and not sequences.aligned
            and sequences.lengths[0] - sequences.offset + LENGTH < self.context
            and all(type(processor).__name__ in SAME_FOR_ALL for processor in sequences.processors)
        )  # fmt: skip

    def _watch(self, domain: Domain, drafted: int, accepted: int) -> None:
        """Acceptance that is not what it was when the search came to rest wakes it."""
        domain.recent.update(drafted=drafted, accepted=accepted)
        if domain.rested_at is None or domain.recent["drafted"] < RECENT:
            return
        rate = domain.recent["accepted"] / domain.recent["drafted"]
        if domain.expected is None:
            domain.expected = rate
        error = math.sqrt(max(domain.expected * (1 - domain.expected), 0.01) / domain.recent["drafted"])
        if abs(rate - domain.expected) > DRIFT * error:
            self._wake(domain, "drift")
        domain.recent.clear()

    def _wake(self, domain: Domain, why: str) -> None:
        domain.rested_at, domain.expected, domain.rejected = None, None, 0
        domain.tried.clear()  # what did not pay on other text may pay on this
        self._note(why)

    # -- search ------------------------------------------------------------------------------------------------

    def _search(self, served: _Served, drafter: Drafter, begun: float, fresh: int) -> None:
        """The next steps that there is time for; those that score masks need fresh text."""
        domain, sequences = served.domain, drafter.sequences
        plain, share = domain.pace.verify_seconds(0), self.share * (BEFORE if domain.mask is None else 1)
        left = share * self.decoding - self.searching

        def may(kind: str, times: int = 1) -> bool:
            wanted = self.seconds.get(kind, FIRST_GUESS[kind] * plain) * times
            return time.perf_counter() - begun + wanted <= left

        times = self.counts["prices"]
        if not times or (times <= len(AGAIN) and self.counts["pass"] >= AGAIN[times - 1]):
            if not may("prices"):
                return
            with self._timed("prices"):
                steps, verifies = measure(sequences, self.corners)
            # A disturbance only ever adds.
            self.steps = {name: min(seconds, self.steps.get(name, seconds)) for name, seconds in steps.items()}
            for known in self.domains.known:
                known.pace.verify = {**verifies, **known.pace.verify}
        if self.candidates is None:
            if not may("states"):
                return
            with self._timed("states"):
                self.candidates = self._candidates(sequences)
        if fresh < SHORTEST or not may("pass", 1 if domain.mask is None else 2):
            return
        if domain.mask is None and not domain.queue and not domain.tried:
            domain.queue = self.candidates.first()
        window = Window(self.model, sequences, fresh, served.temperature)
        served.seen = sequences.lengths[0]
        before = domain.mask
        if before is None:
            while domain.mask is None and may("pass"):
                self._first(domain, window)
        else:
            held, outlook = self._score(domain, window, before)
            domain.outlooks = [*domain.outlooks[1 - KEPT :], *outlook]
            self._compare(domain, window, held)
            while domain.mask == before and domain.challenger is None and may("pass"):
                self._compare(domain, window, held)
        if domain.mask is not None and domain.mask != before:
            drafter.change(self._view(domain.mask), domain.policy)
        elif domain.mask is not None and len(domain.outlooks) == KEPT and not domain.policy.curve:
            policy = self._policy(domain, score(domain.outlooks, domain.mask, self._point(domain)))
            if policy != domain.policy:
                domain.policy = policy
                drafter.adopt(policy)
        if domain.rejected >= PATIENCE:
            domain.rested_at = self.tokens
            domain.recent.clear()
            self._note("at rest")

    def _first(self, domain: Domain, window: Window) -> None:
        """No mask is served yet: one that pays on this window is."""
        assert self.candidates is not None
        queue = domain.queue or [self.candidates.propose(self._emptiest(domain), domain.tried)]
        mask, domain.queue = queue[0], queue[1:]
        found, _ = self._score(domain, window, mask)
        domain.tried.add(mask)
        if found.speedup < PAYS:
            domain.rejected += 1
        else:
            self._serve(domain, found, "first mask")

    def _emptiest(self, domain: Domain) -> SkipMask:
        return min(domain.tried, key=len, default=SkipMask(num_layers=self.layers))

    def _compare(self, domain: Domain, window: Window, held: Score) -> None:
        """The challenger, or else a new proposal, against the incumbent's score on this window."""
        assert self.candidates is not None and domain.mask is not None
        challenger, before = domain.challenger, domain.mask
        if challenger is None:
            mask = domain.queue.pop(0) if domain.queue else self.candidates.propose(before, domain.tried)
        else:
            mask = challenger.mask
        found, outlook = self._score(domain, window, mask)
        gain = math.log(found.tokens_per_second / held.tokens_per_second)
        self.candidates.learn(before, mask, gain)
        if challenger is None:
            domain.tried.add(mask)
            domain.challenger = Challenger(mask) if gain > 0 else None
            domain.rejected += gain <= 0
            return
        challenger.gains.append(gain)
        challenger.outlooks += outlook
        mean = statistics.fmean(challenger.gains)
        if mean > MARGIN / len(challenger.gains):
            self._serve(domain, score(challenger.outlooks, mask, self._point(domain)), "better mask")
        elif mean < BEHIND or len(challenger.gains) >= LAST:
            domain.challenger = None
            domain.rejected += 1

    def _serve(self, domain: Domain, found: Score, what: str) -> None:
        domain.mask, domain.challenger, domain.rejected = found.mask, None, 0
        domain.recent.clear()
        domain.outlooks.clear()
        domain.policy = self._policy(domain, found)
        self._note(what)

    @staticmethod
    def _policy(domain: Domain, found: Score) -> DraftPolicy:
        exit_threshold = found.policy.exit_threshold
        return replace(
            domain.policy, max_length=found.policy.max_length, exit_threshold=exit_threshold,
            adaptive=exit_threshold is not None, curve=(), prices=(),
        )  # fmt: skip

    def _score(self, domain: Domain, window: Window, mask: SkipMask) -> tuple[Score, Outlook]:
        with self._timed("pass"):
            outlook = window.outlook(mask)
            return score(outlook, mask, self._point(domain)), outlook

    def _point(self, domain: Domain) -> Any:
        return point(self.steps, domain.pace, self.layers, LENGTH)

    def _candidates(self, sequences: Sequences) -> Candidates:
        first = max(sequences.offset, 0, sequences.lengths[0] - STATES_OF)
        ids, halves = sequences.ids[:1, first : sequences.lengths[0]], [self.corners[kind] for kind in KINDS]
        near = nearest_masks(self.model, halves, ids, self.free, self.layers)
        return Candidates(self.free, self.layers, near, self.seed)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Note what a kind of step takes, so that the next one is begun only if there is time for it."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self.seconds[kind] = 0.7 * self.seconds.get(kind, seconds) + 0.3 * seconds
        self.counts[kind] += 1

    # -- what is known -----------------------------------------------------------------------------------------

    def _view(self, mask: SkipMask) -> PreTrainedModel:
        if mask not in self._views:
            self._views[mask] = draft_view(self.model, mask)
        return self._views[mask]

    def _note(self, what: str) -> None:
        self.events.append((self.decoding + self.searching, self.tokens, what))

    @property
    def share_spent(self) -> float:
        """Searching over decoding seconds."""
        return self.searching / self.decoding if self.decoding else 0.0

    def best(self) -> Domain | None:
        """The domain with a mask that most prompts belong to."""
        return max((d for d in self.domains.known if d.mask is not None), key=lambda d: d.prompts, default=None)

    def save(self, path: str | Path) -> None:
        """Write that domain's mask and policy as a mask file, without evidence: `skipsearch validate` adds it.

        Raises:
            DecodingError: no mask has been found to pay so far.
        """
        found = self.best()
        if found is None or found.mask is None:
            raise DecodingError(
                f"no mask was found to pay in {self.tokens} tokens and {self.counts['pass']} passes; generate more"
            )
        card = model_card(self.model, self.model.config._name_or_path or "model")
        draft = maskfile.Draft(**asdict(replace(found.policy, costs=())))
        origin = maskfile.Provenance(study="on the fly", seed=self.seed)
        maskfile.MaskFile.of(found.mask, model=card, draft=draft, provenance=origin).save(path)

    def report(self) -> dict[str, Any]:
        """Plain figures of what was done."""
        return {
            "decoding_s": round(self.decoding, 3), "searching_s": round(self.searching, 3),
            "share": round(self.share_spent, 4), "passes": self.counts["pass"], "domains": len(self.domains.known),
            "events": [(round(at, 3), tokens, what) for at, tokens, what in self.events],
        }  # fmt: skip
