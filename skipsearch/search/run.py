"""The whole run: record, profile, search, validate, export. Each stage leaves files in the results folder.

A second run with the same settings continues where the first one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.compiled.backend import Progress, warm_mask
from skipsearch.errors import MaskError, ModelLoadError, ResultsError, SkipsearchError
from skipsearch.evaluate.cost import Costs, draft_step
from skipsearch.evaluate.mask_replay import MaskReplay
from skipsearch.evaluate.objective import Score, best_policy, score_policy, standard_error
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.validate import Measured, evidence, measure
from skipsearch.evaluate.windows import WindowReplay
from skipsearch.files import write_json
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, Provenance, load_mask
from skipsearch.model.load import Loaded, check_mask_belongs, model_card
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import NGRAM, SearchOptions
from skipsearch.search.prepare import Prepared, prepare
from skipsearch.search.seeds import all_seeds
from skipsearch.search.study import Study, storage_url


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a run found.

    Attributes:
        mask: the best mask.
        file: mask.json as written, with evidence and verdict.
        predicted: the mask's score on the whole trace.
        standard_error: of the predicted speed-up, over prompts.
        scored_tokens: tokens of the trace.
        front: trials that no other trial beats in both acceptance rate and cost ratio.
        measured: the mask's validation.
        folder: the results folder.
        trials: finished trials in the study.
        seconds: wall-clock time by stage.
    """

    mask: SkipMask
    file: MaskFile
    predicted: Score
    standard_error: float
    scored_tokens: int
    front: list[dict[str, Any]]
    measured: Measured
    folder: Path
    trials: int
    seconds: dict[str, float]


def search(
    model: PreTrainedModel | Loaded, tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] | PromptSource | None = None, *, out: str | Path | None = None,
    options: SearchOptions | None = None, progress: Progress = lambda stage, done, total: None,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> SearchResult:  # fmt: skip
    """Find a mask, validate it on held-out prompts, and export it: the library form of `skipsearch run`.

    Args:
        model: a causal LM, or the result of `load_model`.
        tokenizer: needed if `model` is a causal LM.
        prompts: texts, or where to read them; None: as in `options`.
        out: results folder; None: results/<model name>.
        options: settings; None: the defaults.
        progress: called with (stage, done, total).
        report: called with (finished trials, best predicted tokens per second).

    Returns:
        The mask with its evidence; the same is in the results folder.

    Raises:
        SkipsearchError: see `skipsearch.errors`. Files are written completely or not at all.
    """
    options, loaded = _with_prompts(options or SearchOptions(), prompts), _as_loaded(model, tokenizer)
    folder = Path(out) if out is not None else Path("results") / loaded.name
    _check_writable(folder)
    seconds: dict[str, float] = {}
    try:
        with _clocked(seconds, "prepare"):
            prepared = prepare(loaded, folder, options, progress)
    except SkipsearchError:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written to it
        raise
    with _clocked(seconds, "search"):
        study = search_trials(loaded, prepared, folder, options, progress, report)
        study.export_csv(folder / "trials.csv")
        write_json(folder / "front.json", {"front": study.front()})
        predicted, trial, error = rescore(prepared, study, progress)
    with _clocked(seconds, "validate"):
        measured, policy = _measure(prepared, predicted, options, progress)
        provenance = Provenance(
            torch=torch.__version__, transformers=transformers.__version__, study=options.study, trial=trial,
            seed=options.seed,
        )  # fmt: skip
        name = loaded.preset.model_id if loaded.preset else loaded.name
        proof = evidence(
            prepared.target, prepared.prompts.held_out, measured, predicted.cost_ratio, options.temperature
        )
        file = MaskFile.of(
            predicted.mask, model=model_card(prepared.target, name), draft=policy, evidence=proof, provenance=provenance
        )
        file.save(folder / "mask.json")
    result = SearchResult(
        mask=predicted.mask, file=file, predicted=predicted, standard_error=error, folder=folder, measured=measured,
        scored_tokens=prepared.trace.tokens, front=study.front(), trials=len(study.finished()), seconds=seconds,
    )  # fmt: skip
    write_json(folder / "summary.json", summary(result))
    return result


