"""Searching over plans: the space of forms, what pays on a machine, seeds, and a run from end to end."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quiet
from hypothesis import given
from hypothesis import strategies as st
from random_plans import plans
from traces import POINT, make_trace

from skipsearch import DraftPlan, SkipMask, load_mask, search, self_speculative
from skipsearch.errors import ModelLoadError
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.form_speed import paying_forms
from skipsearch.evaluate.frequency import frequency, head_sizes
from skipsearch.evaluate.hidden_states import draft_states
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.windows import Windows
from skipsearch.model.preset import read_space
from skipsearch.model.space import Space
from skipsearch.model.target import Target
from skipsearch.plan import FORMS
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import paying_space
from skipsearch.search.seeds import all_seeds, knapsack, seconds_saved
from skipsearch.search.sensitivity import single_losses

L = 4
WHOLE = Space(
    num_layers=L, fixed=SkipMask(attention=[0], num_layers=L), forms=("int8", "int4", "skip"),
    heads=("full", "int8"), tokens=tuple(range(96, -1, -1)), sizes=(48, 24),
)  # fmt: skip
FORM_COSTS = {form: {"attention": (a,) * L, "mlp": (m,) * L} for form, a, m in (("int8", 0.7, 0.4), ("int4", 0.6, 0.3))}
HEAD_COSTS = {"full": ((12, 2.0), (97, 3.0)), "int8": ((12, 1.5), (97, 2.0)), "int4": ((12, 1.0), (97, 2.0))}
PRICED = replace(POINT, forms=FORM_COSTS, heads=HEAD_COSTS)


@given(st.data())
def test_parameters_are_plans_of_the_space(data: Any) -> None:
    """Prevents a trial from being another plan than its parameters say, and a fixed sublayer from being quantised."""
    params = {name: data.draw(st.integers(*bounds)) for name, bounds in WHOLE.bounds.items()}
    plan = WHOLE.plan(params)
    assert WHOLE.params(plan) == params and plan.form("attention", 0) == "run"
    assert plan.head_ids is None or set(plan.head_ids) == set(WHOLE.tokens[: len(plan.head_ids)])


@given(plans(L, 97, FORMS), st.sampled_from(["sublayers", "layers"]))
def test_any_plan_is_cut_to_the_space(plan: DraftPlan, structure: Any) -> None:
    """Prevents a seed that asks for what the space has not from being refused, or from skipping something else."""
    space = replace(WHOLE, forms=("int8", "skip"), structure=structure, heads=("full",))
    found = space.plan(space.params(plan))
    assert found.skip <= plan.skip and found.int8 <= plan.int8 and not found.int4 and found.head == "full"
    assert (found.head_ids is None) == (plan.head_ids is None)


def test_a_space_file_chooses_forms(tmp_path: Path) -> None:
    """Prevents `forms = ["skip"]` from searching anything else than masks, and a misspelt form from being left out."""
    path = tmp_path / "space.toml"
    for text, forms in (('forms = ["skip"]', ("skip",)), ('forms = ["skip", "int8"]', ("int8", "skip")), ("", None)):
        path.write_text(f"[space]\n{text}\n")
        assert read_space(path, L).forms == forms
    assert str(read_space(path, L)) == str(Space(num_layers=L, fixed=SkipMask(num_layers=L), forms=("skip",)))
    for text in ('forms = ["int3"]', "forms = []", 'forms = "skip"', 'structure = "spans"\nforms = ["int8"]'):
        path.write_text(f"[space]\n{text}\n")
        with pytest.raises(ModelLoadError, match=r"space\.forms"):
            read_space(path, L)


def test_forms_that_are_not_cheaper_are_left_out() -> None:
    """Prevents a search over forms that only do harm on this machine."""
    assert paying_forms({"run": 1.0, "int8": 0.4, "int4": 0.3}) == ["int8", "int4"]
    assert paying_forms({"run": 1.0, "int8": 0.4, "int4": 0.39}) == ["int8"]
    assert paying_forms({"run": 1.0, "int8": 1.1, "int4": 0.5}) == ["int4"]
    assert paying_forms({"run": 1.0, "int8": "no", "int4": "no"}) == []
    free = replace(WHOLE, forms=None, heads=("full",))
    space = paying_space(free, PRICED, ["int8", "int4"])
    assert space.forms == ("int8", "int4", "skip") and space.heads == ("full", "int8")  # int4 is no cheaper as a head
    assert paying_space(free, PRICED, []).choices == ("run", "skip")
    slow = replace(PRICED, forms={"int8": {"attention": (3.0,) * L, "mlp": (3.0,) * L}})
    assert paying_space(free, slow, ["int8"]).choices == ("run", "skip")
    only = replace(free, forms=("int8",))
    assert paying_space(only, PRICED, ["int8"]).forms == ("int8",)


@given(st.data())
def test_the_knapsack_of_forms_is_optimal(data: Any) -> None:
    """Prevents a form that is taken for another, or a plan that does more harm than its share."""
    space = Space(num_layers=2, fixed=SkipMask(num_layers=2), forms=("int8", "skip"))
    harms = st.floats(0, 0.6)
    loss: Any = {form: {sub: data.draw(harms) for sub in space.free} for form in ("int8", "skip")}
    int8 = {"int8": {"attention": (0.7, 0.9), "mlp": (0.4, 0.2)}}
    point = replace(PRICED, attention=(2.0, 1.5), mlp=(1.0, 3.0), forms=int8)
    harm = {(s, f): -math.log(max(1e-3, 1 - loss[f][s])) + 1e-4 for s in space.free for f in loss}
    unit = sum(harm[sub, "skip"] for sub in space.free) / 256
    weight = {("skip", s): max(1, round(harm[s, "skip"] / unit)) for s in space.free}
    weight |= {("int8", s): round(harm[s, "int8"] / unit) for s in space.free}
    for label, plan in knapsack(space, loss, point, (0.25, 0.5)):
        room = round(float(label.split(":")[1]) * 256)
        best = 0.0
        for forms in itertools.product((None, "int8", "skip"), repeat=4):
            chosen = [(f, s) for f, s in zip(forms, space.free, strict=True) if f]
            if sum(weight[pair] for pair in chosen) <= room:
                best = max(best, sum(seconds_saved(point, s, f) for f, s in chosen))
        taken = [(plan.form(*s), s) for s in space.free if plan.form(*s) != "run"]
        assert sum(weight[pair] for pair in taken) <= room
        assert sum(seconds_saved(point, s, f) for f, s in taken) == pytest.approx(best)


def test_seeds_are_plans_of_the_space(tiny: Any) -> None:
    """Prevents seeds that the space turns into other plans, and a search that never tries all int8."""
    model, space = tiny("llama"), replace(WHOLE, forms=("int8", "skip"))
    windows = Windows(Replay(Target.of(model), make_trace(model), 4, side=4, states=True))
    loss = single_losses(windows, windows.part(1), space, quiet)
    assert set(loss) == {"int8", "skip"} and all(set(of_form) == set(space.free) for of_form in loss.values())
    assert sum(loss["int8"].values()) < 0.3 * sum(loss["skip"].values())
    states = draft_states(windows.replay, windows.starts(windows.few(2, 12)))
    seeds = dict(all_seeds(space, loss, states, PRICED, None, None))
    assert seeds["all int8"].forms() == ("run", *["int8"] * 7) and seeds["all int8"].head == "int8"
    assert {len(plan.head_ids) for plan in seeds.values() if plan.head_ids} == {48, 24}
    for label, plan in seeds.items():
        assert space.plan(space.params(plan)) == plan, label
    kinds = {label.split(" ")[0].split(":")[0] for label in seeds}
    assert kinds >= {"empty", "all", "int8", "plan", "sensitivity", "uniform"}


def test_tokens_of_a_smaller_head(demo: Any) -> None:
    """Prevents a trace from vouching for its own tokens: a head would look perfect on what it was chosen by."""
    trace = make_trace(demo.model, prompts=3, new_tokens=16)
    found = frequency(demo.tokenizer, trace, demo.target.vocabulary, 40)
    assert sorted(found.tokens) == list(range(demo.target.vocabulary))
    written = {token for row in trace.continuations for token in row}
    assert set(found.tokens[: len(written)]) == written
    for p, (prompt, row) in enumerate(zip(trace.prompts, trace.continuations, strict=True)):
        others = [r for q, r in enumerate(trace.continuations) if q != p]
        counts = np.bincount([t for r in others for t in r], minlength=demo.target.vocabulary)
        ranks = found.ranks_PT[p, len(prompt) : len(prompt) + len(row)].tolist()
        for token, rank in zip(row, ranks, strict=True):
            ahead = int((counts > counts[token]).sum())
            assert ahead <= rank and (counts[token] or rank >= int((counts > 0).sum()))
    assert head_sizes(49152) == (24576, 12288, 6144, 3072) and head_sizes(4096) == (2048,) and head_sizes(97) == ()


@torch.no_grad()
def test_a_token_that_others_do_not_use_is_not_drafted(tiny: Any) -> None:
    """Prevents calibration prompts from promising an acceptance that held-out prompts cannot keep."""
    model = tiny("llama")
    replay = Replay(Target.of(model), make_trace(model), 4)
    plan = DraftPlan(SkipMask(num_layers=4), head_ids=range(97))  # all tokens: only the ranks can refuse one
    assert sum(n for _, n in DraftReplay(replay, plan).walk(DraftPolicy(max_length=4)).elements()) > 0
    replay.ranks_PT = torch.full_like(replay.ids, 97)
    assert sum(n for _, n in DraftReplay(replay, plan).walk(DraftPolicy(max_length=4)).elements()) == 0


def test_a_run_finds_a_plan_that_decodes(shallow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a plan that is searched and cannot be exported, read again and decoded with."""
    monkeypatch.setattr("skipsearch.search.prepare.paying_forms", lambda seconds: ["int8"])
    monkeypatch.setattr("skipsearch.search.prepare.paying_space", lambda space, point, forms: replace(
        space, forms=("int8",), heads=("full", "int8")))  # fmt: skip
    options = SearchOptions(
        trials=8, prompts=3, held_out=2, prompt_tokens=16, new_tokens=16, trial_tokens=12, rounds=1, backend="eager"
    )
    result = search(shallow, out=tmp_path, options=options)
    file = load_mask(tmp_path / "mask.json")
    assert not result.plan.skip and result.plan.drafts and "plan" in result.measured.arms
    plan = file.drafting_plan or DraftPlan.everywhere("int8", 6)
    assert file.evidence is not None and file.evidence.greedy_equal
    inputs = shallow.tokenizer("def main(argv):\n", return_tensors="pt")
    given: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "attention_mask": inputs.attention_mask}
    out = shallow.model.generate(inputs.input_ids, custom_generate=self_speculative(plan), **given)
    assert torch.equal(out, shallow.model.generate(inputs.input_ids, **given))
    again = search(shallow, out=tmp_path, options=replace(options, trials=9))
    assert again.trials == 9
