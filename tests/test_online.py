"""Search while serving: it scores what replay scores, keeps to its share of the time, and changes no output."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from skipsearch import SkipMask, load_mask, self_speculative
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import DecodingError
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.objective import join
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace
from skipsearch.mask import KINDS
from skipsearch.online import incumbent as contests
from skipsearch.online import tuner as tuning
from skipsearch.online.budget import Budget
from skipsearch.online.candidates import Candidates, nearest_masks, opening
from skipsearch.online.domains import Domains
from skipsearch.online.incumbent import KEPT, PATIENCE, Contest
from skipsearch.online.live_costs import corner_views, measure
from skipsearch.online.tuner import OnTheFly
from skipsearch.online.window import LENGTH, Window

POLICY = DraftPolicy(ngram=6, never_slower=True)


def sequence_of(model: Any, ids: torch.Tensor, new: int, compiled: Any = None) -> Sequences:
    sequences = Sequences(model, ids, capacity=ids.shape[1] + new + 40, compiled=compiled)
    for _ in range(new):
        sequences.verify([0])
    return sequences


def free_of(model: Any) -> tuple[list[Any], int]:
    layers = model.config.num_hidden_layers
    return [(kind, i) for i in range(layers) for kind in KINDS], layers


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_window_sees_what_replay_sees(tiny: Any, ids: torch.Tensor, family: str) -> None:
    """Prevents scoring against keys that are not the sequence's, and a sequence that is not as it was afterwards."""
    model = tiny(family)
    layers = model.config.num_hidden_layers
    mask = SkipMask(attention=[0], mlp=[layers - 1], num_layers=layers)
    sequences = sequence_of(model, ids, 40)
    text = sequences.ids[0, : sequences.lengths[0]].tolist()
    window = Window(model, sequences, 30)
    ((right, sure, _),) = window.outlook(mask)
    first = len(text) - 30
    trace = Trace(prompts=(tuple(text[:first]),), continuations=(tuple(text[first:]),), new_tokens=30)
    right_SK, sure_SK = Replay(model, trace, LENGTH).of(mask).look([(0, t) for t in range(first, len(text), LENGTH)])
    assert right == right_SK.flatten().tolist()[:30]
    np.testing.assert_allclose(sure, sure_SK.flatten().tolist()[:30], atol=1e-4)
    assert sum(right) > 0 or family != "llama"
    following = [sequences.verify([0])[0].tokens[0] for _ in range(6)]
    untouched = sequence_of(model, ids, 40)
    assert following == [untouched.verify([0])[0].tokens[0] for _ in range(6)]