def _check_writable(folder: Path) -> None:
    """Find out before the work whether results can be written.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    probe = folder / ".write-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ResultsError(
            f"results folder {folder} cannot be written to ({error.strerror}); choose another with --out"
        ) from error


def _with_prompts(options: SearchOptions, prompts: Sequence[str] | PromptSource | None) -> SearchOptions:
    if prompts is None:
        return options
    source = prompts if isinstance(prompts, PromptSource) else PromptSource(name="texts", texts=tuple(prompts))
    return replace(options, source=source)


def _as_loaded(model: PreTrainedModel | Loaded, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if tokenizer is None:
        raise ModelLoadError("tokenizer is None, a bare model needs one; pass it as the second argument")
    return Loaded(name=model.config._name_or_path or "model", model=model, tokenizer=tokenizer, preset=None)


@contextmanager
def _clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Store how many seconds a stage takes."""
    begin = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - begin


def search_trials(
    loaded: Loaded, prepared: Prepared, folder: Path, options: SearchOptions, progress: Progress,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> Study:  # fmt: skip
    """Open or resume the study, enqueue the seeds, and run trials."""
    space, url = prepared.space, options.storage or storage_url(folder)
    study = Study(url, options.study, space, prepared.identity, options.sampler, options.seed, options.pareto)
    # All trials of a study are scored with the same costs: those of the worker that created it.
    prepared = replace(prepared, costs=Costs.of(study.shared("costs", asdict(prepared.costs))))
    if len(study.finished()) < options.trials:
        windows, earlier = prepared.windows, _earlier_mask(loaded, folder)
        few = windows.few(8, options.trial_tokens)
        study.enqueue(all_seeds(windows, few, space, prepared.point, progress, loaded.preset, earlier))
        scorer = Scorer(windows, prepared.point, front=options.pareto)
        study.optimize(scorer, trials=options.trials, time_budget=options.time_budget, report=report)
    if not study.best(1):
        raise SkipsearchError("no trial has finished within the time budget; raise --time-budget")
    return study


def _earlier_mask(loaded: Loaded, folder: Path) -> SkipMask | None:
    """The mask of an earlier run in this folder, if it belongs to this model."""
    try:
        file = load_mask(folder / "mask.json")
        check_mask_belongs(file, loaded.target)
    except MaskError:
        return None
    return file.mask


def _measure(
    prepared: Prepared, found: Score, options: SearchOptions, progress: Progress
) -> tuple[Measured, DraftPolicy]:
    """Validate the mask alone and with its whole policy; the policy returned has n-grams only if they help."""
    warm_mask(prepared.target, found.mask, progress)
    point = prepared.point
    step = draft_step(point, found.mask, found.policy.uses_confidence)
    costs = tuple(round(seconds, 7) for seconds in (step, *point.verify))
    served = replace(found.policy, ngram=NGRAM, never_slower=True, costs=costs)
    measured = measure(
        prepared.target, prepared.prompts.held_out, found.mask, found.policy, options.decoding, progress, served
    )
    assert measured.served is not None
    return measured, served if measured.served > measured.speedup else replace(served, ngram=0)


def rescore(prepared: Prepared, study: Study, progress: Progress) -> tuple[Score, int, float]:
    """The best of the study's six best masks with the best policy: its exact score, its trial, its standard error.

    All policies are compared on windows of the whole trace; then the best is replayed block by block.
    """
    windows, point, finalists = prepared.windows, prepared.point, study.best(6)
    scored = []
    for number, (mask, trial) in enumerate(finalists):
        outcomes = WindowReplay(windows, mask).outcomes()
        scored.append((best_policy(outcomes, mask, point), trial))
        progress("finalists", number + 1, len(finalists) + 1)
    best, trial = max(scored, key=lambda pair: pair[0].tokens_per_second)
    drafts = MaskReplay(windows.replay.with_length(best.policy.max_length), best.mask)
    exact = score_policy(drafts, best.policy, point)
    progress("finalists", len(finalists) + 1, len(finalists) + 1)
    return exact, trial, standard_error(drafts, best.policy, point)


def summary(result: SearchResult) -> dict[str, object]:
    """The result as plain JSON, for the CLI and for summary.json."""
    assert result.file.evidence is not None
    return {
        "model": result.file.model.id, "mask": result.mask.to_dict(), "draft": asdict(result.file.draft),
        "evidence": result.file.evidence.model_dump(mode="json"),
        "predicted": {
            "standard_error": round(result.standard_error, 4), "tokens": result.scored_tokens,
        } | {
            k: round(getattr(result.predicted, k), 4)
            for k in ("tokens_per_second", "speedup", "acceptance_rate", "tau", "cost_ratio")
        },
        "trials": result.trials, "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "files": {name: str(result.folder / name) for name in ("mask.json", "trials.csv")},
    }  # fmt: skip
