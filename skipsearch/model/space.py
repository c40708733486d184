"""The search space: which plans a search may propose, and how a plan is written as parameters of a trial.

A parameter is a name with its lowest and highest whole number; Optuna is not needed here.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from skipsearch.errors import shown
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.plan import FORMS, QUANTISED, DraftPlan, Form, HeadForm, Quantised

Structure = Literal["sublayers", "layers", "spans"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The plans that a search may propose.

    Attributes:
        num_layers: decoder layers of the model.
        fixed: sublayers that always run.
        structure: "sublayers": one parameter for each free sublayer, the number of its form. "layers": one for each
            layer whose two sublayers are both free, for engines that only skip whole layers. "spans": `spans` runs of
            skipped whole layers, with two parameters each: first layer and length.
        spans: number of runs.
        max_skipped: the most sublayers that a plan may skip; None: no limit.
        forms: what a sublayer may do instead of running, in the order of `FORMS`; None: what pays on this machine.
        heads: forms of the head.
        tokens: those that a smaller head chooses from first.
        sizes: how many tokens a smaller head may choose from, falling; behind all of them, which is number 0.
    """

    num_layers: int
    fixed: SkipMask
    structure: Structure = "sublayers"
    spans: int = 1
    max_skipped: int | None = None
    forms: tuple[Form, ...] | None = None
    heads: tuple[HeadForm, ...] = ("full",)
    tokens: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        """In the words of a [space] table. A study stores it, and names it when another space is used later."""
        fixed = self.fixed
        words = [self.structure, f"fixed attention {sorted(fixed.attention)}", f"fixed mlp {sorted(fixed.mlp)}"]
        if self.structure == "spans":
            words.append(f"spans {self.spans}")
        if self.max_skipped is not None:
            words.append(f"max_skipped {self.max_skipped}")
        if self.choices != ("run", "skip"):
            words.append(f"forms {', '.join(self.choices[1:])}")
        if self.heads != ("full",) or self.sizes:
            tokens = hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:12] if self.tokens else "none"
            words.append(f"heads {', '.join(self.heads)}, sizes {list(self.sizes)} of tokens {tokens}")
        return ", ".join(words)

    @property
    def choices(self) -> tuple[Form, ...]:
        """The forms of a sublayer by the number that a parameter has."""
        return ("run", *(("skip",) if self.forms is None else self.forms))

    def choice(self) -> dict[str, Any]:
        """What was chosen by measurement and by calibration text, as JSON."""
        return {"forms": self.forms, "heads": self.heads, "tokens": self.tokens, "sizes": self.sizes}

    def chosen_as(self, choice: Mapping[str, Any]) -> Space:
        """The space with another's choice, as `choice` gives it or JSON gives it back."""
        given: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in choice.items()}
        return replace(self, **given)

    @property
    def quantised(self) -> list[Quantised]:
        """The quantised forms among them."""
        return [form for form in QUANTISED if form in self.choices]

    @property
    def free(self) -> list[Sublayer]:
        """Sublayers that plans of this space may change."""
        if self.structure == "sublayers":
            return [(kind, i) for kind in KINDS for i in range(self.num_layers) if not self.fixed.skips(kind, i)]
        return [(kind, i) for kind in KINDS for i in self._layers]

    @property
    def _layers(self) -> list[int]:
        """Layers whose two sublayers are both free."""
        return [i for i in range(self.num_layers) if not any(self.fixed.skips(kind, i) for kind in KINDS)]

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """Parameters with their lowest and highest value: "attention.03", "layer.07", "span.0.first", "head"."""
        most, bounds = len(self.choices) - 1, dict[str, tuple[int, int]]()
        if self.structure == "sublayers":
            bounds = {f"{kind}.{i:02d}": (0, most) for kind, i in self.free}
        elif self.structure == "layers":
            bounds = {f"layer.{i:02d}": (0, most) for i in self._layers}
        else:
            longest = self.num_layers if self.max_skipped is None else min(self.max_skipped // 2, self.num_layers)
            for number in range(self.spans):
                bounds[f"span.{number}.first"] = (0, self.num_layers - 1)
                bounds[f"span.{number}.length"] = (0, longest)
        if len(self.heads) > 1:
            bounds["head"] = (0, len(self.heads) - 1)
        if self.sizes:
            bounds["head.tokens"] = (0, len(self.sizes))
        return bounds

    @property
    def size(self) -> int:
        """How many different parameters there are; some may mean the same plan."""
        return math.prod(high - low + 1 for low, high in self.bounds.values())

    def params(self, plan: SkipMask | DraftPlan) -> dict[str, int]:
        """A plan as parameters. What the space cannot express runs; a head of other tokens has the nearest size."""
        plan = self.plan_within(DraftPlan.of(plan))
        if self.structure == "spans":
            params = self._span_params(plan.skip)
        else:
            numbers = {form: number for number, form in enumerate(self.choices)}
            names = [name for name in self.bounds if not name.startswith("head")]
            first = self.free if self.structure == "sublayers" else [("attention", i) for i in self._layers]
            params = {name: numbers[plan.form(*sub)] for name, sub in zip(names, first, strict=True)}
        if "head" in self.bounds:
            params["head"] = self.heads.index(plan.head)
        if self.sizes:
            params["head.tokens"] = 0 if plan.head_ids is None else 1 + self.sizes.index(len(plan.head_ids))
        return params

    def _span_params(self, mask: SkipMask) -> dict[str, int]:
        runs: list[tuple[int, int]] = []
        for i in sorted(mask.attention):
            first, length = runs[-1] if runs else (i, 0)
            if first + length == i:
                runs[-1:] = [(first, length + 1)]
            else:
                runs.append((i, 1))
        longest = sorted(runs, key=lambda run: -run[1])[: self.spans]
        longest = sorted(longest) + [(0, 0)] * (self.spans - len(longest))
        params: dict[str, int] = {}
        for number, (first, length) in enumerate(longest):
            params |= {f"span.{number}.first": first, f"span.{number}.length": length}
        return params

    def plan(self, params: Mapping[str, int]) -> DraftPlan:
        """Parameters as a plan of the space."""
        if self.structure == "sublayers":
            forms = {sub: self.choices[params[f"{sub[0]}.{sub[1]:02d}"]] for sub in self.free}
        elif self.structure == "layers":
            forms = {(kind, i): self.choices[params[f"layer.{i:02d}"]] for kind in KINDS for i in self._layers}
        else:
            spans = [(params[f"span.{n}.first"], params[f"span.{n}.length"]) for n in range(self.spans)]
            free = set(self._layers)
            # A fixed layer ends a run, or the run would become two, and some engines can skip only one.
            runs = (itertools.takewhile(free.__contains__, range(first, first + length)) for first, length in spans)
            inside = set(itertools.chain.from_iterable(runs))
            forms = {(kind, i): "skip" for kind in KINDS for i in inside}
        size = params.get("head.tokens", 0)
        head = self.heads[params.get("head", 0)]
        return self.plan_within(
            DraftPlan.from_forms(
                [forms.get((kind, i), "run") for kind in KINDS for i in range(self.num_layers)], head,
                self.ids(self.sizes[size - 1]) if size else None,
            )
        )  # fmt: skip

    def ids(self, size: int) -> tuple[int, ...]:
        """The tokens of a smaller head."""
        return tuple(sorted(self.tokens[:size]))

    def plan_within(self, plan: DraftPlan) -> DraftPlan:
        """The plan with what the space allows; other forms run."""
        skip = self._mask_within(plan.skip)
        kept: list[str] = []
        free = set(self.free)
        for number, form in enumerate(plan.forms()):
            sub = KINDS[number // self.num_layers], number % self.num_layers
            if form == "skip":
                form = "skip" if skip.skips(*sub) else "run"
            elif self.structure != "sublayers" and len({plan.form(kind, sub[1]) for kind in KINDS}) > 1:
                form = "run"
            kept.append(form if sub in free and form in self.choices else "run")
        head: HeadForm = plan.head if plan.head in self.heads else "full"
        ids = plan.head_ids
        if ids is not None:
            wanted = len(ids)
            ids = self.ids(min(self.sizes, key=lambda size: abs(size - wanted))) if self.sizes else None
        return DraftPlan.from_forms(kept, head, ids)

    def _mask_within(self, mask: SkipMask) -> SkipMask:
        """The mask without fixed sublayers. If it skips too many, some are dropped, evenly over the model's depth."""
        if self.structure != "sublayers":  # drop whole layers
            whole = [i for i in self._layers if all(mask.skips(kind, i) for kind in KINDS)]
            most = None if self.max_skipped is None else self.max_skipped // 2
            kept = whole[:most] if self.structure == "spans" else _evenly(whole, most)
            return SkipMask(attention=kept, mlp=kept, num_layers=self.num_layers)
        skipped = list((mask - self.fixed).sublayers())
        return SkipMask.from_sublayers(_evenly(skipped, self.max_skipped), self.num_layers)


def ordered(forms: Sequence[str]) -> tuple[Form, ...]:
    """Forms in the order of `FORMS`.

    Raises:
        ValueError: one is unknown, or "run", which every space has.
    """
    for form in forms:
        if form not in FORMS[1:]:
            raise ValueError(f"space.forms holds {shown(form)}, must hold some of {', '.join(FORMS[1:])}")
    return tuple(form for form in FORMS[1:] if form in forms)


def _evenly(items: list[T], most: int | None) -> list[T]:
    """At most `most` of the items, evenly spaced, so that neither end of the model is preferred."""
    if most is None or len(items) <= most:
        return items
    return [items[(2 * n + 1) * len(items) // (2 * most)] for n in range(most)]
