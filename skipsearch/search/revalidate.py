"""Measure a mask file again, on held-out prompts and on this machine."""

from __future__ import annotations

from skipsearch.compiled.backend import Progress, warm_plan, with_backend
from skipsearch.decoding.rule import SelectionRule
from skipsearch.evaluate.audit import Audit, audit
from skipsearch.evaluate.clock import step_costs
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.validate import NGRAMS, SERVED, Plans, Validation, arm_of, evidence
from skipsearch.maskfile import MaskFile
from skipsearch.model.load import Loaded
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts


def validate_file(loaded: Loaded, file: MaskFile, options: SearchOptions, progress: Progress) -> MaskFile:
    """Time a mask file again, and return the file with the new evidence."""
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out
    target = with_backend(loaded.target, options.backend, progress)
    policy, plan = file.draft, file.drafting_plan
    plans: Plans = {NGRAMS: (None, policy)}
    if plan is not None:
        warm_plan(target, plan, progress)
        plans = {arm_of(plan): (plan, policy.mask_alone())}
        if policy.ngram or policy.never_slower:
            plans[SERVED] = (plan, policy)
    rule = SelectionRule.of(target.model, options.temperature)
    measured = Validation(target, prompts, plans, options.decoding(rule)).run(progress)
    context = round(_mean_context(prompts, options.new_tokens))
    step, plain = (0.0, 1.0) if plan is None else step_costs(target, plan, context)
    arm = NGRAMS if plan is None else arm_of(plan)
    proof = evidence(target, prompts, measured, step / plain, arm, rule)
    return file.model_copy(update={"evidence": proof})


def _mean_context(prompts: tuple[Ids, ...], new_tokens: int) -> float:
    """Mean number of tokens that a step attends to."""
    return sum(len(prompt) + new_tokens / 2 for prompt in prompts) / len(prompts)


def audit_file(loaded: Loaded, file: MaskFile, options: SearchOptions, progress: Progress) -> Audit:
    """Compare a mask file's output with plain decoding, and explain each difference."""
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out
    return audit(
        loaded.target, prompts, file.drafting_plan, file.draft, new_tokens=options.new_tokens, progress=progress,
        rule=SelectionRule.of(loaded.model, 0.0),
    )  # fmt: skip
