"""What scoring needs before the first trial: prompts, the trace, the costs, and the identity of all three."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.compiled.backend import Progress, warm_plan, with_backend
from skipsearch.decoding.rule import SelectionRule
from skipsearch.draft.copies import copies_bytes, possible_forms
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, PromptError, SkipsearchError
from skipsearch.evaluate.cost import Costs, Point, set_up
from skipsearch.evaluate.design import choose_design
from skipsearch.evaluate.form_speed import form_seconds, paying_forms
from skipsearch.evaluate.frequency import frequency, head_sizes
from skipsearch.evaluate.profile import profile_or_load
from skipsearch.evaluate.prompts import Prompts, fingerprint, lengthened, load_prompts
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace, record_or_load
from skipsearch.evaluate.windows import Windows
from skipsearch.files import read_checked
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.device import free_memory
from skipsearch.model.identity import model_card, weights_fingerprint
from skipsearch.model.load import Loaded
from skipsearch.model.preset import read_space
from skipsearch.model.space import Space, ordered
from skipsearch.model.target import Target
from skipsearch.plan import QUANTISED, DraftPlan, Form, HeadForm, Quantised
from skipsearch.search.budget import Budget
from skipsearch.search.options import MAX_LENGTH, TRIAL_LENGTH, SearchOptions, drafts_side_by_side

STUDY = "study.db"  # in the results folder
RECORD, PROFILE = 0.2, 0.2  # shares of what is left of the budget
MOST_PROFILE = 60  # seconds
MEMORY = 0.4  # of the free memory, for the copies of one form
SLOW_VERIFY = 2.5  # plain steps that a verify of 5 tokens may take before a user is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that scoring needs, computed now or read from the results folder.

    Attributes:
        target: the model with the backend that will serve the mask.
        prompts, trace, costs, space, windows: see their classes.
        identity: everything that scores depend on, by name.
        contexts: context lengths that the mask will serve, in tokens; empty: those of the calibration prompts.
        copies: views that keep the quantised copies alive, so that each is made once.
    """

    target: Target
    prompts: Prompts
    trace: Trace
    costs: Costs
    space: Space
    windows: Windows
    identity: dict[str, str]
    contexts: tuple[int, ...] = ()
    copies: tuple[PreTrainedModel, ...] = ()

    @property
    def point(self) -> Point:
        """Mean costs over the context lengths that the mask will serve."""
        return self.costs.mean_over(self.contexts or (self.trace.mean_context,))


def chosen_prompts(target: Target, tokenizer: PreTrainedTokenizerBase, options: SearchOptions) -> Prompts:
    """The prompts of a run; held-out prompts are lengthened to `options.contexts`, if there are any.

    Raises:
        PromptError: no room in the model's context for prompts or for a context of the options; see `load_prompts`.
    """
    context = target.context
    room = context - options.new_tokens - MAX_LENGTH
    if room < 1:
        raise PromptError(
            f"new_tokens is {options.new_tokens}, at most {context - MAX_LENGTH - 1} fit the model's context of "
            f"{context}; pass a smaller --new-tokens"
        )
    most = _longest_profiled(target)
    for wanted in options.contexts:
        if not 1 <= wanted <= most:
            raise PromptError(f"context is {wanted}, must be in 1..{most} for this model; pass another --context")
    found = load_prompts(
        options.source, tokenizer, calibration=options.prompts, held_out=options.held_out,
        max_tokens=options.prompt_tokens, room=room, seed=options.seed,
    )  # fmt: skip
    if not options.contexts:
        return found
    # The search only needs the costs at longer contexts; validation decodes at them.
    return replace(found, held_out=lengthened(found.held_out, options.contexts, options.new_tokens, room))


def _longest_profiled(target: Target) -> int:
    """The longest context at which whole blocks can be timed."""
    return target.context - MAX_LENGTH - 4


def early_identity(loaded: Loaded, options: SearchOptions) -> dict[str, str]:
    """What a study depends on that is known before any work.

    Weights and not only the config: a fine-tuned model must not continue the study of its base model.
    """
    rule = SelectionRule.of(loaded.model, options.temperature)
    return {
        "model": str(model_card(loaded.target, loaded.name).config_sha256),
        "weights": weights_fingerprint(loaded.model),
        "tokens": f"{options.new_tokens} recorded",
        "context": ", ".join(map(str, options.contexts)) or "as the prompts",
        "temperature": str(rule) if rule.fields else str(rule.temperature),
    }


