"""What a run proves and exports: the best mask; or n-grams without a mask, where no mask pays and they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from skipsearch.compiled.backend import Progress, warm_plan
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.validate import MASK, NGRAMS, SERVED, Measured, Plans, Validation, evidence
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard, Provenance
from skipsearch.policy import NGRAM, DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import Prepared

HOPELESS = 0.9  # predicted speed-up below which a mask is not also timed together with n-grams


def validated(
    prepared: Prepared, found: Score, options: SearchOptions, progress: Progress, folder: Path, seconds: float
) -> tuple[Measured, Mapping[str, DraftPolicy]]:
    """Time the mask alone, with n-grams and fallback, and n-grams without it.

    Args:
        seconds: the most that timing may take.

    Returns:
        what was measured, and the policy of each arm.
    """
    warm_plan(prepared.target, found.mask, progress)
    point = prepared.point
    step = draft_step(point, found.mask, found.policy.uses_confidence)
    costs = tuple(round(value, 7) for value in (step, *point.verify))
    plans: Plans = {
        MASK: (found.mask, found.policy),
        NGRAMS: (None, DraftPolicy.ngrams_alone((costs[1], *costs[1:]))),
    }
    if found.speedup >= HOPELESS:
        plans[SERVED] = (found.mask, replace(found.policy, ngram=NGRAM, never_slower=True, costs=costs))
    validation = Validation(
        prepared.target,
        prepared.prompts.held_out,
        plans,
        options.decoding,
        folder / "validation.json",
        f"{prepared.identity['model']} {prepared.identity['weights']}",
    )
    return validation.run(progress, seconds), {name: policy for name, (_, policy) in plans.items()}


def mask_file(
    prepared: Prepared, found: Score, measured: Measured, policies: Mapping[str, DraftPolicy], model: ModelCard,
    provenance: Provenance,
) -> MaskFile:  # fmt: skip
    """The mask as it is served best; n-grams alone if they pay and the mask by itself does not."""
    arms, temperature = measured.arms, prepared.trace.temperature
    served = arms.get(SERVED)
    if not arms[MASK].pays and (arms[NGRAMS].pays or not found.mask):
        return MaskFile.of(
            SkipMask(num_layers=found.mask.num_layers), model=model, draft=policies[NGRAMS],
            evidence=evidence(prepared.target, prepared.prompts.held_out, measured, 0.0, temperature, NGRAMS),
            provenance=provenance,
        )  # fmt: skip
    policy = policies.get(SERVED, replace(found.policy, never_slower=True))
    if served is None or served.speedup <= arms[MASK].speedup:
        policy = replace(policy, ngram=0)
    return MaskFile.of(
        found.mask, model=model, draft=policy, provenance=provenance,
        evidence=evidence(prepared.target, prepared.prompts.held_out, measured, found.cost_ratio, temperature),
    )  # fmt: skip
