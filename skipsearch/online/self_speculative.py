"""The public `self_speculative`: settings become a decoding method, with a mask, with "auto", or joint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from skipsearch.compiled.backend import Backend
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.errors import DecodingError, MaskError
from skipsearch.generate.method import SelfSpeculative
from skipsearch.joint.joint import Joint
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, load_mask
from skipsearch.online.auto import make_tuner
from skipsearch.online.tuner import SHARE
from skipsearch.search.options import NGRAM

Masked = SkipMask | MaskFile | str | Path | None


def self_speculative(
    mask_or_path: Masked,
    *,
    streamer: BaseStreamer | None = None,
    max_length: int | None = None,
    exit_threshold: float | None = None,
    adaptive: bool | None = None,
    ngram: int | None = None,
    never_slower: bool | None = None,
    deterministic: bool = False,
    backend: Backend | None = None,
    start: Masked = None,
    share: float | None = None,
    seed: int = 0,
    decoding: Literal["lossless", "mtad"] = "lossless",
    beam_width: int | None = None,
    threshold: float | None = None,
    draft_model: PreTrainedModel | None = None,
) -> SelfSpeculative:
    """A decoding method for `model.generate(..., custom_generate=...)`.

    Args:
        mask_or_path: a mask, a mask file or its path; None decodes plainly in the same loop; "auto" finds masks while
            it serves single sequences, from what it generates (`OnTheFly`); keep the object for the whole stream. With
            sampling the output has the target's distribution, but the clock has a say in it beside the seed.
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
    online, joint = mask_or_path == "auto", decoding == "mtad"
    if decoding not in ("lossless", "mtad"):
        raise DecodingError(f"decoding is {decoding!r}, must be 'lossless' or 'mtad'")
    if backend not in (None, "auto", "eager", "compiled"):
        raise DecodingError(f"backend is {backend!r}, must be 'auto', 'eager' or 'compiled'")
    auto, mtad, leave = "'auto' alone", "decoding='mtad' alone", "leave it out"
    for name, value, goes, with_what, mend in (
        ("start", start, online, auto, "pass it as the first argument"), ("share", share, online, auto, leave),
        ("draft_model", draft_model, joint, mtad, leave), ("beam_width", beam_width, joint, mtad, leave),
        ("threshold", threshold, joint, mtad, leave),
    ):  # fmt: skip
        if value is not None and not goes:
            said = f"is {value!r}" if isinstance(value, int | float | str | Path | SkipMask) else "was given"
            raise DecodingError(f"{name} {said}, which goes with {with_what}; {mend}")
    share = SHARE if share is None else share
    if not 0 <= share < 1:
        raise DecodingError(f"share is {share}, must be at least 0 and below 1; try 0.05")
    mask, file, policy = _drafting(start if online else mask_or_path)
    if online and not joint:
        ngram, never_slower = NGRAM if ngram is None else ngram, True if never_slower is None else never_slower
        backend = backend or "compiled"
    changes: dict[str, Any] = {
        "max_length": max_length, "exit_threshold": exit_threshold, "adaptive": adaptive, "ngram": ngram,
        "never_slower": never_slower,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if policy.curve and changes.keys() & {"max_length", "exit_threshold", "adaptive"}:
        changes |= {"curve": (), "prices": ()}  # a calibrated exit knows no other
    policy = replace(policy, **changes)
    if not joint:
        tune = partial(make_tuner, share=share, seed=seed) if online else None
        return SelfSpeculative(mask, policy, file, streamer, deterministic, backend or "auto", tune)
    given = {"deterministic": deterministic, "'auto'": online, "backend": backend == "compiled",
             **{name: value for name, value in changes.items() if name != "max_length"}}  # fmt: skip
    if unheeded := sorted(name for name, value in given.items() if value):
        raise DecodingError(f"joint decoding was given {', '.join(unheeded)}, which it cannot honour; leave it out")
    if (mask is None) == (draft_model is None):
        raise DecodingError(
            f"mask_or_path is {mask_or_path!r} and draft_model {'given' if draft_model is not None else 'None'}; "
            f"joint decoding drafts with one of the two, pass None as the other"
        )
    chosen = {"width": beam_width, "threshold": threshold}
    beams = Joint(length=policy.max_length, **{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
    # Trees of tokens have no compiled pieces.
    return SelfSpeculative(mask, policy, file, streamer, backend="eager", joint=beams, draft_model=draft_model)


def _drafting(mask_or_path: Masked) -> tuple[SkipMask | None, MaskFile | None, DraftPolicy]:
    """The mask, the file that it comes from, and the policy that goes with it."""
    if mask_or_path is None or isinstance(mask_or_path, SkipMask):
        return mask_or_path, None, DraftPolicy()
    file = load_mask(mask_or_path) if isinstance(mask_or_path, str | Path) else mask_or_path
    if not isinstance(file, MaskFile):
        raise MaskError(f"mask_or_path must be a SkipMask, a MaskFile or a path, got {type(mask_or_path).__name__}")
    return file.mask, file, DraftPolicy(**file.draft.model_dump())
