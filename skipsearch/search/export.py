"""What a run proves and exports: the best plan; or n-grams without one, where no plan pays and they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from skipsearch.compiled.backend import Progress, warm_plan
from skipsearch.draft.copies import copies_bytes
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.validate import NGRAMS, SERVED, Measured, Plans, Validation, arm_of, evidence
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard, Provenance
from skipsearch.policy import NGRAM, DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import Prepared

HOPELESS = 0.9  # predicted speed-up below which a plan is not also timed together with n-grams


def validated(
    prepared: Prepared, found: Score, options: SearchOptions, progress: Progress, folder: Path, seconds: float
) -> tuple[Measured, Mapping[str, DraftPolicy]]:
    """Time the plan alone, with n-grams and fallback, and n-grams without it.

    Args:
        seconds: the most that timing may take.

    Returns:
        what was measured, and the policy of each arm.
    """
    warm_plan(prepared.target, found.plan, progress)
    point = prepared.point
    step = draft_step(point, found.plan, found.policy.uses_confidence)
    costs = tuple(round(value, 7) for value in (step, *point.verify))
    plans: Plans = {
        arm_of(found.plan): (found.plan, found.policy),
        NGRAMS: (None, DraftPolicy.ngrams_alone((costs[1], *costs[1:]))),
    }
    if found.speedup >= HOPELESS:
        plans[SERVED] = (found.plan, replace(found.policy, ngram=NGRAM, never_slower=True, costs=costs))
    validation = Validation(
        prepared.target,
        prepared.prompts.held_out,
        plans,
        options.decoding(prepared.trace.rule),
        folder / "validation.json",
        f"{prepared.identity['model']} {prepared.identity['weights']}",
    )
    return validation.run(progress, seconds), {name: policy for name, (_, policy) in plans.items()}


def mask_file(
    prepared: Prepared, found: Score, measured: Measured, policies: Mapping[str, DraftPolicy], model: ModelCard,
    provenance: Provenance,
) -> MaskFile:  # fmt: skip
    """The plan as it is served best; n-grams alone if they pay and the plan by itself does not."""
    arms, rule, alone = measured.arms, prepared.trace.rule, arm_of(found.plan)
    served = arms.get(SERVED)
    if not arms[alone].pays and (arms[NGRAMS].pays or not found.plan.drafts):
        return MaskFile.of(
            SkipMask(num_layers=found.plan.num_layers), model=model, draft=policies[NGRAMS],
            evidence=evidence(prepared.target, prepared.prompts.held_out, measured, 0.0, NGRAMS, rule),
            provenance=provenance,
        )  # fmt: skip
    policy = policies.get(SERVED, replace(found.policy, never_slower=True))
    if served is None or served.speedup <= arms[alone].speedup:
        policy = replace(policy, ngram=0)
    return MaskFile.of(
        found.plan, model=model, draft=policy, provenance=provenance,
        evidence=evidence(prepared.target, prepared.prompts.held_out, measured, found.cost_ratio, alone, rule),
        quantised_bytes=round(copies_bytes(prepared.target.model, found.plan)) if found.plan.quantises else None,
    )  # fmt: skip
