"""The whole run from end to end, small: files written, evidence honest, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet

from skipsearch import load_mask, search, self_speculative
from skipsearch.errors import PromptError, ResultsError, SkipsearchError, StudyMismatch
from skipsearch.evaluate.trace import Trace
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import chosen_prompts
from skipsearch.search.revalidate import validate_file

SMALL = SearchOptions(
    trials=14, prompts=3, held_out=2, prompt_tokens=16, new_tokens=16, trial_tokens=12, rounds=1,
    backend="eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(shallow: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return search(shallow, out=tmp_path_factory.mktemp("results"), options=SMALL)


def test_a_run_leaves_a_plan_that_decodes(result: Any, shallow: Any) -> None:
    """Prevents an export that the runtime cannot load, or that changes the output."""
    file = load_mask(result.folder / "mask.json")
    assert file.plan == result.plan and file.evidence is not None and file.evidence.greedy_equal
    assert file.evidence.verdict == ("use" if file.evidence.speedup_ci[0] > 1 else "do not use")
    inputs = shallow.tokenizer("def main(argv):\n", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "attention_mask": inputs.attention_mask}
    plain = shallow.model.generate(inputs.input_ids, **options)
    method = self_speculative(result.folder / "mask.json")
    assert torch.equal(shallow.model.generate(inputs.input_ids, custom_generate=method, **options), plain)


def test_a_run_leaves_every_stage_on_disk(result: Any) -> None:
    """Prevents results that cannot be checked later, and leftovers of half-written files."""
    names = {p.name for p in result.folder.iterdir()}
    assert {"trace.json", "costs.json", "study.db", "trials.csv", "mask.json", "summary.json"} <= names
    assert not {n for n in names if n.startswith(".")}
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["trials"] == 14 and summary["evidence"]["prompts"] == 2
    texts = json.loads((result.folder / "texts.json").read_text())["prompts"]
    assert len(texts) == 2 and all(len(text["marks"]) == len(text["pieces"]) >= 16 for text in texts)


def test_running_again_continues(result: Any, shallow: Any) -> None:
    """Prevents finished trials, the trace or the costs from being made again."""
    stages: list[str] = []
    again = search(
        shallow, out=result.folder, options=replace(SMALL, trials=15), progress=lambda s, *_: stages.append(s)
    )
    assert again.trials == 15 and not {"record", "profile"} & set(stages)


def test_a_run_cut_short_says_so_and_goes_on(shallow: Any, tmp_path: Path) -> None:
    """Prevents a budget that bounds the trials alone, results that hide it, and a second run that starts anew."""
    many = replace(SMALL, prompts=40, trials=2000, time_budget=0.1)  # more than any machine does within its shares
    short = search(shallow, out=tmp_path, options=many)
    assert 1 <= short.trials < 2000 and short.scored_tokens < 40 * 16
    recorded = int(short.cut_short[0].split(" ")[0])
    assert 4 <= recorded < 40 and f"{short.trials} of 2000 trials" in short.cut_short
    assert {"record", "profile", "seeds", "trials", "finalists", "validate"} <= set(short.seconds)
    stages: list[str] = []
    more = replace(many, trials=short.trials + 2, time_budget=None)
    whole = search(shallow, out=tmp_path, options=more, progress=lambda stage, *_: stages.append(stage))
    assert whole.trials == short.trials + 2 and "record" not in stages  # what is scored on does not change


def test_prompts_that_end_at_once_are_told(shallow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a division by zero deep inside where there is nothing to draft."""
    ends = lambda target, prompts, *_, **__: Trace(prompts=prompts, continuations=((0,),) * len(prompts), new_tokens=16)
    monkeypatch.setattr("skipsearch.evaluate.trace.record", ends)
    with pytest.raises(PromptError, match="ends every calibration prompt at once"):
        search(shallow, out=tmp_path / "x", options=SMALL)


def test_another_set_up_is_refused(result: Any, shallow: Any) -> None:
    """Prevents trials on other prompts from joining the study."""
    with pytest.raises(StudyMismatch, match="prompts"):
        search(shallow, out=result.folder, options=replace(SMALL, seed=5))


def test_what_cannot_join_the_study_is_told_before_the_work(result: Any, shallow: Any, tmp_path: Path) -> None:
    """Prevents: two minutes of recording and profiling, then another temperature is refused, or a missing driver."""
    stages: list[str] = []
    for changes, named in (({"temperature": 0.7}, "temperature"), ({"storage": "postgresql+none://h/d"}, "opened")):
        with pytest.raises((StudyMismatch, ResultsError), match=named):
            options = replace(SMALL, **changes)
            search(shallow, out=result.folder, options=options, progress=lambda stage, *_: stages.append(stage))
    assert not stages


def test_calibration_and_held_out_prompts_are_disjoint(shallow: Any) -> None:
    """Prevents validation on what the search has seen."""
    prompts = chosen_prompts(shallow.target, shallow.tokenizer, SearchOptions())
    assert not set(prompts.calibration) & set(prompts.held_out)
    assert len(prompts.calibration) == 24 and len(prompts.held_out) == 20


def test_an_unwritable_folder_is_found_first(shallow: Any, tmp_path: Path) -> None:
    """Prevents minutes of search before the first write fails."""
    (tmp_path / "file").write_text("")
    stages: list[str] = []
    with pytest.raises(ResultsError, match="--out"):
        search(shallow, out=tmp_path / "file" / "x", options=SMALL, progress=lambda s, *_: stages.append(s))
    assert not stages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "trials is 0"),
        ({"sampler": "magic"}, "sampler is 'magic'"),
        ({"new_tokens": 0}, "new_tokens is 0"),
    ],
)
def test_settings_are_checked(changes: Any, words: str) -> None:
    """Prevents settings that fail deep inside."""
    with pytest.raises(SkipsearchError, match=words):
        replace(SMALL, **changes)


def test_no_room_in_the_context(shallow: Any) -> None:
    """Prevents positions beyond what the model was trained on."""
    with pytest.raises(PromptError, match="new_tokens is 600"):
        chosen_prompts(shallow.target, shallow.tokenizer, replace(SMALL, new_tokens=600))


def test_validate_gives_fresh_evidence(result: Any, shallow: Any) -> None:
    """Prevents old evidence from being carried along as if measured here."""
    fresh = validate_file(shallow, result.file, SMALL, quiet)
    assert fresh.plan == result.plan and fresh.evidence is not None
    assert fresh.evidence.tokens == result.file.evidence.tokens
    assert fresh.evidence.tokens_per_second != result.file.evidence.tokens_per_second


def test_a_mask_for_long_contexts_is_validated_at_them(shallow: Any) -> None:
    """Prevents a search at the contexts of --context with a verdict from short prompts."""
    without = replace(SMALL, held_out=3)
    options = replace(without, contexts=(100, 300, 480))
    short, long = (
        chosen_prompts(shallow.target, shallow.tokenizer, without),
        chosen_prompts(shallow.target, shallow.tokenizer, options),
    )
    assert long.calibration == short.calibration
    room = shallow.model.config.max_position_embeddings - SMALL.new_tokens - MAX_LENGTH
    for i, (prompt, longer) in enumerate(zip(short.held_out, long.held_out, strict=True)):
        wanted = min(room, options.contexts[i % 3] - SMALL.new_tokens // 2)
        assert len(longer) == max(len(prompt), wanted) and longer[-len(prompt) :] == prompt
    with pytest.raises(PromptError, match="context is 5000"):
        chosen_prompts(shallow.target, shallow.tokenizer, replace(SMALL, contexts=(5000,)))
