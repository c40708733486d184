"""What a run leaves in the study for optuna-dashboard, and that no fault there costs a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import postgres_server
import pytest
from optuna_dashboard import get_note, save_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from transformers import PreTrainedTokenizerBase

from skipsearch import DraftPlan, SkipMask
from skipsearch.decoding.stats import DecodeStats
from skipsearch.errors import SkipsearchWarning
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.validate import ArmResult, Measured
from skipsearch.files import write_checked
from skipsearch.maskfile import Evidence, MaskFile, ModelCard
from skipsearch.model.space import Space
from skipsearch.policy import DraftPolicy
from skipsearch.search.attributes import backend
from skipsearch.search.board import show_in_dashboard
from skipsearch.search.publish import publish, write_texts
from skipsearch.search.result import SearchResult
from skipsearch.search.storage import storage_url
from skipsearch.search.study import Study

BEST = DraftPlan(SkipMask(attention=[1, 3], mlp=[2], num_layers=4))
PROOF = Evidence(
    acceptance_rate=0.8, tau=3.0, cost_ratio=0.4, speedup=1.5, speedup_ci=(1.2, 1.9), baseline="plain decoding",
    tokens_per_second=15.0, baseline_tokens_per_second=10.0, greedy_equal=True, backend="eager", dtype="float32",
    device="a CPU", prompts=2, tokens=8, prompts_sha256="ab", verdict="use",
)  # fmt: skip


def scorer(plan: DraftPlan) -> Score:
    worse = len(plan.skip ^ BEST.skip)
    return Score(
        plan=plan, policy=DraftPolicy(max_length=3), tokens_per_second=100.0 - worse, speedup=1.5 - worse / 10,
        acceptance_rate=1 - len(plan.skip) / 10, tau=2.0, cost_ratio=1 - len(plan.skip) / 8,
    )  # fmt: skip


def finished(url: str, folder: Path) -> tuple[Study, SearchResult]:
    """A small study, and what its run would have found."""
    study = Study(url, "search", Space(num_layers=4, fixed=SkipMask(num_layers=4)), {"model": "m"}, "random", seed=0)
    study.enqueue([("best", BEST)])
    study.optimize(scorer, trials=8, time_budget=None, report=lambda *_: None)
    study.export_csv(folder / "trials.csv")
    file = MaskFile.of(BEST, model=ModelCard(id="m", num_layers=4), evidence=PROOF)
    arm = ArmResult(speedup=1.5, speedup_ci=(1.2, 1.9), tokens_per_second=15.0, stats=DecodeStats())
    measured = Measured(
        arms={"mask": arm, "n-grams": arm}, plain_tokens_per_second=10.0, prompts=2, tokens=8, greedy_equal=True
    )
    return study, SearchResult(
        plan=BEST, file=file, predicted=scorer(BEST), standard_error=0.1, scored_tokens=100, front=study.front(),
        measured=measured, folder=folder, trials=8, seconds={}, given="m",
    )  # fmt: skip


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield storage_url(tmp_path)
        return
    if not postgres_server.usable():
        pytest.skip("PostgreSQL or psycopg is not installed here")
    with postgres_server.running() as server:
        yield server.url


def test_the_dashboard_shows_the_plan_and_the_verdict(url: str, tmp_path: Path) -> None:
    """Prevents pictures that pile up run after run, a study without its verdict, and a user's note that is lost."""
    study, result = finished(url, tmp_path)
    save_note(study.study, "mine")
    for _ in range(2):
        show_in_dashboard(study, result)
    attributes = study.study._storage.get_study_system_attrs(study.study._study_id)
    pictures = {name: json.loads(text) for name, text in get_plotly_graph_objects(attributes).items()}
    assert set(pictures) == {"best-plan", "speedup-against-trials", "acceptance-against-cost"}
    assert sum(map(len, map(json.dumps, pictures.values()))) < 20_000
    heat, skipped, _ = pictures["best-plan"]["data"]
    assert heat["y"] == ["attention skipped", "attention quantised", "mlp skipped", "mlp quantised"]
    assert [row for row in heat["z"] if not any(row)] == [[0, 0, 0, 0]] * 2  # nothing is quantised
    assert list(zip(skipped["x"], skipped["y"], strict=True)) == [
        (1, "attention skipped"), (3, "attention skipped"), (2, "mlp skipped"),
    ]  # fmt: skip
    note = get_note(study.study)
    assert note.startswith("**use**: The mask pays: 1.50x (1.20 to 1.90)") and "skipsearch generate --model m" in note
    assert note.endswith("\n\nmine") and note.count("mine") == note.count("---") == 1
    backend(study.study).engine.dispose()  # a server's connections do not close by themselves


def test_a_dashboard_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents minutes of search from ending in a traceback for a picture, or for a text."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such table: study_system_attributes\nsecond line")

    study, result = finished(storage_url(tmp_path), tmp_path)
    monkeypatch.setattr("optuna_dashboard.save_plotly_graph_object", broken)
    tokenizer: Any = SimpleNamespace()
    with pytest.warns(SkipsearchWarning, match="pictures were not saved .no such table") as told:
        publish(result, study, tokenizer, [])
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert json.loads((tmp_path / "summary.json").read_text())["trials"] == 8


def test_texts_are_those_of_the_arm_that_serves(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Prevents characters of several tokens from being lost or repeated, and pieces that slip against their marks."""
    prompt, said = tokenizer("x = ")["input_ids"], tokenizer("'é€🙂' + y\n")["input_ids"]
    marks = "t" + "m" * (len(said) - 2) + "MM" + "t"
    run = {"ids": said, "marks": marks, "rejected": tokenizer(" zu")["input_ids"][:2]}
    write_checked(tmp_path / "validation.json", {"measured": {"plain": [[run], []], "mask": [[run], []]}})
    write_texts(tmp_path, MaskFile.of(BEST, model=ModelCard(num_layers=4)), tokenizer, [prompt, prompt])
    data = json.loads((tmp_path / "texts.json").read_text())
    found, none = data["prompts"]  # the second prompt was not decoded
    assert none == {}
    assert data["arm"] == "mask" and len(found["pieces"]) == len(found["marks"]) == len(said) + 2
    own = [piece for piece, mark in zip(found["pieces"], marks, strict=True) if mark.islower()]
    assert found["prompt"] + "".join(own) == tokenizer.decode([*prompt, *said])