def prepare(
    loaded: Loaded, folder: Path, options: SearchOptions, progress: Progress, budget: Budget | None = None
) -> Prepared:
    """Choose prompts, record the trace and profile the model; trace and costs are kept in the results folder."""
    budget = budget or Budget()
    target, rule = loaded.target, SelectionRule.of(loaded.model, options.temperature)
    prompts = chosen_prompts(target, loaded.tokenizer, options)
    if options.space is not None:
        space = read_space(options.space, target.num_layers)
    elif loaded.preset is not None:
        space = loaded.preset.space
    else:
        space = Space(num_layers=target.num_layers, fixed=SkipMask(num_layers=target.num_layers))
    identity = early_identity(loaded, options)
    with budget.stage("compile", on_top=True):
        target = with_backend(target, options.backend, progress)  # slow, so the options are checked first
        made_with = f"{identity['model']} {identity['weights']} {set_up(target)}"
        forms = priced_forms(folder / "costs.json", made_with, space)
        forms = candidate_forms(target, space) if forms is None else forms
        # From here on quantised copies are kept, so that each is made once.
        copies = tuple(draft_view(target.model, DraftPlan.everywhere(form, target.num_layers)) for form in forms)
        _warm(target, forms, progress)
    identity |= {"set_up": set_up(target), "space": str(space)}
    with budget.stage("record"):  # workers that share a study must score on one trace, whatever time each has
        seconds = math.inf if options.storage else budget.share(RECORD)
        trace = record_or_load(
            folder / "trace.json", target, prompts.calibration, options.decoding(rule), made_with, progress,
            seconds=seconds, may_grow=not (folder / STUDY).exists(),
        )  # fmt: skip
    if max(map(len, trace.continuations)) < 2:  # the first token is the prefill's: there is nothing to draft
        raise PromptError("the model ends every calibration prompt at once; choose other prompts with --prompts")
    identity["prompts"] = fingerprint(trace.prompts)
    mean = trace.mean_context
    longest = max(map(len, trace.prompts)) + options.new_tokens
    contexts = {round(mean), max(round(mean) + 1, min(longest, _longest_profiled(target))), *options.contexts}
    with budget.stage("profile"):
        costs = profile_or_load(
            folder / "costs.json", target, made_with, contexts=sorted(contexts), max_length=MAX_LENGTH,
            progress=progress, rule=rule, seconds=min(MOST_PROFILE, budget.share(PROFILE)),
            forms=forms,
        )  # fmt: skip
    space = paying_space(space, costs.at(mean), forms)
    _warn_of_slow_verifies(target, costs)
    side = drafts_side_by_side(options.new_tokens)
    progress("reference", 0, 1)
    with budget.stage("reference"):
        replay = Replay(target, trace, TRIAL_LENGTH, memory=options.memory, side=side, states=True)
    progress("reference", 1, 1)
    if space.quantised and (sizes := head_sizes(target.vocabulary)):
        found = frequency(loaded.tokenizer, trace, target.vocabulary, replay.ids.shape[1])
        space, replay.ranks_PT = replace(space, tokens=found.tokens, sizes=sizes), found.ranks_PT.to(target.device)
    return Prepared(
        target=target, prompts=prompts, trace=trace, costs=costs, space=space, windows=Windows(replay),
        identity=identity, contexts=options.contexts, copies=copies,
    )  # fmt: skip


def _warm(target: Target, forms: Sequence[Quantised], progress: Progress) -> None:
    """Compile layers that lack one sublayer, which is all that masks need beside, and what a profile drafts."""
    every = range(target.num_layers)
    masks = [SkipMask.from_sublayers([(kind, i) for i in every], target.num_layers) for kind in KINDS]
    plans = [*map(DraftPlan, masks), *(choose_design(target, MAX_LENGTH, forms).plans if forms else ())]
    for number, plan in enumerate(plans):
        warm_plan(target, plan, lambda *_: None)
        progress("drafts", number + 1, len(plans))


def candidate_forms(target: Target, space: Space) -> list[Quantised]:
    """The quantised forms that a space asks for; or those that model and memory allow, and whose products pay here."""
    if space.forms is not None:  # what is asked for is tried, whatever it costs
        obstacles = possible_forms(target.model)
        found = [form for form in QUANTISED if form in space.forms and obstacles[form] is None]
        if not found and "skip" not in space.forms:
            why = next(why for form, why in obstacles.items() if form in space.forms)
            raise SkipsearchError(f"space.forms is {list(space.forms)}, none is possible here: {why}; add 'skip'")
        return found
    free, layers = free_memory(target.device), target.num_layers
    return [
        form for form in paying_forms(form_seconds(target))
        if copies_bytes(target.model, DraftPlan.everywhere(form, layers)) < MEMORY * free
    ]  # fmt: skip


def priced_forms(path: Path, made_with: str, space: Space) -> list[Quantised] | None:
    """The quantised forms that an earlier run in this folder has priced; None if there are no such costs."""
    found = read_checked(path, Costs.of)
    if found is None or not found.identity.startswith(made_with) or not found.points:
        return None
    return [form for form in QUANTISED if form in found.points[0].forms and form in (space.forms or QUANTISED)]


def paying_space(space: Space, point: Point, forms: Sequence[Quantised]) -> Space:
    """The space with the forms of sublayers and of the head that are measured to be cheaper than milder ones."""
    kept, heads, last = list[Form](), list[HeadForm](["full"]), _seconds(space, point, "run")
    head = point.rest
    for form in forms:
        if (seconds := _seconds(space, point, form)) < last or space.forms is not None:
            kept, last = [*kept, form], seconds
        if (rest := point.heads[form][-1][1]) < head:
            heads, head = [*heads, form], rest
    asked = space.forms is None or "skip" in space.forms
    forms_now = (*kept, *(("skip",) if asked or not kept else ()))
    return replace(space, forms=ordered(forms_now), heads=tuple(heads) if kept else ("full",))


def _seconds(space: Space, point: Point, form: Form) -> float:
    return sum(point.of(form, *sub) for sub in space.free)


def _warn_of_slow_verifies(target: Target, costs: Costs) -> None:
    """Some processors have no fast products of several rows in half precision."""
    verify = costs.points[0].verify
    if target.device.type == "cpu" and target.dtype != torch.float32 and verify[5] > SLOW_VERIFY * verify[0]:
        name = str(target.dtype).removeprefix("torch.")
        warnings.warn(
            f"verifying 5 tokens in {name} takes {verify[5] / verify[0]:.1f} plain steps on this processor; "
            f"--dtype float32 probably serves better here", BackendWarning, stacklevel=2,
        )  # fmt: skip
