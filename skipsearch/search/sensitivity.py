"""Sensitivity: what each form of each sublayer does to a draft when it is the only change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from skipsearch.compiled.backend import Progress
from skipsearch.evaluate.windows import Part, WindowReplay, Windows
from skipsearch.files import read_checked, write_checked
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.space import Space
from skipsearch.plan import DraftPlan, Form, Quantised

Loss = dict[Form, dict[Sublayer, float]]  # share of tokens that one sublayer alone makes wrong in a form
TOGETHER = 4  # groups of a kind whose sublayers are quantised together, to measure their harm


def single_losses(
    windows: Windows, part: Part, space: Space, progress: Progress, *, known: Loss | None = None,
    keep: Callable[[Loss], None] = lambda loss: None,
) -> Loss:  # fmt: skip
    """For each free sublayer and form: the share of a trace's tokens that drafts get wrong if it alone has this form.

    Drafts begin behind the reference keys of the full model, and at the first layer that they change. What one
    quantised sublayer does is less than these tokens can show, so neighbours of a kind are measured together, and each
    gets an equal part of the harm.

    Args:
        part: the windows to draft.
        known: losses that need not be computed again.
        keep: called with all losses so far.
    """
    loss: Loss = {form: dict(of_form) for form, of_form in (known or {}).items()}
    groups = [(form, group) for form in space.choices[1:] for group in _measured_together(space, form)]
    for number, (form, group) in enumerate(groups):
        of_form = loss.setdefault(form, {})
        if not of_form.keys() >= set(group):
            mask = SkipMask.from_sublayers(group, space.num_layers)
            plan = DraftPlan(mask) if form == "skip" else DraftPlan.in_form(cast(Quantised, form), mask)
            correct = [right for found in WindowReplay(windows, plan).outcomes(part) for right in found.correct]
            share = sum(correct) / len(correct)
            # Rounded as it is stored, so that an interrupted run has the same seeds.
            of_form |= {sub: round(1 - share ** (1 / len(group)), 5) for sub in group}
            keep(loss)
        progress("sensitivity", number + 1, len(groups))
    return loss


def _measured_together(space: Space, form: Form) -> list[list[Sublayer]]:
    if form == "skip":
        return [[sub] for sub in space.free]
    found = []
    for kind in KINDS:
        of_kind = [sub for sub in space.free if sub[0] == kind]
        size = max(1, -(-len(of_kind) // TOGETHER))
        found += [of_kind[first : first + size] for first in range(0, len(of_kind), size)]
    return found


def sensitivity_or_load(
    path: Path, identity: str, windows: Windows, choose: Callable[[], Part], space: Space, progress: Progress
) -> tuple[Loss, Part]:
    """The losses in `path` if they are of this trace and model; else new ones. Each is saved when it is known.

    Args:
        choose: chooses the windows for new losses.

    Returns:
        the losses, and the windows that they were computed on.
    """

    def take(data: dict[str, Any]) -> tuple[Loss, Part] | None:
        if data["identity"] != identity or len(data["windows"]) != len(windows.counts):
            return None  # of another trace
        part = tuple(range(min(int(n), most)) for n, most in zip(data["windows"], windows.counts, strict=True))
        losses: Loss = {}
        for form, of_form in {"skip": data["loss"], **data["forms"]}.items():
            pairs = ((kind, i, loss) for kind in KINDS for i, loss in of_form[kind].items())
            if found := {(kind, int(i)): float(loss) for kind, i, loss in pairs}:
                losses[cast(Form, form)] = found
        return losses, part

    known, chosen = read_checked(path, take) or ({}, choose())

    def by_kind(of_form: dict[Sublayer, float]) -> dict[str, dict[str, float]]:
        return {kind: {str(i): of_form[kind, i] for k, i in of_form if k == kind} for kind in KINDS}

    def keep(loss: Loss) -> None:
        forms = {form: by_kind(of_form) for form, of_form in loss.items() if form != "skip"}
        write_checked(path, {
            "identity": identity, "windows": [len(some) for some in chosen], "loss": by_kind(loss.get("skip", {})),
            "forms": forms,
        })  # fmt: skip

    return single_losses(windows, chosen, space, progress, known=known, keep=keep), chosen
