"""The main job: record, profile, search, validate, export; each stage reads files and writes files.

Running it again with the same settings continues where it stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.errors import ModelLoadError, PromptError, ResultsError, SkipsearchError
from skipsearch.files import write_json
from skipsearch.mask import SkipMask
from skipsearch.maskfile import Draft, MaskFile, Provenance
from skipsearch.model.load import Loaded, model_card
from skipsearch.model.sublayers import find_sublayers
from skipsearch.search.cost import Costs, profile_or_load, set_up
from skipsearch.search.objective import Score, score
from skipsearch.search.prompts import Prompts, PromptSource, fingerprint, load_prompts
from skipsearch.search.replay import Replay
from skipsearch.search.seeds import by_sensitivity, published, single_skip_loss, uniform
from skipsearch.search.space import Space
from skipsearch.search.study import SAMPLERS, Study, storage_url
from skipsearch.search.trace import Progress, Trace, record_or_load
from skipsearch.search.validate import Measured, evidence, measure

MAX_LENGTH = 12  # the longest draft that a policy may have


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Settings of a run; the defaults give a good mask.

    Attributes:
        trials: finished trials that the study shall hold.
        time_budget: seconds for trials, None without limit.
        sampler: gp, tpe or random.
        source: where prompts come from.
        prompts, held_out: how many to search with and to validate on.
        prompt_tokens: cut prompts to so many tokens.
        new_tokens: decoded from each prompt.
        trial_prompts, trial_tokens: the part of the trace that a trial is scored on; the best are
            scored again on all of it.
        rounds: repetitions of validation.
        storage: Optuna URL; by default study.db in the results folder.
    """

    trials: int = 150
    time_budget: float | None = None
    sampler: str = "gp"
    source: PromptSource = field(default_factory=PromptSource)
    prompts: int = 24
    held_out: int = 16
    prompt_tokens: int | None = None
    new_tokens: int = 128
    trial_prompts: int = 16
    trial_tokens: int = 64
    rounds: int = 3
    seed: int = 0
    storage: str | None = None
    study: str = "search"

    def __post_init__(self) -> None:
        for name in ("trials", "prompts", "held_out", "new_tokens", "trial_prompts", "trial_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise SkipsearchError(
                    f"{name} is {getattr(self, name)}, must be at least 1; leave it out for the default"
                )
        if self.sampler not in SAMPLERS:
            raise SkipsearchError(f"sampler is {self.sampler!r}, must be one of {', '.join(SAMPLERS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a run found.

    Attributes:
        mask: the best mask, None if no mask is predicted to beat plain decoding.
        file: mask.json as written, with evidence and verdict.
        predicted: its score on the whole trace.
        measured: its validation.
        folder: where everything lies.
        trials: finished trials in the study.
        seconds: wall-clock time by stage.
    """

    mask: SkipMask
    file: MaskFile
    predicted: Score
    measured: Measured
    folder: Path
    trials: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that scoring needs, made or read back: prompts, trace, costs."""

    prompts: Prompts
    trace: Trace
    costs: Costs
    identity: dict[str, str]


def prepare(loaded: Loaded, folder: Path, options: SearchOptions, progress: Progress) -> Prepared:
    """Prompts, record and profile."""
    model = loaded.model
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    room = context - options.new_tokens - MAX_LENGTH
    if room < 1:
        raise PromptError(
            f"new_tokens is {options.new_tokens}, at most {context - MAX_LENGTH - 1} fit the model's context of "
            f"{context}; pass a smaller --new-tokens"
        )
    prompts = load_prompts(
        options.source, loaded.tokenizer, calibration=options.prompts, held_out=options.held_out,
        max_tokens=options.prompt_tokens, room=room, seed=options.seed,
    )  # fmt: skip
    # Weights, not only the config: a fine-tuned model must not continue the study of its base.
    identity = {
        "model": str(model_card(model, loaded.name).config_sha256),
        "weights": _weights_fingerprint(model),
        "set_up": set_up(model),
        "prompts": fingerprint(prompts.calibration),
        "space": repr(Space.of(find_sublayers(model).num_layers, loaded.preset)),
        "tokens": f"{options.new_tokens} recorded, {options.trial_prompts} x {options.trial_tokens} a trial",
    }
    made_with = f"{identity['model']} {identity['weights']} {identity['set_up']}"
    trace = record_or_load(folder / "trace.json", model, prompts.calibration, options.new_tokens, made_with, progress)
    if not trace.tokens:
        raise PromptError("the model ends every calibration prompt at once; choose other prompts with --prompts")
    mean = trace.mean_context
    longest = max(map(len, prompts.calibration)) + options.new_tokens
    contexts = sorted(
        {max(8, round(mean / 2)), round(mean), max(round(mean) + 1, min(longest, context - MAX_LENGTH - 4))}
    )
    costs = profile_or_load(
        folder / "costs.json", model, made_with, contexts=contexts, max_length=MAX_LENGTH, progress=progress
    )
    return Prepared(prompts=prompts, trace=trace, costs=costs, identity=identity)


def _weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash over a sample of every parameter: cheap for any size, different after any training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def search_trials(
    loaded: Loaded, prepared: Prepared, folder: Path, options: SearchOptions, progress: Progress,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> Study:  # fmt: skip
    """Open or resume the study, put the seeds in, and run trials."""
    model = loaded.model
    space = Space.of(find_sublayers(model).num_layers, loaded.preset)
    url = options.storage or storage_url(folder)
    study = Study(url, options.study, space, prepared.identity, options.sampler, options.seed)
    part = prepared.trace.head(options.trial_prompts, options.trial_tokens)
    point = prepared.costs.at(part.mean_context)
    if len(study.finished()) < options.trials:
        loss = single_skip_loss(model, part.head(8, options.trial_tokens), space, progress)
        empty = ("empty", SkipMask(num_layers=space.num_layers))
        study.enqueue([empty, *published(loaded.preset, space), *by_sensitivity(space, loss, point), *uniform(space)])
        replay = Replay(model, part, MAX_LENGTH)
        study.optimize(
            lambda mask: score(replay, mask, point), trials=options.trials, time_budget=options.time_budget,
            report=report,
        )  # fmt: skip
    if not study.best(1):
        raise SkipsearchError("no trial has finished within the time budget; raise --time-budget")
    return study


def search(
    model: PreTrainedModel | Loaded,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: str | Path | None = None,
    options: SearchOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> SearchResult:
    """Find a mask, prove it on held-out prompts, and export it: the library form of `skipsearch run`.

    Args:
        model: a causal LM, or what `load_model` returned.
        tokenizer: needed with a bare model.
        out: results folder, by default results/<model name>.
        progress: told (stage, done, total).
        report: told (finished trials, best predicted tokens per second).

    Raises:
        SkipsearchError: see `skipsearch.errors`; nothing half-written is left behind.
    """
    options = options or SearchOptions()
    if isinstance(model, Loaded):
        loaded = model
    else:
        if tokenizer is None:
            raise ModelLoadError("tokenizer is None, a bare model needs one; pass it as the second argument")
        loaded = Loaded(name=model.config._name_or_path or "model", model=model, tokenizer=tokenizer, preset=None)
    folder = Path(out) if out is not None else Path("results") / loaded.name
    _check_writable(folder)
    seconds: dict[str, float] = {}
    begin = time.monotonic()
    prepared = prepare(loaded, folder, options, progress)
    seconds["prepare"] = time.monotonic() - begin
    begin = time.monotonic()
    study = search_trials(loaded, prepared, folder, options, progress, report)
    study.export_csv(folder / "trials.csv")
    predicted, trial = rescore(loaded.model, prepared, study, progress)
    seconds["search"] = time.monotonic() - begin
    begin = time.monotonic()
    measured = measure(
        loaded.model, prepared.prompts.held_out, predicted.mask, predicted.policy, new_tokens=options.new_tokens,
        rounds=options.rounds, seed=options.seed, progress=progress,
    )  # fmt: skip
    file = MaskFile.of(
        predicted.mask,
        model=model_card(loaded.model, loaded.preset.model_id if loaded.preset else loaded.name),
        draft=Draft(max_length=predicted.policy.max_length, exit_threshold=predicted.policy.exit_threshold),
        evidence=evidence(loaded.model, prepared.prompts.held_out, measured, predicted.cost_ratio),
        provenance=Provenance(
            torch=torch.__version__, transformers=transformers.__version__, study=options.study, trial=trial,
            seed=options.seed,
        ),
    )  # fmt: skip
    file.save(folder / "mask.json")
    seconds["validate"] = time.monotonic() - begin
    result = SearchResult(
        mask=predicted.mask, file=file, predicted=predicted, measured=measured, folder=folder,
        trials=len(study.finished()), seconds=seconds,
    )  # fmt: skip
    write_json(folder / "summary.json", summary(result))
    return result


def rescore(model: PreTrainedModel, prepared: Prepared, study: Study, progress: Progress) -> tuple[Score, int]:
    """The best of the finalists on the whole trace, and its trial number."""
    replay = Replay(model, prepared.trace, MAX_LENGTH)
    point = prepared.costs.at(prepared.trace.mean_context)
    finalists = study.best(6)
    scored = []
    for number, (mask, _, trial) in enumerate(finalists):
        scored.append((score(replay, mask, point), trial))
        progress("finalists", number + 1, len(finalists))
    return max(scored, key=lambda pair: pair[0].tokens_per_second)


def summary(result: SearchResult) -> dict[str, object]:
    """The result as plain JSON: what the CLI prints and what the results folder keeps."""
    proof = result.file.evidence
    assert proof is not None
    return {
        "model": result.file.model.id, "mask": result.mask.to_dict(), "draft": result.file.draft.model_dump(),
        "evidence": proof.model_dump(mode="json"),
        "predicted": {
            k: round(getattr(result.predicted, k), 4)
            for k in ("tokens_per_second", "speedup", "acceptance_rate", "tau", "cost_ratio")
        },
        "trials": result.trials, "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "files": {name: str(result.folder / name) for name in ("mask.json", "trials.csv")},
    }  # fmt: skip


def validate_file(loaded: Loaded, file: MaskFile, options: SearchOptions, progress: Progress) -> MaskFile:
    """Time a mask file again on held-out prompts; returns it with fresh evidence."""
    context = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    prompts = load_prompts(
        options.source, loaded.tokenizer, calibration=options.prompts, held_out=options.held_out,
        max_tokens=options.prompt_tokens, room=context - options.new_tokens - MAX_LENGTH, seed=options.seed,
    ).held_out  # fmt: skip
    from skipsearch.decoding.generate import self_speculative

    policy = self_speculative(file).policy
    measured = measure(
        loaded.model, prompts, file.mask, policy, new_tokens=options.new_tokens, rounds=options.rounds,
        seed=options.seed, progress=progress,
    )  # fmt: skip
    known = file.evidence.cost_ratio if file.evidence else 0.0
    return file.model_copy(update={"evidence": evidence(loaded.model, prompts, measured, known)})


def _check_writable(folder: Path) -> None:
    """Find out before the work, not after it.

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
