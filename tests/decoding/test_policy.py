"""Draft policies: exits worked out by hand, n-grams against a slow search, and the choice between sources."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipsearch.decoding.exit_rule import ADAPTIVE_RATE, ExitRule, accepted_at
from skipsearch.decoding.ngram import NgramIndex, match_class
from skipsearch.decoding.scheduler import PROBE_SHARE, Scheduler
from skipsearch.decoding.sources import Part
from skipsearch.errors import MaskError
from skipsearch.policy import DraftPolicy

COSTS = (0.2, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)


def test_calibrated_exit_by_hand() -> None:
    """Prevents the exit from looking at the last token alone: the chance is that of all of them."""
    rule = ExitRule(DraftPolicy(max_length=4, curve=(0.5, 0.9), prices=(0.4, 0.4, 0.4, 0.4)))
    assert accepted_at((0.5, 0.9), 0.49) == 0.5 and accepted_at((0.5, 0.9), 1.0) == 0.9
    assert rule.length([0.9, 0.9, 0.9, 0.9], 9) == 4  # 0.9, 0.81, 0.73, 0.66
    assert rule.length([0.9, 0.1, 0.1, 0.9], 9) == 3  # 0.9, 0.45, 0.225
    assert rule.length([0.1, 0.1, 0.9, 0.9], 9) == 2  # 0.5, 0.25
    assert rule.length([0.9] * 4, 2) == 2


def test_adaptive_threshold_follows_acceptance() -> None:
    """Prevents the threshold from moving the wrong way: too little accepted means stopping sooner."""
    rule = ExitRule(DraftPolicy(max_length=4, exit_threshold=0.5, adaptive=True))
    for _ in range(50):
        rule.learn(4, 0)
    assert rule.threshold is not None and rule.threshold > 0.5
    high = rule.threshold
    for _ in range(200):
        rule.learn(4, 4)
    assert rule.threshold < high
    fixed = ExitRule(DraftPolicy(max_length=4, exit_threshold=0.5))
    fixed.learn(4, 0)
    assert fixed.threshold == 0.5 and fixed.rate == ADAPTIVE_RATE


@pytest.mark.parametrize(
    "wrong", [{"adaptive": True}, {"curve": (0.5,)}, {"ngram": -1}, {"ngram": True}, {"costs": (1.0,)},
              {"curve": (2.0,), "prices": (1.0,) * 5}, {"curve": (0.5,), "prices": (1.0,)}, {"costs": (0.1, 0.0)},
              {"curve": (0.5,), "prices": (1.0,) * 5, "exit_threshold": 0.5}],
)  # fmt: skip
def test_policies_that_cannot_be_are_refused_by_field(wrong: Any) -> None:
    """Prevents a mask file with half a policy from drafting by some other rule."""
    with pytest.raises(MaskError, match=r"draft\.\w+ .*got|draft.adaptive is true"):
        DraftPolicy(**wrong)


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=4), st.integers(1, 12))
def test_ngrams_are_those_of_a_slow_search(tokens: list[int], drafted: list[int], limit: int) -> None:
    """Prevents a stale or shifted place: the match must be there, and be as long as any of up to four tokens."""
    index = NgramIndex(10)
    for token in tokens:
        index.extend([token])
    match, following = index.lookup(drafted, limit)
    text = [*tokens, *drafted]
    found = 0
    for n in range(1, 5):
        if n <= len(text) and any(tokens[i : i + n] == text[-n:] for i in range(len(tokens) - n)):
            found = n
    assert min(match, 4) == found
    assert len(following) == (limit if match else 0)
    if match:
        places = [i for i in range(match, len(tokens)) if text[i - match : i] == text[len(text) - match :]]
        assert any(following[: len(text) - i] == text[i : i + min(limit, len(text) - i)] for i in places)


def test_repeating_text_is_continued_past_its_end() -> None:
    """Prevents proposals of a loop from ending where the text ends."""
    index = NgramIndex(10)
    index.extend([1, 2, 3, 1, 2, 3, 1])
    assert index.lookup(limit=7) == (4, [2, 3, 1, 2, 3, 1, 2])


def learn(
    scheduler: Scheduler, source: str, drafted: int, accepted: int, seconds: float, verify_seconds: float | None = None
) -> None:
    """One block of one source; of n-grams, of the most reliable class."""
    parts = [Part(source, drafted, 4 if source == "ngram" else 0)] if drafted else []
    scheduler.learn(parts, accepted, seconds, verify_seconds)


def plan(scheduler: Scheduler, match: int, longest: int) -> tuple[int, float]:
    return scheduler.plan(scheduler.acceptance(NgramIndex(10), match_class(match)), longest)


def test_drafting_that_does_not_pay_stops_and_is_tried_again_at_bounded_cost() -> None:
    """Prevents drafting from making a hopeless text slow, and from staying off when the text changes."""
    scheduler, seconds, lost, history = Scheduler(COSTS), 0.0, 0.0, []
    for step in range(4000):
        hopeless = step < 2000
        source = scheduler.choose({"mask": scheduler.mask_rate, "plain": scheduler.plain_rate})
        history.append(source)
        if source == "mask":
            cost, accepted = 5 * 0.2 + 1.5, 0 if hopeless else 5
            learn(scheduler, "mask", 5, accepted, cost)
        else:
            cost, accepted = 1.0, 0
            learn(scheduler, "plain", 0, 0, cost)
        if hopeless:
            seconds += cost
            lost += cost - 1.0
    assert lost / seconds < 2 * PROBE_SHARE
    assert Counter(history[:2000])["mask"] > 5  # it was tried again
    assert Counter(history[2400:])["mask"] > 1500  # and taken up


def test_a_source_slower_than_the_best_is_not_tried_all_the_time() -> None:
    """Prevents a mask that beats plain steps, but not n-grams, from being taken every other block."""
    scheduler, history = Scheduler(COSTS), Counter[str]()
    for _ in range(300):
        _, rate = plan(scheduler, 8, 6)
        source = scheduler.choose({"mask": scheduler.mask_rate, "ngram": rate, "plain": scheduler.plain_rate})
        history[source] += 1
        if source == "mask":
            learn(scheduler, "mask", 5, 3, 2.5)
        elif source == "plain":
            learn(scheduler, "plain", 0, 0, 1.0)
        else:
            learn(scheduler, "ngram", 6, 6, 1.5)
    assert history["ngram"] > 270


def test_one_slow_block_does_not_switch_drafting_off() -> None:
    """Prevents a block in which something was compiled from being taken for the scheduler of the next ones."""
    scheduler, history = Scheduler(COSTS), Counter[str]()
    for step in range(200):
        source = scheduler.choose({"mask": scheduler.mask_rate, "plain": scheduler.plain_rate})
        history[source] += step > 20
        if source == "mask":
            learn(scheduler, "mask", 5, 5, 100.0 if step == 20 else 2.5)
        else:
            learn(scheduler, "plain", 0, 0, 1.0)
    assert history["mask"] > 160


def test_plain_steps_are_measured_again() -> None:
    """Prevents a first plain step that was slow from making drafts look good for ever."""
    scheduler, history = Scheduler(), Counter[str]()
    learn(scheduler, "plain", 0, 0, 50.0, 50.0)
    for step in range(20_000):
        source = scheduler.choose({"mask": scheduler.mask_rate, "plain": scheduler.plain_rate})
        history[source] += step > 10_000
        drafted, accepted, cost = (5, 1, 2.5) if source == "mask" else (0, 0, 1.0)
        learn(scheduler, source, drafted, accepted, cost, cost - 0.2 * drafted)
    assert history["plain"] > 9_000


def test_proposals_are_as_long_as_they_pay() -> None:
    """Prevents long proposals where verifying is dear, and short ones where it is free."""
    free, dear = Scheduler((0.1, *[1.0] * 11)), Scheduler((0.1, *[1.0 + k for k in range(11)]))
    assert plan(free, 8, 10)[0] == 10 and plan(dear, 1, 10)[0] == 1
    assert free.tail(0.9, 2, 0.85, 5) == 5 and dear.tail(0.2, 2, 0.3, 5) == 0
    assert math.isinf(free.mask_rate) and [match_class(m) for m in (1, 2, 3, 4, 7, 8, 99)] == [0, 1, 2, 3, 3, 4, 4]


def test_without_a_clock_seconds_are_those_of_the_policy() -> None:
    """Prevents seeded sampling from depending on how fast the machine happens to be."""
    fast, slow = Scheduler(COSTS, clock=False), Scheduler(COSTS, clock=False)
    learn(fast, "mask", 3, 2, 1e-6)
    learn(slow, "mask", 3, 2, 1e6)
    assert fast.mask_rate == slow.mask_rate > 0
