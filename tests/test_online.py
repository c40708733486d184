"""Search while serving: it scores what replay scores, keeps to its share of the time, and changes no output."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from skipsearch import SkipMask, load_mask, self_speculative
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import DecodingError
from skipsearch.mask import KINDS
from skipsearch.online import tuner as tuning
from skipsearch.online.candidates import Candidates, influence
from skipsearch.online.domains import Domains
from skipsearch.online.prices import corner_views, measure
from skipsearch.online.tuner import OnTheFly
from skipsearch.online.window import LENGTH, Window
from skipsearch.search.cost import Point
from skipsearch.search.objective import plain_score
from skipsearch.search.replay import Replay
from skipsearch.search.trace import Trace

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
    monkeypatch.setattr(tuning, "PAYS", 0.0)  # whatever is tried is served
    monkeypatch.setattr(tuning, "MARGIN", -9.0)
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
    assert tuner.counts["pass"] >= 1
    longest = max(tuner.seconds.values())  # what is begun is finished
    assert tuner.searching <= 0.5 * tuner.decoding + 3 * longest
    nothing = self_speculative("auto", share=0.0, backend="eager")
    inputs = demo.tokenizer("import os\n", return_tensors="pt")
    demo.model.generate(**inputs, custom_generate=nothing, max_new_tokens=120, do_sample=False)
    assert nothing.tuner_for(demo.model).counts["pass"] == 0


def test_a_challenger_has_to_win_on_other_windows(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a mask from being chosen for the window that it was picked on."""
    tuner = tuner_of(demo.model)
    free, layers = free_of(demo.model)
    domain = tuner.domains.of(torch.tensor([5, 6, 7]))
    tuner.candidates = Candidates(free, layers, {}, 0)
    domain.mask = SkipMask(mlp=[3], num_layers=layers)
    point = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    plain = plain_score(layers, point)
    speeds = iter([1.5, 1.04, 1.03, 1.2, 0.5, 1.2, 0.9])
    outlook = [([True] * 9, [1.0] * 9, 4)]
    monkeypatch.setattr(
        tuner, "_score", lambda d, w, mask: (replace(plain, mask=mask, tokens_per_second=next(speeds)), outlook)
    )
    monkeypatch.setattr(tuner, "_point", lambda d: point)
    held = replace(plain, mask=domain.mask, tokens_per_second=1.0)
    before = domain.mask
    window: Any = None
    tuner._compare(domain, window, held)
    assert domain.challenger is not None and not domain.challenger.gains  # where it was picked counts for nothing
    tuner._compare(domain, window, held)
    assert domain.mask == before
    tuner._compare(domain, window, held)
    assert domain.mask != before and domain.challenger is None and tuner.events[-1][2] == "better mask"
    before = domain.mask
    for _ in range(2):  # wins once, then loses by far
        tuner._compare(domain, window, held)
    assert domain.mask == before and domain.challenger is None and domain.rejected == 1
    for _ in range(2):  # wins once, then loses
        tuner._compare(domain, window, held)
    assert domain.mask == before and domain.rejected == 2


def test_drift_of_acceptance_wakes_a_search_at_rest(demo: Any) -> None:
    """Prevents a search from resting for ever, and from being woken by noise."""
    tuner = tuner_of(demo.model)
    domain = tuner.domains.of(torch.tensor([5, 6, 7]))
    domain.rested_at, domain.tried = 0, {SkipMask(num_layers=20)}
    for _ in range(180):
        tuner._watch(domain, 5, 4)
    assert domain.expected == pytest.approx(0.8) and domain.rested_at == 0
    for _ in range(60):
        tuner._watch(domain, 5, 2)
    assert domain.rested_at is None and domain.expected is None and not domain.tried


def test_domains_are_told_apart_and_recognised(demo: Any) -> None:
    """Prevents a returning domain from being searched anew, and a new one from being served as an old one."""
    domains = Domains(4096, POLICY)
    encode = lambda text: demo.tokenizer(text, return_tensors="pt")["input_ids"][0]
    code = "def read_config(path):\n    with open(path) as file:\n        return json.load(file)\n"
    sums = "12 + 34 * 56 = 78; 90 / 12 - 34 = 56, 7 times 89 is 623 and 623 minus 12 is 611\n"
    first = domains.of(encode(code))
    first.mask = SkipMask(mlp=[2], num_layers=20)
    for name in ("load", "parse", "check"):
        assert domains.of(encode(code.replace("read", name))) is first
    second = domains.of(encode(sums))
    assert second is not first and second.mask == first.mask  # the nearest one's, to begin with
    assert domains.of(encode(sums.replace("12", "31"))) is second
    assert domains.of(encode(code.replace("read", "write"))) is first


def test_candidates_learn_which_flips_help(demo: Any) -> None:
    """Prevents proposals that were tried already, and a model that does not learn from comparisons."""
    free, layers = free_of(demo.model)
    rng = np.random.default_rng(0)
    worth = dict(zip(free, rng.normal(0, 0.03, len(free)), strict=True))
    candidates = Candidates(free, layers, {sub: float(rng.random()) for sub in free}, 0)
    nested = candidates.nested()
    assert len({len(mask) for mask in nested}) == len(nested)
    value = lambda mask: sum(worth[sub] for sub in free if mask.skips(*sub))
    incumbent, tried = nested[0], set[SkipMask]()
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


def test_influence_is_of_each_sublayer(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a sublayer that does nothing from looking useful."""
    import copy

    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = influence(model, ids)
    assert found.keys() == {(kind, i) for kind in KINDS for i in range(model.config.num_hidden_layers)}
    assert found["mlp", 1] == 0 and all(value > 0 for sub, value in found.items() if sub != ("mlp", 1))


def test_what_was_found_can_be_saved(demo: Any, tmp_path: Any) -> None:
    """Prevents a search that is lost with its process."""
    method = self_speculative("auto", backend="eager")
    tuner = method.tuner_for(demo.model)
    with pytest.raises(DecodingError, match="no mask was found"):
        tuner.save(tmp_path / "mask.json")
    assert isinstance(tuner, OnTheFly)
    domain = tuner.domains.of(torch.tensor([5, 6, 7]))
    domain.mask = SkipMask(attention=[3], mlp=[2], num_layers=20)
    domain.policy = replace(domain.policy, max_length=6, exit_threshold=0.4, adaptive=True)
    tuner.save(tmp_path / "mask.json")
    file = load_mask(tmp_path / "mask.json")
    assert file.mask == domain.mask and file.draft.max_length == 6 and file.evidence is None
    again = self_speculative("auto", start=tmp_path / "mask.json", backend="eager").tuner_for(demo.model)
    assert isinstance(again, OnTheFly) and again.domains.first[1] == domain.mask


def test_wrong_settings_are_named() -> None:
    """Prevents a start that is ignored, and a share that can never be kept."""
    with pytest.raises(DecodingError, match="start"):
        self_speculative(None, start="mask.json")
    with pytest.raises(DecodingError, match="share is 1"):
        self_speculative("auto", share=1)
    with pytest.raises(DecodingError, match="nothing is searched"):
        self_speculative(None).tuner_for(object())  # type: ignore[arg-type]
    assert math.isclose(tuning.SHARE, 0.05)
