"""What a run exports: the mask, or n-grams without one, each with its own evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import quiet

from skipsearch import DraftPlan, SkipMask, load_mask, self_speculative
from skipsearch.bench.bench import BenchOptions, bench_file
from skipsearch.decoding.rule import GREEDY
from skipsearch.decoding.stats import DecodeStats
from skipsearch.errors import DecodingError, MaskError
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.validate import MASK, NGRAMS, SERVED, ArmResult, Measured
from skipsearch.maskfile import MaskFile, Provenance
from skipsearch.model.identity import model_card
from skipsearch.model.load import Loaded
from skipsearch.policy import DraftPolicy
from skipsearch.report.tables import mask_table
from skipsearch.search.budget import Budget
from skipsearch.search.export import mask_file
from skipsearch.search.options import SearchOptions
from skipsearch.search.revalidate import audit_file, validate_file
from skipsearch.search.verdict import verdict_line

FOUND = Score(
    plan=DraftPlan(SkipMask(mlp=[2, 3], num_layers=20)), policy=DraftPolicy(max_length=3), tokens_per_second=9.0,
    speedup=1.0, acceptance_rate=0.5, tau=2.0, cost_ratio=0.6,
)  # fmt: skip


def exported(demo: Loaded, **speeds: tuple[float, float, float]) -> MaskFile:
    """The file for these speed-ups and intervals of the arms."""
    arms = {
        name: ArmResult(speedup=x, speedup_ci=(low, high), tokens_per_second=x, stats=DecodeStats())
        for name, (x, low, high) in speeds.items()
    }
    measured = Measured(
        arms={"n-grams" if name == "ngrams" else name: arm for name, arm in arms.items()},
        plain_tokens_per_second=1.0, prompts=8, tokens=100, greedy_equal=True,
    )  # fmt: skip
    prepared: Any = SimpleNamespace(
        target=demo.target, trace=SimpleNamespace(rule=GREEDY), prompts=SimpleNamespace(held_out=((1, 2),) * 9)
    )  # fmt: skip
    served = replace(FOUND.policy, ngram=10, never_slower=True)
    policies = {MASK: FOUND.policy, SERVED: served, NGRAMS: DraftPolicy.ngrams_alone((0.1,) * 14)}
    return mask_file(prepared, FOUND, measured, policies, model_card(demo.target, "demo"), Provenance())


def test_the_file_serves_what_is_proven(demo: Any) -> None:
    """Prevents a mask that does not pay from being served where n-grams pay, and n-grams where the mask pays."""
    pays, not_proven = (1.5, 1.3, 1.7), (0.9, 0.8, 1.05)
    both = exported(demo, mask=pays, served=(2.0, 1.8, 2.2), ngrams=(1.8, 1.6, 2.0))
    assert both.drafting_plan == FOUND.plan and both.draft.ngram and both.evidence.served_speedup == 2.0
    alone = exported(demo, mask=pays, served=(1.4, 1.2, 1.6), ngrams=(1.0, 0.9, 1.1))
    assert alone.drafting_plan == FOUND.plan and not alone.draft.ngram and alone.evidence.verdict == "use"
    ngrams = exported(demo, mask=not_proven, ngrams=pays)
    assert ngrams.drafting_plan is None and not ngrams.mask and ngrams.draft.ngram
    assert ngrams.evidence.verdict == "use" and ngrams.evidence.speedup == 1.5
    nothing = exported(demo, mask=not_proven, ngrams=not_proven)
    assert nothing.drafting_plan == FOUND.plan and nothing.evidence.verdict == "do not use"


@pytest.fixture
def ngram_file(demo: Any, tmp_path: Path) -> Path:
    path = tmp_path / "mask.json"
    file = exported(demo, mask=(0.9, 0.8, 1.0), ngrams=(1.5, 1.3, 1.7))
    assert file.evidence is not None
    file.model_copy(update={"evidence": file.evidence.model_copy(update={"backend": "eager"})}).save(path)
    return path


def test_a_file_of_ngrams_decodes_with_them(demo: Any, ngram_file: Path, tiny: Any) -> None:
    """Prevents the model from being its own draft, a changed output, and a file that any model takes."""
    method = self_speculative(ngram_file)
    assert method.plan is None and method.policy.ngram
    text = "a = [1, 2, 3]\nb = [1, 2, 3]\nc = [1, 2, 3]\nd = ["
    inputs = demo.tokenizer(text, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "attention_mask": inputs.attention_mask}
    plain = demo.model.generate(inputs.input_ids, **options)
    assert torch.equal(demo.model.generate(inputs.input_ids, custom_generate=method, **options), plain)
    assert method.stats.accepted_from["ngram"] and not method.stats.accepted_from["mask"]
    with pytest.raises(MaskError, match="num_layers"):
        tiny("llama").generate(torch.tensor([[3, 4]]), custom_generate=method, max_new_tokens=4)


def test_a_file_of_ngrams_is_shown_timed_and_audited(demo: Any, ngram_file: Path) -> None:
    """Prevents commands that take mask files from drafting with its empty mask."""
    file, options = (
        load_mask(ngram_file),
        SearchOptions(held_out=3, prompts=3, new_tokens=12, rounds=1, backend="eager"),
    )
    fresh = validate_file(demo, file, options, quiet)
    assert fresh.evidence is not None and fresh.evidence.cost_ratio == 0 and fresh.draft == file.draft
    assert audit_file(demo, file, options, quiet).passed
    assert mask_table(fresh)
    settings = BenchOptions(new_tokens=8, rounds=1, backend="eager", hf=False, per_group=2)
    assert not any("mask" in row["arm"] for row in bench_file(demo, file, settings, quiet)["rows"])


def test_joint_decoding_refuses_a_file_without_a_mask(ngram_file: Path) -> None:
    """Prevents the whole model from drafting for itself under the name of joint decoding."""
    with pytest.raises(DecodingError, match="serves n-grams alone"):
        self_speculative(ngram_file, decoding="mtad")


def test_nothing_that_pays_is_not_called_ngrams_that_do(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an empty mask, the only one tried in a short run, from being served as n-grams with its own evidence."""
    monkeypatch.setattr("test_export.FOUND", replace(FOUND, plan=DraftPlan(SkipMask(num_layers=20))))
    file = exported(demo, mask=(0.9, 0.8, 1.0), served=(1.1, 0.9, 1.3), ngrams=(1.05, 0.9, 1.2))
    assert file.evidence is not None and file.evidence.speedup == 1.05 and file.evidence.verdict == "do not use"


