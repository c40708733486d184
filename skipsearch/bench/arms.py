"""The arms of a benchmark: decoding methods of transformers and ours, each a function from a prompt to a run."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

from skipsearch.decoding.rule import GREEDY, ONE_TEXT, SelectionRule
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.copies import possible_forms
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.timing import Arm, Run, our_arm
from skipsearch.evaluate.validate import arm_of
from skipsearch.mask import SkipMask
from skipsearch.model.cache import CACHE
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import NGRAM, DraftPolicy

HF_EAGER, HF_STATIC = "HF eager", "HF static compiled"
HF_LOOKUP, HF_ASSISTED = "HF prompt lookup", "HF assisted by view"
EAGER, PLAIN, AGAIN, MASK = "plain eager", "plain", "plain again (A/A)", "mask"
LOOKUP, HYBRID, PREFIX, PLAN, ALL_INT8 = "n-gram", "hybrid", "prefix exit", "plan", "all int8"
RIVALS = (HF_STATIC, HF_LOOKUP, HF_ASSISTED)  # methods of transformers beside its plain one
NEED_MASK = (HF_ASSISTED, MASK, PLAN, HYBRID, PREFIX)
OF_PLANS = (MASK, PLAN, PREFIX, ALL_INT8)  # arms of which some plans, or some models, have none
NAMES = (
    HF_EAGER, HF_STATIC, HF_LOOKUP, HF_ASSISTED, EAGER, PLAIN, AGAIN, LOOKUP, ALL_INT8, MASK, PLAN, HYBRID, PREFIX,
)  # fmt: skip


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Records when the first token, or the first block, is committed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at, self.length = device, 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.at:
            synchronize(self.device)
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def hf_arm(
    target: Target, fresh: Callable[[], dict[str, Any]] = dict, rule: SelectionRule = GREEDY, **options: Any
) -> Arm:
    """An arm that calls `model.generate`. Tokens that come with the prefill are not counted.

    Args:
        fresh: makes further options anew for each prompt.
        rule: of the model, so that only its temperature is passed.
        options: passed to `generate`.
    """
    device = target.device
    options |= {"do_sample": True, "temperature": rule.temperature} if rule.temperature else {"do_sample": False}

    def run(prompt: Ids, new_tokens: int) -> Run:
        ids = target.ids(prompt)
        clock = _Clock(device)
        given = {**options, **fresh()}
        synchronize(device)
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **ONE_TEXT,
                stopping_criteria=StoppingCriteriaList([clock]), **given,
            )  # fmt: skip
        synchronize(device)
        end = time.perf_counter()
        new = out[0, len(prompt) :].tolist()
        ended = [i for i, token in enumerate(new) if token in target.eos_ids]
        new = new[: ended[0] + 1] if ended else new
        counted = max(0, len(new) - (clock.length - len(prompt)))
        return Run(
            seconds=end - clock.at, tokens=counted, prefill=clock.at - begin, ids=tuple(new), stats=DecodeStats()
        )

    return run


def hf_static(target: Target, longest: int, rule: SelectionRule = GREEDY) -> Arm:
    """`generate` with a static cache and transformers' own compilation; the cache is reset for each prompt."""
    cache = StaticCache(config=target.model.config, max_cache_len=longest)
    settings = CompileConfig(mode="reduce-overhead" if target.device.type == "cuda" else "default")
    settings._compile_all_devices = True

    def emptied() -> dict[str, Any]:
        cache.reset()
        return {CACHE: cache}

    return hf_arm(target, emptied, rule, compile_config=settings)


def prefix_mask(mask: SkipMask) -> SkipMask:
    """The early exit of LayerSkip: it runs as many sublayers as the mask, but as whole layers from the front."""
    left = 2 * mask.num_layers - len(mask.attention) - len(mask.mlp)
    behind = range(max(1, round(left / 2)), mask.num_layers)
    return SkipMask(attention=behind, mlp=behind, num_layers=mask.num_layers)


def drafted_by(target: Target, plan: DraftPlan | None) -> dict[str, DraftPlan]:
    """The plan of each arm that drafts with one of its own or with the one given."""
    found = {}
    if possible_forms(target.model)["int8"] is None:
        found[ALL_INT8] = DraftPlan.everywhere("int8", target.num_layers)
    if plan is not None:
        found |= {arm_of(plan): plan, HYBRID: plan}
    if plan is not None and plan.only_skips:
        found[PREFIX] = DraftPlan(prefix_mask(plan.skip))
    return found


def arms(
    target: Target, plan: DraftPlan | None, policy: DraftPolicy, longest: int, hf: bool = True,
    rule: SelectionRule = GREEDY,
) -> dict[str, Arm]:  # fmt: skip
    """All arms by name.

    Args:
        plan, policy: for the arms that draft with a plan; None leaves them out. One that quantises is no mask.
        longest: tokens of the longest sequence.
        hf: whether to measure the methods of transformers too.
        rule: how tokens are chosen.
    """
    ours = partial(our_arm, rule=rule)
    found: dict[str, Arm] = {}
    if hf:
        found[HF_EAGER] = hf_arm(target, rule=rule)
        if target.compiled is not None:
            found[HF_STATIC] = hf_static(target, longest, rule)
        found[HF_LOOKUP] = hf_arm(target, rule=rule, prompt_lookup_num_tokens=NGRAM)
        if plan is not None:
            found[HF_ASSISTED] = hf_arm(target, rule=rule, assistant_model=draft_view(target.model, plan))
    if target.compiled is not None:
        found[EAGER] = ours(dataclasses.replace(target, compiled=None))
    found |= {PLAIN: ours(target), AGAIN: ours(target)}
    lookup = DraftPolicy.ngrams_alone(policy.costs)
    found[LOOKUP] = ours(target, None, lookup)
    served = dataclasses.replace(policy, ngram=policy.ngram or NGRAM, never_slower=True)
    policies = {
        ALL_INT8: DraftPolicy(), MASK: policy.mask_alone(), PLAN: policy.mask_alone(), HYBRID: served,
        PREFIX: DraftPolicy(max_length=4, exit_threshold=0.5),
    }  # fmt: skip
    return found | {name: ours(target, of, policies[name]) for name, of in drafted_by(target, plan).items()}
