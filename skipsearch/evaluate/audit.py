"""Audit: does rounding alone explain where half-precision output differs from plain decoding?

Verifying several tokens at once runs other kernels than one token at a time; in bf16 and fp16 the two round
differently, and a near-tie may fall the other way. Whatever is not a near-tie is a fault. Each first divergence
is therefore replayed in fp32: the prefix through a full-precision copy of the model, without cache or draft.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.processors import process
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.timing import OurArm
from skipsearch.mask import SkipMask
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy

# With logits off by r, two tokens may change places if they lie within 2 r; r is measured in a pass of other
# shapes than either run's, so twice that is allowed.
SPAN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first place where a prompt's output differs from plain decoding.

    Attributes:
        prompt, position: which prompt, and which new token of it.
        plain, drafted: the tokens that plain and speculative decoding chose.
        margin: fp32 logit of the best token less that of the worse one of the two.
        rounding: the largest error of the model's logits against fp32 over this prefix, in one pass without cache.
        explained: whether margin <= 4 * rounding.
    """

    prompt: int
    position: int
    plain: int
    drafted: int
    margin: float
    rounding: float
    explained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found over all prompts."""

    prompts: int
    tokens: int
    divergences: tuple[Divergence, ...]

    @property
    def passed(self) -> bool:
        return all(d.explained for d in self.divergences)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts, "tokens": self.tokens, "passed": self.passed,
            "divergences": [asdict(d) for d in self.divergences],
        }  # fmt: skip


def audit(
    target: Target, prompts: tuple[Ids, ...], plan: SkipMask | DraftPlan | None, policy: DraftPolicy, *,
    new_tokens: int, progress: Progress, rule: SelectionRule = GREEDY,
) -> Audit:  # fmt: skip
    """Decode every prompt plainly and with the plan, and explain each difference.

    Holds a full-precision copy of the model while it explains one.
    """
    target = replace(target, compiled=None)
    draft = None if plan is None else draft_view(target.model, plan)
    exact: PreTrainedModel | None = None
    found, tokens = [], 0
    for number, prompt in enumerate(prompts):
        # Each prompt has arms of its own: what is drafted must not depend on the prompts before it.
        plain = OurArm(target=target, rule=rule)(prompt, new_tokens).ids
        drafted = OurArm(target=target, draft=draft, policy=policy, rule=rule)(prompt, new_tokens).ids
        tokens += len(drafted)
        if plain != drafted:
            exact = exact or copy.deepcopy(target.model).float()
            found.append(_explain(target, exact, rule, number, prompt, plain, drafted))
        progress("audit", number + 1, len(prompts))
    return Audit(prompts=len(prompts), tokens=tokens, divergences=tuple(found))


@torch.no_grad()
def _explain(
    target: Target, exact: PreTrainedModel, rule: SelectionRule, number: int, prompt: Ids, plain: Ids, drafted: Ids
) -> Divergence:
    pairs = list(zip(plain, drafted, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if at == len(pairs):  # one is a prefix of the other: rounding cannot shorten a text
        return Divergence(prompt=number, position=at, plain=-1, drafted=-1, margin=float("inf"), rounding=0.0,
                          explained=False)  # fmt: skip
    ids = target.ids(prompt + plain[:at])
    wanted = exact(input_ids=ids, use_cache=False).logits[0].float()
    rounding = float((target.model(input_ids=ids, use_cache=False).logits[0].float() - wanted).abs().max())
    # fp32 rounds too: about one part in 2 ** 20 after a few hundred additions.
    rounding = max(rounding, float(wanted.abs().max()) * 2**-20)
    chosen = rule.selection(target.model, target.ids(prompt), len(plain))
    last = process(chosen.processors, [0], ids, wanted[-1:])[0]
    margin = float(last.max() - min(last[plain[at]], last[drafted[at]]))
    return Divergence(
        prompt=number, position=at, plain=plain[at], drafted=drafted[at], margin=margin, rounding=rounding,
        explained=margin <= SPAN * rounding,
    )  # fmt: skip