def test_the_first_line_says_what_pays() -> None:
    """Prevents a verdict that hides what a user can use."""
    arms = {name: {"speedup": 1.3, "speedup_ci": (1.1, 1.5)} for name in ("mask", "n-grams", "served")}
    data: dict[str, Any] = {"measured": arms, "serves": "n-grams", "evidence": {"verdict": "use", "prompts": 4}}
    assert verdict_line(data).startswith("No mask pays on this model") and "n-grams do: 1.30x" in verdict_line(data)
    line = verdict_line({**data, "serves": "mask"})
    assert line.startswith("The mask pays: 1.30x (1.10 to 1.50)") and "; n-grams alone: 1.30x" in line
    assert line.endswith("The intervals are rough: they rest on 4 prompts.")
    bad = {**data, "serves": "mask", "evidence": {"verdict": "do not use"}}
    assert verdict_line(bad).startswith("Nothing is proven to pay")


def test_a_budget_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a stage from taking what later ones need, and compiling from leaving nothing for the search."""
    now = [100.0]
    monkeypatch.setattr("skipsearch.search.budget.time.monotonic", lambda: now[0])
    budget = Budget(50)
    with budget.stage("compile", on_top=True):
        now[0] += 60
    assert budget.share(0.2) == pytest.approx(10) and budget.spent == {"compile": 60}
    with budget.stage("record"):
        now[0] += 49.5
    assert budget.share(0.5) == 1.0 and budget.share(0.5, least=4) == 4
    assert Budget().share(0.1) == float("inf")
