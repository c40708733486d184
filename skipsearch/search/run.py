"""The whole run: record, profile, search, validate, export. Each stage leaves files in the results folder.

A second run with the same settings continues where the first one stopped, inside a stage too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.compiled.backend import Progress
from skipsearch.errors import MaskError, ModelLoadError, SkipsearchError, enough_memory
from skipsearch.evaluate.cost import Costs
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.hidden_states import draft_states, layer_states
from skipsearch.evaluate.objective import Score, best_policy, score_policy, standard_error
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.scorer import Scorer, affordable_share
from skipsearch.evaluate.windows import Part, WindowReplay
from skipsearch.files import open_folder, results_folder, write_json
from skipsearch.mask import SkipMask
from skipsearch.maskfile import Provenance, load_mask
from skipsearch.model.identity import check_mask_belongs, model_card
from skipsearch.model.load import Loaded
from skipsearch.model.space import Space
from skipsearch.model.weights import Weights
from skipsearch.plan import DraftPlan
from skipsearch.search.budget import LESS, Budget
from skipsearch.search.crew import check_crew, crew
from skipsearch.search.export import mask_file, validated
from skipsearch.search.job import Job
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import STUDY, Prepared, early_identity, prepare
from skipsearch.search.publish import publish
from skipsearch.search.result import SearchResult, cut_short
from skipsearch.search.seeds import Seed, all_seeds
from skipsearch.search.sensitivity import TOGETHER, sensitivity_or_load
from skipsearch.search.storage import check_study, storage_faults, storage_url
from skipsearch.search.study import Study

SEEDS, TRIALS, FINALISTS = 0.2, 0.4, 0.25  # shares of what is left of the budget; validation takes the rest
SEED_PROMPTS = 8  # on which sublayers are skipped one at a time


@enough_memory("run the search", LESS)
def search(
    model: PreTrainedModel | Loaded, tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] | PromptSource | None = None, *, out: str | Path | None = None,
    options: SearchOptions | None = None, progress: Progress = lambda stage, done, total: None,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> SearchResult:  # fmt: skip
    """Find a plan, validate it on held-out prompts, and export it: the library form of `skipsearch run`.

    Args:
        model: a causal LM, or the result of `load_model`.
        tokenizer: needed if `model` is a causal LM.
        prompts: texts, or where to read them; None: as in `options`.
        out: results folder; None: results/<model name>.
        options: settings; None: the defaults.
        progress: called with (stage, done, total).
        report: called with (finished trials, best predicted tokens per second).

    Returns:
        The plan with its evidence; the same is in the results folder.

    Raises:
        SkipsearchError: see `skipsearch.errors`. Files are written completely or not at all.
    """
    options, loaded = _with_prompts(options or SearchOptions(), prompts), _as_loaded(model, tokenizer)
    folder, budget = Path(out) if out is not None else results_folder(loaded.name), Budget(options.time_budget)
    check_crew(options.workers, loaded)
    made = not folder.exists()
    open_folder(folder)
    try:
        if options.storage or (folder / STUDY).exists():
            url = options.storage or storage_url(folder)
            with storage_faults(url):
                check_study(url, options.study, early_identity(loaded, options))
        prepared = prepare(loaded, folder, options, progress, budget)
    except SkipsearchError:
        with suppress(OSError):
            if made:
                folder.rmdir()  # if nothing was written to it
        raise
    with storage_faults(options.storage or storage_url(folder)):
        return _search(loaded, prepared, folder, options, progress, report, budget)


def _search(
    loaded: Loaded, prepared: Prepared, folder: Path, options: SearchOptions, progress: Progress,
    report: Callable[[int, float], None], budget: Budget,
) -> SearchResult:  # fmt: skip
    """Search, validate and export what was prepared."""
    study = search_trials(loaded, prepared, folder, options, progress, report, budget)
    study.export_csv(folder / "trials.csv")
    write_json(folder / "front.json", {"front": study.front()})
    with budget.stage("finalists"):
        predicted, trial, error = rescore(prepared, study, progress, budget.share(FINALISTS))
    with budget.stage("validate"):
        measured, policies = validated(prepared, predicted, options, progress, folder, budget.share(1.0))
    provenance = Provenance(
        torch=torch.__version__, transformers=transformers.__version__, study=options.study, trial=trial,
        seed=options.seed,
    )  # fmt: skip
    name = loaded.preset.model_id if loaded.preset else loaded.name
    file = mask_file(prepared, predicted, measured, policies, model_card(prepared.target, name), provenance)
    file.save(folder / "mask.json")
    result = SearchResult(
        plan=predicted.plan, file=file, predicted=predicted, standard_error=error, folder=folder, measured=measured,
        scored_tokens=prepared.trace.tokens, front=study.front(), trials=len(study.finished()), seconds=budget.spent,
        cut_short=cut_short(prepared, len(study.finished()), study.used_up, options, measured), used_up=study.used_up,
        given=str((loaded.given or {}).get("model", "MODEL")),
        chat=options.source.chat and bool(loaded.tokenizer.chat_template), origin=study.origin(trial),
    )  # fmt: skip
    publish(result, study, loaded.tokenizer, prepared.prompts.held_out)
    return result


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
    name = Weights(source=model.config._name_or_path or "model").short
    return Loaded(name=name, model=model, tokenizer=tokenizer, preset=None)


def search_trials(
    loaded: Loaded, prepared: Prepared, folder: Path, options: SearchOptions, progress: Progress,
    report: Callable[[int, float], None] = lambda done, best: None, budget: Budget | None = None,
) -> Study:  # fmt: skip
    """Open or resume the study, enqueue the seeds, and run trials."""
    budget, url = budget or Budget(), options.storage or storage_url(folder)
    study = Study(
        url, options.study, prepared.space, prepared.identity, options.sampler, options.seed, options.pareto
    )  # fmt: skip
    # All trials of a study are scored with the same costs: those of the worker that created it.
    prepared = replace(prepared, costs=Costs.of(study.shared("costs", asdict(prepared.costs))), space=study.space)
    if len(study.finished()) < options.trials:
        with budget.stage("seeds"):
            seeds = _seeds(loaded, prepared, folder, options, progress, budget)
            study.enqueue(seeds)
        with budget.stage("trials"):
            seconds = budget.share(TRIALS)
            share = study.known("share")
            if share is None:
                share = study.shared("share", affordable_share(prepared.windows, _dearest(prepared.space), seconds))
            study.store("job", Job.of(prepared, seeds, options).to_dict())
            study.replace("trials", options.trials)
            scorer = Scorer(prepared.windows, prepared.point, options.pareto, share, study.stages())
            begin, before = time.monotonic(), len(study.finished())

            def told(done: int, best: float) -> None:
                report(done, best)
                pace = (time.monotonic() - begin) / max(1, done - before)
                within = done + max(0.0, begin + seconds - time.monotonic()) / pace  # what the budget suffices for
                progress("trials", done, round(min(options.trials, within)))

            with crew(options.workers, loaded, url, options.study, folder):
                study.optimize(scorer, trials=options.trials, time_budget=seconds, report=told)
    if not study.best(1):
        raise SkipsearchError("no trial has finished within the time budget; raise --time-budget")
    return study


def _dearest(space: Space) -> DraftPlan:
    """A plan that takes longest to score: it changes the first layer, so that nothing is resumed, and all run."""
    quantised = space.quantised
    first = SkipMask(attention=[0], num_layers=space.num_layers)
    return DraftPlan.everywhere(quantised[0], space.num_layers) if quantised else DraftPlan(first)


def _seeds(
    loaded: Loaded, prepared: Prepared, folder: Path, options: SearchOptions, progress: Progress, budget: Budget
) -> list[Seed]:
    """The study's seeds; the fewer tokens, the less time is left for them."""
    windows, space = prepared.windows, prepared.space

    def choose() -> Part:
        few, layers = windows.few(SEED_PROMPTS, options.trial_tokens), space.num_layers
        for _ in range(2):  # the first pass of a shape is slower
            begin = time.monotonic()
            WindowReplay(windows, SkipMask(mlp=[layers // 2], num_layers=layers)).outcomes(few)
        passes = len(space.free) * ("skip" in space.choices) + 2 * TOGETHER * len(space.quantised)
        share = budget.share(SEEDS) / ((time.monotonic() - begin) * max(1, passes))
        return few if share >= 1 else windows.few(max(2, round(SEED_PROMPTS * share)), options.trial_tokens)

    identity = hashlib.sha256(repr(sorted(prepared.identity.items())).encode()).hexdigest()
    loss, few = sensitivity_or_load(folder / "sensitivity.json", identity, windows, choose, space, progress)
    if windows.replay.together:
        states = draft_states(windows.replay, max(windows.replay.passes(windows.starts(few)), key=len))
    else:  # a pass is one draft, which says little
        part = prepared.trace.head(SEED_PROMPTS, options.trial_tokens)
        states = layer_states(prepared.target, *part.padded(prepared.target.device))
    return all_seeds(space, loss, states, prepared.point, loaded.preset, _earlier_plan(loaded, folder))


def _earlier_plan(loaded: Loaded, folder: Path) -> DraftPlan | None:
    """The plan of an earlier run in this folder, if it belongs to this model."""
    try:
        file = load_mask(folder / "mask.json")
        check_mask_belongs(file, loaded.target)
    except MaskError:
        return None
    return file.drafting_plan


def rescore(
    prepared: Prepared, study: Study, progress: Progress, seconds: float = math.inf
) -> tuple[Score, int, float]:
    """The best of the study's six best plans with the best policy: its exact score, its trial, its standard error.

    All policies are compared on windows of the whole trace; then the best is replayed block by block.

    Args:
        seconds: fewer plans are compared once half of them are spent.
    """
    windows, point, finalists = prepared.windows, prepared.point, study.best(6)
    scored, begin = [], time.monotonic()
    for number, (plan, trial) in enumerate(finalists):
        if number and time.monotonic() - begin > seconds / 2:
            break
        scored.append((best_policy(WindowReplay(windows, plan).outcomes(), plan, point), trial))
        progress("finalists", number + 1, len(finalists) + 1)
    best, trial = max(scored, key=lambda pair: pair[0].tokens_per_second)
    drafts = DraftReplay(windows.replay.with_length(best.policy.max_length), best.plan)
    exact = score_policy(drafts, best.policy, point)
    progress("finalists", len(finalists) + 1, len(finalists) + 1)
    return exact, trial, standard_error(drafts, best.policy, point)
