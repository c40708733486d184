"""DraftPlan: what each sublayer and the head do while drafting. A frozen value, without model, tensor or file.

A sublayer runs, runs with its weights in int8 or int4, or is skipped. A `SkipMask` is the plan that only skips.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipsearch.errors import MaskError, shown
from skipsearch.mask import KINDS, Kind, SkipMask, Sublayer

Form = Literal["run", "int8", "int4", "skip"]
Quantised = Literal["int8", "int4"]
HeadForm = Literal["full", "int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)  # in the order of parameters: each costs less than the one before
QUANTISED: tuple[Quantised, ...] = get_args(Quantised)
HEAD_FORMS: tuple[HeadForm, ...] = get_args(HeadForm)
MOST_IDS = 1 << 20  # tokens that a file may name; no vocabulary is larger
CELLS: dict[Form, str] = {"run": "█", "int8": "▓", "int4": "░", "skip": "·"}


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The form of each sublayer and of the head; sublayers in none of the three masks run as they are.

    Args:
        skip, int8, int4: the sublayers of each form, for the same number of layers; none is in two of them. The
            latter two may be left out.
        head: the form of the head's weights.
        head_ids: the tokens that a draft may choose from; None: all.

    Raises:
        MaskError: the masks are of different models or share a sublayer; the head's form is unknown, or its ids are
            empty, negative or not whole numbers.
    """

    skip: SkipMask
    int8: SkipMask
    int4: SkipMask
    head: HeadForm
    head_ids: tuple[int, ...] | None

    def __init__(
        self, skip: SkipMask, int8: SkipMask | None = None, int4: SkipMask | None = None, head: HeadForm = "full",
        head_ids: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        none = SkipMask(num_layers=skip.num_layers)
        int8, int4 = none if int8 is None else int8, none if int4 is None else int4
        masks = {"skip": skip, "int8": int8, "int4": int4}
        for one, other in itertools.combinations(masks, 2):
            for kind, i in (masks[one] & masks[other]).sublayers():
                raise MaskError(f"{one} and {other} share {kind} {i}, a sublayer has one form; remove it from one")
        if head not in HEAD_FORMS:
            raise MaskError(f"head.form is {shown(head)}, must be one of {', '.join(HEAD_FORMS)}; correct it")
        ids = None if head_ids is None else _checked_ids(head_ids)
        for name, value in (("skip", skip), ("int8", int8), ("int4", int4), ("head", head), ("head_ids", ids)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, plan: SkipMask | DraftPlan) -> DraftPlan:
        """A plan as it is; a mask as the plan that only skips."""
        return plan if isinstance(plan, DraftPlan) else cls(plan)

    @classmethod
    def from_forms(
        cls, forms: Sequence[str], head: HeadForm = "full", head_ids: Iterable[int] | None = None
    ) -> DraftPlan:  # fmt: skip
        """A plan from 2L forms: attention 0..L-1, then mlp 0..L-1."""
        for number, form in enumerate(forms):
            if form not in FORMS:
                raise MaskError(f"form {number} is {shown(form)}, must be one of {', '.join(FORMS)}; correct it")
        of = {form: SkipMask.from_bits([found == form for found in forms]) for form in ("skip", *QUANTISED)}
        return cls(**of, head=head, head_ids=head_ids)

    @classmethod
    def in_form(
        cls, form: Quantised, sublayers: SkipMask, skip: SkipMask | None = None, head: HeadForm = "full",
        head_ids: Iterable[int] | None = None,
    ) -> DraftPlan:  # fmt: skip
        """Some sublayers in one quantised form, without those that are skipped."""
        skip = skip or SkipMask(num_layers=sublayers.num_layers)
        left = sublayers - skip
        return cls(skip, left if form == "int8" else None, left if form == "int4" else None, head, head_ids)

    @classmethod
    def everywhere(cls, form: Quantised, num_layers: int, head: HeadForm | None = None) -> DraftPlan:
        """All sublayers in one quantised form, and the head too unless another form is given."""
        every = SkipMask.from_bits([True] * 2 * num_layers)
        return cls.in_form(form, every, head=form if head is None else head)

    @property
    def num_layers(self) -> int:
        return self.skip.num_layers

    @property
    def only_skips(self) -> bool:
        """Whether a mask says the same."""
        return not self.quantises and self.head_ids is None

    @property
    def quantises(self) -> bool:
        """Whether any weights are quantised."""
        return bool(self.int8) or bool(self.int4) or self.head != "full"

    @property
    def drafts(self) -> bool:
        """Whether it differs from the full model."""
        return bool(self.skip) or not self.only_skips

    def form(self, kind: Kind, layer: int) -> Form:
        """The form of one sublayer."""
        return next((form for form in FORMS[1:] if getattr(self, form).skips(kind, layer)), "run")

    def forms(self) -> tuple[Form, ...]:
        """2L forms: attention 0..L-1, then mlp 0..L-1."""
        return tuple(self.form(kind, i) for kind in KINDS for i in range(self.num_layers))

    def of_form(self, form: Form) -> list[Sublayer]:
        """The sublayers of one form."""
        return [(kind, i) for kind in KINDS for i in range(self.num_layers) if self.form(kind, i) == form]

    @property
    def first(self) -> int:
        """The first layer that differs from the full model; the last one at most."""
        changed = [i for m in (self.skip, self.int8, self.int4) for _, i in m.sublayers()]
        return min((*changed, self.num_layers - 1))

    def to_dict(self) -> dict[str, Any]:
        """`{"skip", "int8", "int4": {"attention", "mlp", "num_layers"}, "head", "head_ids"}`; the latter a number."""
        masks = {form: getattr(self, form).to_dict() for form in ("skip", *QUANTISED)}
        return {**masks, "head": self.head, "head_ids": None if self.head_ids is None else len(self.head_ids)}

    def columns(self) -> dict[str, Any]:
        """For tables: its skips as 2L bits, and where it does more than skip, its forms as 2L digits, and its head."""
        found: dict[str, Any] = {"mask": "".join(map(str, self.skip.bits())), "skipped": len(self.skip)}
        if not self.only_skips:
            found["plan"] = "".join(str(FORMS.index(form)) for form in self.forms())
            found |= {"head": self.head, "head_tokens": None if self.head_ids is None else len(self.head_ids)}
        return found

    def __str__(self) -> str:
        """Rows of cells, one column for each layer, in the signs of `CELLS`; then the head."""
        rows = []
        for kind in KINDS:
            forms = [self.form(kind, i) for i in range(self.num_layers)]
            counts = ", ".join(f"{forms.count(f)} {f}" for f in FORMS[1:] if f in forms) or "all run"
            rows.append(f"{kind:<9} {''.join(CELLS[form] for form in forms)}  {counts}")
        ids = "" if self.head_ids is None else f", {len(self.head_ids)} ids"
        return "\n".join([*rows, f"head      {self.head}{ids}"])


def _checked_ids(ids: Iterable[int]) -> tuple[int, ...]:
    found = list(ids)
    if not found:
        raise MaskError("head.ids is empty, a draft needs tokens to choose from; leave it out for all of them")
    for i in found:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise MaskError(f"head.ids holds {shown(i)}, must hold whole numbers of at least 0; correct it")
    return tuple(sorted(set(found)))


def ranges_of(ids: tuple[int, ...]) -> str:
    """Rising numbers as ranges: (0, 1, 2, 5) is "0-2 5"."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def ids_of(ranges: str) -> list[int]:
    """The numbers of such ranges, at most `MOST_IDS`.

    Raises:
        MaskError: it is another text, or there are more.
    """
    found: list[int] = []
    for part in ranges.split():
        first, dash, last = part.partition("-")
        plain = first.isdecimal() and (last.isdecimal() or not dash) and len(part) < 20
        many = int(last or first) + 1 - int(first) if plain else 0
        if not 0 < many <= MOST_IDS - len(found) or int(last or first) >= MOST_IDS:
            raise MaskError(
                f"head.ids holds {shown(part)}, must hold numbers below {MOST_IDS} and ranges like 0-255, each at most "
                f"once; export it again"
            )
        found += range(int(first), int(last or first) + 1)
    return found
