"""OnTheFly: finds masks while it serves, from the tokens just generated, in a share of the time.

SWIFT (arXiv 2410.06916) searches while decoding, by matchness of 32 tokens at a fixed skip ratio. Here a candidate is
scored by replay on the last tokens in tokens per second, the incumbent and its challenger on the same window; a
challenger that wins has to win again on other windows, so that none is chosen for its luck. Search takes at most its
share of the time that decoding took, on the clock. Each kind of prompt has an incumbent of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from skipsearch import maskfile
from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.errors import DecodingError
from skipsearch.mask import SkipMask
from skipsearch.model.load import model_card
from skipsearch.model.view import draft_view
from skipsearch.online.candidates import Candidates, influence
from skipsearch.online.domains import Challenger, Domain, Domains
from skipsearch.online.prices import corner_views, measure, point
from skipsearch.online.window import LENGTH, LONGEST, SHORTEST, Window, score
from skipsearch.search.drafts import Outlook
from skipsearch.search.objective import Score

SHARE = 0.05  # of decoding's seconds that search may take
PAYS = 1.03  # speed-up on a window from which a first mask is served
MARGIN = 0.06  # mean log-ratio from which a challenger takes over on one window; on n of them the n-th part will do
LAST = 5  # windows that a challenger has
BEHIND = -0.01  # mean log-ratio below which it is given up
KEPT = 4  # windows that an incumbent's policy is chosen on
PATIENCE = 40  # proposals without a winner: the search comes to rest
DRIFT, RECENT = 3.0, 240  # standard errors of acceptance that wake it, over so many drafted tokens
FIRST_GUESS = {"prices": 60.0, "influence": 12.0, "pass": 8.0}  # seconds, in plain steps, before any was timed
GENERATED_FOR_INFLUENCE = 64


class OnTheFly:
    """A `Tuner` for one model.

    Args:
        model: the target.
        free: sublayers that may be skipped.
        policy: how to draft; its length and exit are chosen anew for each mask.
        mask: where to start, if anything is known.
        share: of decoding's seconds that search may take at most.
        seed: of what is random.
        clock: seconds.

    Attributes:
        temperature: of the sequence that begins next; 0: greedy.
        decoding, searching: seconds so far.
        events: what happened: (seconds of both, tokens, what).
    """

    def __init__(
        self, model: PreTrainedModel, free: list[Any], layers: int, policy: DraftPolicy, mask: SkipMask | None = None,
        share: float = SHARE, seed: int = 0, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.model, self.free, self.layers, self.share, self.seed = model, free, layers, share, seed
        self.clock, self.temperature = clock, 0.0
        self.domains = Domains(model.config.get_text_config(decoder=True).vocab_size, policy, mask)
        self.corners = corner_views(model, layers)
        self.decoding, self.searching, self.tokens = 0.0, 0.0, 0
        self.events: list[tuple[float, int, str]] = []
        self.counts = Counter[str]()
        self.seconds: dict[str, float] = {}  # of a step of each kind
        self.steps: dict[str, float] = {}  # prices
        self.candidates: Candidates | None = None
        self._domain: Domain | None = None
        self._length, self._since, self._last = 0, 0, 0.0
        self._views: dict[SkipMask, PreTrainedModel] = {}

    # -- what decoding tells -----------------------------------------------------------------------------------

    def begin(self, sequences: Sequences) -> Drafter:
        """The domain's incumbent drafts."""
        begun = self.clock()
        self._length = self._since = sequences.lengths[0]
        domain = self._domain = self.domains.of(sequences.ids[0, max(0, sequences.offset) : self._length])
        sequences.draft_with(None if domain.mask is None else self._view(domain.mask))
        self._last = self.clock()
        self.searching += self._last - begun
        return Drafter(sequences, domain.policy, domain.pace)

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """Search, if there is a share of time left for it, and let the drafter have what was found."""
        now = self.clock()
        self.decoding += now - self._last
        self.tokens += len(block.tokens)
        domain, sequences = self._domain, drafter.sequences
        assert domain is not None
        if draft.of_mask:
            self._watch(domain, min(draft.of_mask, block.drafted), min(draft.of_mask, block.accepted))
        if sequences.offset >= 0 and domain.pace.knows and domain.expected is None:
            fresh = sequences.lengths[0] - self._since
            self._search(domain, drafter, now, fresh >= LONGEST or (ended and fresh >= SHORTEST))
        after = self.clock()
        self.searching += after - now
        self._last = after

    def _watch(self, domain: Domain, drafted: int, accepted: int) -> None:
        """Acceptance that is not what it was when the search came to rest wakes it."""
        domain.recent.update(drafted=drafted, accepted=accepted)
        if domain.recent["drafted"] < RECENT:
            return
        rate = domain.recent["accepted"] / domain.recent["drafted"]
        if domain.expected is not None:
            error = math.sqrt(max(domain.expected * (1 - domain.expected), 0.01) / domain.recent["drafted"])
            if abs(rate - domain.expected) > DRIFT * error:
                domain.expected, domain.rejected = None, 0
                self._note("drift")
        elif domain.rejected >= PATIENCE:
            domain.expected = rate
            self._note("at rest")
        domain.recent.clear()

    # -- search ------------------------------------------------------------------------------------------------

    def _search(self, domain: Domain, drafter: Drafter, begun: float, text: bool) -> None:
        """The next steps that there is time for; those that score masks need text."""
        sequences, plain = drafter.sequences, domain.pace.verify_seconds(0)
        left = self.share * self.decoding - self.searching

        def may(kind: str, times: int = 1) -> bool:
            wanted = self.seconds.get(kind, FIRST_GUESS[kind] * plain) * times
            return self.clock() - begun + wanted <= left

        if not self.steps:
            if not may("prices"):
                return
            with self._timed("prices"):
                self.steps, verifies = measure(sequences, self.corners)
            for known in self.domains.known:
                known.pace.verify = {**verifies, **known.pace.verify}
        if self.candidates is None:
            if not may("influence"):
                return
            with self._timed("influence"):
                self.candidates = self._candidates(sequences)
        if not text:
            return
        if domain.mask is None and not domain.queue and not domain.tried:
            domain.queue = self.candidates.nested()
        if not may("pass", 1 if domain.mask is None else 2):
            return
        window = Window(self.model, sequences, sequences.lengths[0] - self._length, self.temperature)
        self._since = sequences.lengths[0]
        before = domain.mask
        if before is None:
            while domain.mask is None and may("pass"):
                self._first(domain, window)
        else:
            held, outlook = self._score(domain, window, before)
            domain.outlooks = [*domain.outlooks[1 - KEPT :], *outlook]
            self._compare(domain, window, held)
            while domain.mask is before and domain.challenger is None and may("pass"):
                self._compare(domain, window, held)
        if domain.mask is not None and domain.mask != before:
            drafter.change(self._view(domain.mask), domain.policy)
        elif domain.mask is not None and len(domain.outlooks) == KEPT and not domain.policy.curve:
            domain.policy = self._policy(domain, score(domain.outlooks, domain.mask, self._point(domain)))
            drafter.policy = domain.policy

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
        return point(self.steps, domain.pace, self.layers, LENGTH, self._since)

    def _candidates(self, sequences: Sequences) -> Candidates:
        first = max(sequences.offset, 0, sequences.lengths[0] - GENERATED_FOR_INFLUENCE)
        harm = influence(self.model, sequences.ids[:1, first : sequences.lengths[0]])
        rest = min(self.steps.values())
        saved = {kind: max(self.steps[kind] - rest, 1e-9) for kind in ("attention", "mlp")}
        return Candidates(
            self.free, self.layers, {sub: value / saved[sub[0]] for sub, value in harm.items()}, self.seed
        )

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Note what a kind of step takes, so that the next one is begun only if there is time for it."""
        begun = self.clock()
        yield
        seconds = self.clock() - begun
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
