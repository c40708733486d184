"""`skipsearch generate`: continue a prompt, streaming, by any decoding method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from skipsearch.cli import options as opt


@opt.app.command()
def generate(
    model: opt.Model,
    mask: Annotated[Path | None, typer.Option(help="mask.json; without it, plain decoding")] = None,
    on_the_fly: Annotated[
        bool, typer.Option("--on-the-fly", help="find masks while decoding, from --mask or from nothing")
    ] = False,
    decoding: Annotated[
        Literal["lossless", "mtad"], typer.Option(help="mtad: joint decoding of several tokens, LOSSY: likelier text")
    ] = "lossless",
    beam_width: Annotated[int | None, typer.Option(min=1, help="beams of mtad (default 4)")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="joint likelihood ratio that mtad accepts from (default 0.5)")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="a smaller model that drafts for mtad instead of the mask: preset, id or folder")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="of decoding's seconds, to search on the fly (default 0.05)")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="where to write the mask that was found on the fly")] = None,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: opt.Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    compare: Annotated[bool, typer.Option(help="decode plainly too, and compare speed and tokens")] = False,
    backend: opt.Backends = "auto",
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Continue a prompt with a mask (or plainly), streaming."""
    _check(decoding, on_the_fly, mask, compare, save, share, beam_width, threshold, draft_model)
    tuned = "eager" if decoding == "mtad" else backend
    if tuned == "auto":
        tuned = "compiled" if on_the_fly else _backend_of(mask)
    loaded = opt.load(model, dtype, device, revision, trust)
    from skipsearch.generate.continuation import GenerateSettings, check_room, continue_text
    from skipsearch.online.self_speculative import self_speculative
    from skipsearch.report.progress import stages
    from skipsearch.report.tables import found_line, generation_line

    check_room(loaded, prompt, max_new_tokens)
    plain = self_speculative(None, backend=tuned)
    if decoding == "mtad":
        small = opt.load(draft_model, dtype, device, None, trust).model if draft_model else None
        name, method = "mtad (lossy)", self_speculative(
            mask, decoding="mtad", beam_width=beam_width, threshold=threshold, draft_model=small
        )  # fmt: skip
    elif on_the_fly:
        name, method = "on the fly", self_speculative("auto", start=mask, seed=seed, share=share, backend=tuned)
    else:
        name, method = ("plain", plain) if mask is None else ("mask", self_speculative(mask, backend=tuned))
    methods = {"plain": plain, name: method} if compare else {name: method}
    settings = GenerateSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    with stages(opt.err, quiet=as_json) as progress:
        for each in methods.values():  # warm-up, so that the first arm pays for nothing alone
            few = replace(settings, max_new_tokens=min(16 if compare else 2, max_new_tokens))
            continue_text(loaded, prompt, each, few, stream=False, progress=progress.stage)
    tuner = method.tuner_for(loaded.model) if on_the_fly else None
    results: dict[str, Any] = {}
    for label, each in methods.items():
        if compare and not as_json:
            opt.out.rule(label)
        results[label] = found = continue_text(loaded, prompt, each, settings, stream=not as_json)
        if not as_json:
            opt.out.print(generation_line(found))
        if tuner is not None and each is method:
            found["search"] = tuner.report()
            if not as_json:
                opt.out.print(found_line(found["search"]))
    exact = decoding == "lossless" and temperature == 0
    equal = len({tuple(found["tokens"]) for found in results.values()}) == 1 if compare and exact else None
    if as_json:
        print(json.dumps({**results, "greedy_equal": equal}))
    elif compare:
        opt.out.print(_compared(equal, decoding))
    if save is not None and tuner is not None:
        tuner.save(save, loaded.name)
        if not as_json:
            opt.out.print(f"saved {_what(save, mask)}; next: skipsearch validate {save} --model {model}")
    # In half precision verifying several rows at once may round differently: a difference is no failure there.
    raise typer.Exit(1 if equal is False and str(loaded.model.dtype) == "torch.float32" else 0)


def _check(
    decoding: str, on_the_fly: bool, mask: Path | None, compare: bool, save: Path | None, share: float | None,
    beam_width: int | None, threshold: float | None, draft_model: str | None,
) -> None:  # fmt: skip
    """Refuse options that do not go together, before anything is loaded."""
    joint = decoding == "mtad"
    lone = {"--beam-width": beam_width, "--threshold": threshold, "--draft-model": draft_model}
    for option, value, goes, why in (
        *((name, value, joint, "it goes with --decoding mtad alone") for name, value in lone.items()),
        ("--save", save, on_the_fly, "nothing is searched without --on-the-fly"),
        ("--share", share, on_the_fly, "nothing is searched without --on-the-fly"),
    ):
        if value is not None and not goes:
            raise typer.BadParameter(why, param_hint=option)
    if joint and on_the_fly:
        raise typer.BadParameter("mtad and --on-the-fly exclude each other", param_hint="--decoding")
    if joint and (mask is None) == (draft_model is None):
        raise typer.BadParameter("mtad drafts with either --mask or --draft-model", param_hint="--decoding")
    if compare and mask is None and not (on_the_fly or draft_model):
        raise typer.BadParameter("it compares a mask with plain decoding, so it needs --mask", param_hint="--compare")
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"folder {save.absolute().parent} does not exist; make it first", param_hint="--save")


def _compared(equal: bool | None, decoding: str) -> str:
    if equal is None:
        return f"the two texts may differ: {'mtad is lossy by design' if decoding == 'mtad' else 'they are samples'}"
    return "same tokens as plain decoding" if equal else "tokens differ from plain decoding"


def _what(saved: Path, start: Path | None) -> str:
    from skipsearch.maskfile import load_mask

    kept = start is not None and load_mask(saved).mask == load_mask(start).mask
    return "the mask it began with, which nothing beat" if kept else "what was found"


def _backend_of(mask: Path | None) -> Literal["eager", "compiled"]:
    """The backend that a mask was tuned for: with --compare both arms take it."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask) if mask is not None else None
    tuned = file is not None and file.evidence is not None and file.evidence.backend == "compiled"
    return "compiled" if tuned else "eager"