def test_prices_leave_the_sequence_as_it_was(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents timing from committing tokens."""
    model = tiny("llama")
    _, layers = free_of(model)
    sequences = sequence_of(model, ids, 5)
    before, committed = sequences.ids[:, : sequences.lengths[0]].clone(), list(sequences.cache.committed)
    steps, verifies = measure(sequences, corner_views(model, layers))
    assert set(steps) == {"attention", "mlp", "rest"} and all(v > 0 for v in (*steps.values(), *verifies.values()))
    assert torch.equal(before, sequences.ids[:, : sequences.lengths[0]]) and sequences.draft_model is None
    untouched = sequence_of(model, ids, 5)
    assert committed == untouched.cache.committed
    assert sequences.verify([0])[0].tokens == untouched.verify([0])[0].tokens


@pytest.mark.parametrize("sampled", [False, True])
def test_output_stays_the_targets_while_masks_change(demo: Any, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents scratch keys of scoring, or a change of masks inside a sequence, from reaching the output."""
    monkeypatch.setattr(contests, "PAYS", 0.0)  # whatever is tried is served
    monkeypatch.setattr(contests, "SURE", -9.0)
    method = self_speculative("auto", share=0.9, backend="eager", never_slower=False)
    for text in ("def read_config(path):\n", "import os\n\nclass Walker:\n", "for name in names:\n"):
        inputs = demo.tokenizer(text, return_tensors="pt")
        settings = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if sampled:
            settings |= {"do_sample": True, "temperature": 0.7}
        out = demo.model.generate(**inputs, custom_generate=method, **settings)
        if not sampled:
            assert torch.equal(out, demo.model.generate(**inputs, **settings))
    report = method.tuner_for(demo.model).report()
    assert report["passes"] >= 6 and len(report["events"]) >= 2 and 0 < report["share"] < 1.5


def tuner_of(model: Any, **settings: Any) -> OnTheFly:
    free, layers = free_of(model)
    return OnTheFly(model, free, layers, POLICY, **settings)


def test_search_keeps_to_its_share(demo: Any) -> None:
    """Prevents a search that costs more than it may."""
    method = self_speculative("auto", share=0.5, backend="eager", ngram=0)
    tuner = method.tuner_for(demo.model)
    for text in ("def read_config(path):\n", "import os\n", "class Node:\n"):
        inputs = demo.tokenizer(text, return_tensors="pt")
        demo.model.generate(
            **inputs, custom_generate=method, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
    budget = tuner.budget
    assert budget.counts["pass"] >= 1
    longest = max(budget.seconds.values())  # what is begun is finished
    assert budget.searching <= 0.5 * budget.decoding + 3 * longest
    nothing = self_speculative("auto", share=0.0, backend="eager")
    inputs = demo.tokenizer("import os\n", return_tensors="pt")
    demo.model.generate(**inputs, custom_generate=nothing, max_new_tokens=120, do_sample=False)
    assert nothing.tuner_for(demo.model).budget.counts["pass"] == 0


OUTLOOK = [([True] * 9, [1.0] * 9, 4)]


def reader(model: Any, speeds: list[float]) -> Any:
    """Reads that bring these speeds, one after the other."""
    _, layers = free_of(model)
    point = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    plain, following = join(Counter(), SkipMask(num_layers=layers), DraftPolicy(), point), iter(speeds)

    def read(mask: SkipMask) -> Any:
        speed = next(following)
        return replace(plain, mask=mask, tokens_per_second=speed, speedup=speed), list(OUTLOOK)

    return read


def test_a_challenger_has_to_win_on_other_windows(demo: Any) -> None:
    """Prevents a mask from being chosen for the window that it was picked on, or for being the best of several."""
    free, layers = free_of(demo.model)
    near = [opening(free, layers)]
    candidates, first = Candidates(free, layers, near, 0), SkipMask(mlp=[3], num_layers=layers)

    def look(contest: Contest, *speeds: float) -> str | None:
        """The incumbent's speed first."""
        left = iter(range(len(speeds) - 2))
        return contest.look(reader(demo.model, list(speeds)), candidates, lambda: next(left, None) is not None)

    contest = Contest(POLICY, first)
    assert look(contest, 1.0, 1.02, 0.8, 1.05, 0.9) is None and contest.mask == first
    assert contest.challenger is not None and not contest.challenger.gains  # where it was picked counts for nothing
    chosen = contest.challenger.mask
    assert look(contest, 1.0, 1.04) is None and contest.mask == first
    assert look(contest, 1.0, 1.03) == "better mask" and contest.mask == chosen and contest.challenger is None
    assert contest.policy.max_length == LENGTH and contest.policy.ngram == POLICY.ngram
    assert look(contest, 1.0, 1.05, 0.9) is None  # wins once, then loses by far
    assert look(contest, 1.0, 0.9) is None and contest.mask == chosen and contest.challenger is None
    assert look(contest, 1.0, 0.9, 1.3) == "better mask" and contest.mask != chosen  # by far: no luck
    rejected = contest.rejected
    assert look(contest, 1.0, 0.9, 0.8, 0.7) is None and contest.challenger is None
    assert contest.rejected == rejected + 3


def test_a_mask_is_served_only_while_it_pays(demo: Any) -> None:
    """Prevents a first mask that is slower than none, and one that text has turned against from being kept."""
    free, layers = free_of(demo.model)
    contest = Contest(POLICY, queue=[opening(free, layers), SkipMask(mlp=[3], num_layers=layers)])
    always = lambda: True
    assert contest.look(reader(demo.model, [0.9, 1.01]), None, always) is None and contest.mask is None
    assert contest.look(reader(demo.model, []), None, always) is None  # nothing to try yet
    contest.queue = [SkipMask(mlp=[4], num_layers=layers)]
    assert contest.look(reader(demo.model, [1.2]), None, always) == "first mask" and contest.mask is not None
    slow = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    assert contest.reconsider(slow) is None  # of one window nothing is concluded
    contest.outlooks = OUTLOOK * KEPT
    served = contest.mask
    assert contest.reconsider(slow) == "no longer pays" and contest.mask is None and served in contest.tried


def test_drift_of_acceptance_wakes_a_search_at_rest(demo: Any) -> None:
    """Prevents a search from resting for ever, from being woken by noise, and one domain from deciding for all."""
    tuner = tuner_of(demo.model)
    one, other = (tuner.domains.of(torch.tensor(ids)) for ids in ([5, 6, 7], [50, 60, 70]))
    shared = one.contest
    assert other is not one and other.contest is shared
    shared.rejected = PATIENCE
    assert shared.rest(100) and shared.rested_at == 100
    for _ in range(180):
        tuner._watch(one, 5, 4)
    assert shared.expected == pytest.approx(0.8) and shared.rested_at == 100
    for _ in range(60):
        tuner._watch(other, 5, 2)
    assert other.contest is not shared and other.contest.rested_at is None and one.contest is shared
    for _ in range(60):
        tuner._watch(one, 5, 2)
    assert one.contest is shared and shared.rested_at is None and shared.expected is None and not shared.tried


def test_a_budget_lets_a_step_begin_only_if_it_ends_within_the_share() -> None:
    """Prevents steps of unknown length from being free, and a part of the share from being taken for all of it."""
    budget = Budget(0.1)
    budget.decoding, budget.improvable = 20.0, 10.0
    with budget.search():
        assert budget.may("pass", 0.1) and not budget.may("pass", 0.2)  # six plain steps, it is thought
        budget.seconds["pass"] = 0.4
        assert budget.may("pass", 9.9, times=2) and not budget.may("pass", 9.9, times=3)
        assert budget.may("pass", 9.9, part=0.5) and not budget.may("pass", 9.9, part=0.3)
        budget.improvable = 1000.0  # what was not spent is not saved up
        assert budget.may("pass", 0.01, times=2) and not budget.may("states", 0.5, times=99)
        budget.searching += 0.6
        assert not budget.may("pass", 0.01)
    with budget.step("pass"):
        pass
    assert budget.counts["pass"] == 1 and budget.seconds["pass"] < 0.4 and budget.spent > 0


def test_domains_are_told_apart_and_recognised(demo: Any) -> None:
    """Prevents a returning domain from being searched anew, and a new one from being served as an old one."""
    domains = Domains(4096, Contest(POLICY))
    encode = lambda text: demo.tokenizer(text, return_tensors="pt")["input_ids"][0]
    code = "def read_config(path):\n    with open(path) as file:\n        return json.load(file)\n"
    sums = "12 + 34 * 56 = 78; 90 / 12 - 34 = 56, 7 times 89 is 623 and 623 minus 12 is 611\n"
    first = domains.of(encode(code))
    first.contest.mask = SkipMask(mlp=[2], num_layers=20)
    for name in ("load", "parse", "check"):
        assert domains.of(encode(code.replace("read", name))) is first
    second = domains.of(encode(sums))
    assert second is not first and second.contest is first.contest  # the nearest one's, to begin with
    assert domains.of(encode(sums.replace("12", "31"))) is second
    assert domains.of(encode(code.replace("read", "write"))) is first


def test_candidates_learn_which_flips_help(demo: Any) -> None:
    """Prevents proposals that were tried already, and a model that does not learn from comparisons."""
    free, layers = free_of(demo.model)
    rng = np.random.default_rng(0)
    worth = dict(zip(free, rng.normal(0, 0.03, len(free)), strict=True))
    near = [SkipMask.from_sublayers(free[:count], layers) for count in range(len(free))]
    candidates = Candidates(free, layers, near, 0)
    first = candidates.first()
    assert len({len(mask) for mask in first}) == len(first) == 3
    value = lambda mask: sum(worth[sub] for sub in free if mask.skips(*sub))
    incumbent, tried = first[0], set[SkipMask]()
    begin = value(incumbent)
    for _ in range(150):
        mask = candidates.propose(incumbent, tried)
        assert mask not in tried and mask != incumbent
        tried.add(mask)
        gain = value(mask) - value(incumbent) + float(rng.normal(0, 0.02))
        candidates.learn(incumbent, mask, gain)
        if gain > 0:
            incumbent = mask
    best = sum(v for v in worth.values() if v > 0)
    assert value(incumbent) > begin + 0.6 * (best - begin)


def test_first_masks_skip_what_does_nothing(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents sublayers that do nothing from being kept, and fixed ones from being skipped."""
    import copy

    model = copy.deepcopy(tiny("llama"))
    free, layers = free_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    corners = corner_views(model, layers)
    halves = [corners[kind] for kind in KINDS]
    for mask in nearest_masks(model, halves, ids[:1], free, layers):
        assert mask.skips("mlp", 1)
    kept = [sub for sub in free if sub != ("attention", 0)]
    masks = nearest_masks(model, halves, ids[:1], kept, layers)
    assert masks and not any(mask.skips("attention", 0) for mask in masks)


def test_what_was_found_can_be_saved(demo: Any, tmp_path: Any) -> None:
    """Prevents a search that is lost with its process."""
    method = self_speculative("auto", backend="eager")
    tuner = method.tuner_for(demo.model)
    with pytest.raises(DecodingError, match="no mask was found"):
        tuner.save(tmp_path / "mask.json")
    assert isinstance(tuner, OnTheFly)
    domain = tuner.domains.of(torch.tensor([5, 6, 7]))
    found = domain.contest
    found.mask = SkipMask(attention=[3], mlp=[2], num_layers=20)
    found.policy = replace(found.policy, max_length=6, exit_threshold=0.4, adaptive=True)
    tuner.save(tmp_path / "mask.json")
    file = load_mask(tmp_path / "mask.json")
    assert file.mask == found.mask and file.draft.max_length == 6 and file.evidence is None
    again = self_speculative("auto", start=tmp_path / "mask.json", backend="eager").tuner_for(demo.model)
    assert isinstance(again, OnTheFly) and again.domains.first.mask == found.mask


def test_wrong_settings_are_named() -> None:
    """Prevents a start that is ignored, and a share that can never be kept."""
    with pytest.raises(DecodingError, match="start"):
        self_speculative(None, start="mask.json")
    with pytest.raises(DecodingError, match=r"share is 0\.1"):
        self_speculative(None, share=0.1)
    for setting in ("beam_width", "threshold"):
        with pytest.raises(DecodingError, match=f"{setting} is 1, which goes with"):
            self_speculative(None, **{setting: 1})
    with pytest.raises(DecodingError, match="backend is 'fast'"):
        self_speculative(None, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="share is 1"):
        self_speculative("auto", share=1)
    with pytest.raises(DecodingError, match="nothing is searched"):
        self_speculative(None).tuner_for(object())  # type: ignore[arg-type]
    assert math.isclose(tuning.SHARE, 0.05)
