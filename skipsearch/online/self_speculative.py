"""The public `self_speculative`: settings become a decoding method, with a mask, with "auto", or joint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from skipsearch.compiled.backend import Backend
from skipsearch.errors import DecodingError, MaskError
from skipsearch.generate.drafting import Drafting
from skipsearch.generate.method import SelfSpeculative
from skipsearch.joint.joint import Joint
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, load_mask
from skipsearch.online.auto import make_tuner
from skipsearch.online.tuner import SHARE
from skipsearch.plan import DraftPlan
from skipsearch.policy import NGRAM

Masked = SkipMask | DraftPlan | MaskFile | str | Path | None


def self_speculative(
    mask_or_path: Masked, *, streamer: BaseStreamer | None = None, max_length: int | None = None,
    exit_threshold: float | None = None, adaptive: bool | None = None, ngram: int | None = None,
    never_slower: bool | None = None, deterministic: bool = False, backend: Backend | None = None,
    start: Masked = None, share: float | None = None, seed: int = 0,
    decoding: Literal["lossless", "mtad"] = "lossless", beam_width: int | None = None, threshold: float | None = None,
    draft_model: PreTrainedModel | None = None,
) -> SelfSpeculative:  # fmt: skip
    """A decoding method for `model.generate(..., custom_generate=...)`.

    Args:
        mask_or_path: a mask, a plan, a mask file or its path; None decodes plainly in the same loop; "auto" finds masks
            while it serves single sequences, from what it generates (`OnTheFly`); keep the object for the whole stream.
            With sampling the output has the target's distribution, but it depends on timing beside the seed.
        streamer: receives tokens as they are committed; by default the one given to `generate`.
        max_length: K; by default the mask file's own policy, or 5 for a bare mask.
        exit_threshold: stop drafting below this confidence; default as for `max_length`.
        adaptive: let the threshold follow the acceptance rate; default as for `max_length`.
        ngram: propose continuations of so many tokens where the last tokens occurred before; default likewise, 10 with
            "auto".
        never_slower: draft only while it pays; default likewise, true with "auto".
        deterministic: verify in blocks of one fixed shape. Then the output has the same bits, in any dtype,
            as plain decoding through the same blocks: `self_speculative(None, deterministic=True)`.
        backend: "compiled", "eager", or "auto", the default: the one that the mask file was tuned for, eager for a bare
            mask. With "auto" for a mask, compiled where it can be.
        start: with "auto", what to draft with until something better is found.
        share: with "auto", of decoding's seconds that the search may take; 0.05.
        seed: with "auto", of what is random in the search.
        decoding: "lossless", or "mtad": joint decoding (`Joint`), which is LOSSY: output likelier under the target than
            its own samples, and not distributed as they are. Drafts of `max_length`, eager, row by row.
        beam_width, threshold: of "mtad"; 4 and 0.5.
        draft_model: of "mtad": a smaller model with the same vocabulary drafts in place of the mask.

    Raises:
        MaskError: the file or the policy is malformed.
        DecodingError: a setting is out of range, or goes with another one that was not given.
    """
    beams = {"draft_model": draft_model, "beam_width": beam_width, "threshold": threshold}
    _check(decoding, backend, mask_or_path == "auto", {"start": start, "share": share}, beams)
    changes = {
        "max_length": max_length, "exit_threshold": exit_threshold, "adaptive": adaptive, "ngram": ngram,
        "never_slower": never_slower,
    }  # fmt: skip
    if decoding == "mtad":
        _check_joint(mask_or_path, draft_model, {**changes, "deterministic": deterministic, "backend": backend})
        return _jointly(_drafting(mask_or_path, {"max_length": max_length}), beams, streamer)
    if mask_or_path != "auto":
        drafting = _drafting(mask_or_path, changes)
        return SelfSpeculative(drafting, streamer=streamer, deterministic=deterministic, backend=backend or "auto")
    served = {"ngram": NGRAM, "never_slower": True}  # unless they are set
    drafting = _start(start, {**changes, **{k: v for k, v in served.items() if changes[k] is None}})
    return SelfSpeculative(
        drafting, streamer=streamer, deterministic=deterministic, backend=backend or "compiled",
        make_tuner=partial(make_tuner, share=SHARE if share is None else share, seed=seed),
    )  # fmt: skip


def _check(
    decoding: str, backend: str | None, online: bool, tuning: dict[str, Any], beams: dict[str, Any]
) -> None:  # fmt: skip
    """Raise DecodingError for a setting that is out of range, or that goes with another one that was not given."""
    if decoding not in ("lossless", "mtad"):
        raise DecodingError(f"decoding is {decoding!r}, must be 'lossless' or 'mtad'")
    if backend not in (None, "auto", "eager", "compiled"):
        raise DecodingError(f"backend is {backend!r}, must be 'auto', 'eager' or 'compiled'")
    for settings, fits, other in (
        (tuning, online, "'auto' alone"), (beams, decoding == "mtad", "decoding='mtad' alone"),
    ):  # fmt: skip
        for name, value in settings.items():
            if value is not None and not fits:
                got = (
                    f"is {value!r}"
                    if isinstance(value, int | float | str | Path | SkipMask | DraftPlan)
                    else "was given"
                )
                mend = "pass it as the first argument" if name == "start" else "leave it out"
                raise DecodingError(f"{name} {got}, which goes with {other}; {mend}")
    share = tuning["share"]
    if share is not None and not 0 <= share < 1:
        raise DecodingError(f"share is {share}, must be at least 0 and below 1; try 0.05")


def _check_joint(mask_or_path: Masked, draft_model: PreTrainedModel | None, settings: dict[str, Any]) -> None:
    """Raise DecodingError for what joint decoding cannot honour, or two drafts, or none."""
    settings = {**settings, "'auto'": mask_or_path == "auto", "backend": settings["backend"] == "compiled"}
    if refused := sorted(name for name, value in settings.items() if value and name != "max_length"):
        raise DecodingError(f"joint decoding was given {', '.join(refused)}, which it cannot honour; leave it out")
    if (mask_or_path is None) == (draft_model is None):
        raise DecodingError(
            f"mask_or_path is {mask_or_path!r} and draft_model {'given' if draft_model is not None else 'None'}; "
            f"joint decoding drafts with one of the two, pass None as the other"
        )


def _jointly(drafting: Drafting, beams: dict[str, Any], streamer: BaseStreamer | None) -> SelfSpeculative:
    """Joint decoding; trees of tokens have no compiled pieces, so it is eager."""
    if drafting.plan is None and beams["draft_model"] is None:
        raise DecodingError("the mask file serves n-grams alone, joint decoding needs a mask; pass another file")
    names = {"draft_model": "draft_model", "beam_width": "width", "threshold": "threshold"}
    chosen = {names[name]: value for name, value in beams.items() if value is not None}
    joint = Joint(length=drafting.policy.max_length, **chosen)
    return SelfSpeculative(drafting, streamer=streamer, backend="eager", joint=joint)


def _start(start: Masked, changes: dict[str, Any]) -> Drafting:
    """What a search while serving starts with, which is a mask."""
    found = _drafting(start, changes)
    if found.plan is not None and not DraftPlan.of(found.plan).only_skips:
        raise DecodingError(
            "start is a plan that quantises, and 'auto' searches masks; pass the plan in place of 'auto'"
        )
    return found


def _drafting(mask_or_path: Masked, changes: dict[str, Any]) -> Drafting:
    """The mask, the file that it comes from, and its policy with these changes; None leaves a field as it is."""
    found = Drafting()
    if isinstance(mask_or_path, SkipMask | DraftPlan):
        found = Drafting(plan=mask_or_path)
    elif mask_or_path is not None:
        file = load_mask(mask_or_path) if isinstance(mask_or_path, str | Path) else mask_or_path
        if not isinstance(file, MaskFile):
            got = type(mask_or_path).__name__
            raise MaskError(f"mask_or_path must be a SkipMask, a DraftPlan, a MaskFile or a path, got {got}")
        found = Drafting(plan=file.drafting_plan, file=file, policy=file.draft)
    changes = {name: value for name, value in changes.items() if value is not None}
    if found.policy.curve and changes.keys() & {"max_length", "exit_threshold", "adaptive"}:
        changes |= {"curve": (), "prices": ()}  # in place of the calibrated exit
    return replace(found, policy=replace(found.policy, **changes))
