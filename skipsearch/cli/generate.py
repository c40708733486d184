"""`skipsearch generate`: continue a prompt by any decoding method and print the text as it comes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from skipsearch.cli import options as opt

if TYPE_CHECKING:
    from skipsearch.generate.continuation import GenerateSettings
    from skipsearch.generate.method import SelfSpeculative
    from skipsearch.model.load import Loaded

ON_THE_FLY = "on the fly"  # label of the method that searches while it decodes


@opt.command("generate --model demo --mask results/demo/mask.json --compare --prompt 'def read_config(path):'")
def generate(
    model: opt.Model,
    mask: Annotated[Path | None, typer.Option(help="mask.json; without it, plain decoding")] = None,
    on_the_fly: Annotated[
        bool, typer.Option("--on-the-fly", help="find masks while decoding; starts with --mask if it is given")
    ] = False,
    decoding: Annotated[
        Literal["lossless", "mtad"], typer.Option(help="mtad: joint decoding of several tokens, LOSSY: likelier text")
    ] = "lossless",
    beam_width: Annotated[int | None, typer.Option(min=1, help="beams of mtad (default 4)")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="joint likelihood ratio from which mtad accepts (default 0.5)")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="a smaller model that drafts for mtad instead of the mask: preset, id or folder")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="part of the time that --on-the-fly searches (default 0.05)")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="where to write the mask that --on-the-fly found")] = None,
    prompt: Annotated[str, typer.Option(help="text to continue, or to ask a chat model")] = "def main(",
    chat: opt.Chat = True,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: opt.Temperature = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    compare: Annotated[bool, typer.Option(help="also decode plainly, and compare speed and tokens")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="show which tokens were drafted, and by what")] = False,
    backend: opt.Backends = "auto", seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Continue a prompt with a mask (or plainly), streaming."""
    joint = decoding == "mtad"
    beams: dict[str, Any] = {"beam_width": beam_width, "threshold": threshold, "draft_model": draft_model}
    _check(mask, joint, on_the_fly, compare, beams, {"save": save, "share": share}, explain)
    if joint or backend == "auto":
        backend = "eager" if joint else "compiled" if on_the_fly else _backend_of(mask)
    loaded = opt.load(model, dtype, device, revision, trust)
    from skipsearch.decoding.rule import GREEDY, SelectionRule
    from skipsearch.generate.continuation import GenerateSettings, encode

    settings = GenerateSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, chat=chat
    )
    encode(loaded, prompt, settings)
    given = {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None}
    rule = SelectionRule.of(loaded.model, temperature, **given)
    if given and not rule.temperature:
        raise typer.BadParameter(
            "it goes with sampling, and this decodes greedily; pass --temperature", param_hint="--top-k"
        )
    if rule != GREEDY and not as_json:
        opt.err.print(f"decoding: {rule}", markup=False)
    if draft_model is not None:
        beams["draft_model"] = opt.load(draft_model, dtype, device, None, trust).model
    _say_verdict(mask)
    methods = _methods(mask, on_the_fly, compare, backend, seed, share, {"decoding": decoding, **beams})
    out = Console(quiet=as_json)
    results = _continue(loaded, prompt, methods, settings, out, explain)
    exact = str(loaded.model.dtype) == "torch.float32"
    must_agree = compare and not joint and not rule.temperature
    equal = len({tuple(found["tokens"]) for found in results.values()}) == 1 if must_agree else None
    if save is not None:  # before the results are told: an error is the one object on stdout
        methods[ON_THE_FLY].tuner_for(loaded.model).save(save, loaded.name)
    if as_json:
        print(json.dumps({**results, "greedy_equal": equal}))
    elif compare:
        out.print(_compared(list(results.values()), equal, joint, exact))
    if save is not None:
        out.print(f"saved {_found(save, mask)}; next: skipsearch validate {save} --model {model}")
    # In half precision, verifying several tokens at once may round differently, so a difference there is no failure.
    raise typer.Exit(1 if equal is False and exact else 0)


def _check(
    mask: Path | None, joint: bool, on_the_fly: bool, compare: bool, beams: dict[str, Any], search: dict[str, Any],
    explain: bool,
) -> None:  # fmt: skip
    """Refuse options that exclude or need each other, before any model is loaded.

    Args:
        beams: "beam_width", "threshold" and "draft_model", each None if it was not given.
        search: "save" and "share", likewise.
    """
    for options, allowed, reason in (
        (beams, joint, "it goes with --decoding mtad alone"),
        (search, on_the_fly, "nothing is searched without --on-the-fly"),
    ):
        for name, value in options.items():
            if value is not None and not allowed:
                raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")
    draft_model, save = beams["draft_model"], search["save"]
    if joint and on_the_fly:
        raise typer.BadParameter("mtad and --on-the-fly exclude each other", param_hint="--decoding")
    if joint and (mask is None) == (draft_model is None):
        raise typer.BadParameter("mtad drafts with either --mask or --draft-model", param_hint="--decoding")
    drafts = mask is not None or on_the_fly or draft_model is not None
    if compare and not drafts:
        raise typer.BadParameter("it compares a mask with plain decoding, so it needs --mask", param_hint="--compare")
    if explain and not drafts:
        why = "plain decoding drafts no tokens, so there are none to show; pass --mask or --on-the-fly"
        raise typer.BadParameter(why, param_hint="--explain")
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"folder {save.absolute().parent} does not exist; make it first", param_hint="--save")


def _methods(
    mask: Path | None, on_the_fly: bool, compare: bool, backend: opt.Backend, seed: int, share: float | None,
    joint: dict[str, Any],
) -> dict[str, SelfSpeculative]:  # fmt: skip
    """The decoding methods to run, by label: the chosen one, and before it plain decoding if they are compared.

    Args:
        joint: arguments of `self_speculative` for joint decoding.
    """
    from skipsearch.online.self_speculative import self_speculative

    plain = self_speculative(None, backend=backend)
    if joint["decoding"] == "mtad":
        name, method = "mtad (lossy)", self_speculative(mask, **joint)
    elif on_the_fly:
        name, method = ON_THE_FLY, self_speculative("auto", start=mask, seed=seed, share=share, backend=backend)
    else:
        name, method = ("plain", plain) if mask is None else (_name(mask), self_speculative(mask, backend=backend))
    return {"plain": plain, name: method} if compare else {name: method}


def _continue(
    loaded: Loaded, prompt: str, methods: dict[str, SelfSpeculative], settings: GenerateSettings, out: Console,
    explain: bool,
) -> dict[str, Any]:  # fmt: skip
    """Continue the prompt with each method after a warm-up; a quiet `out` prints neither texts nor figures.

    Returns:
        what `continue_text` returns, by label; with "search", a report, where masks were searched on the fly, and to
        explain with "pieces", of (text, source).
    """
    from transformers import TextStreamer

    from skipsearch.decoding.text import pieces
    from skipsearch.generate.continuation import continue_text
    from skipsearch.report.explain import ExplainingStreamer, legend, sources_line
    from skipsearch.report.progress import stages
    from skipsearch.report.tables import found_line, generation_line

    few = replace(settings, max_new_tokens=min(16 if len(methods) > 1 else 2, settings.max_new_tokens))
    with stages(opt.err, quiet=out.quiet) as progress:
        for method in methods.values():  # before any is timed: the first one alone would pay for what all share
            continue_text(loaded, prompt, method, few, progress=progress.stage)
    if explain:
        out.print(legend(out))
    results, chat = {}, settings.chat and bool(loaded.tokenizer.chat_template)  # whose text would stand around it
    for name, method in methods.items():
        if len(methods) > 1:
            out.rule(name)
        made = partial(ExplainingStreamer, method=method, console=out) if explain else TextStreamer
        streamer = None if out.quiet else made(loaded.tokenizer, skip_prompt=chat)
        results[name] = found = continue_text(loaded, prompt, method, settings, streamer=streamer)
        if explain:
            found["pieces"] = pieces(loaded.tokenizer, found["tokens"], method.stats.trails[0].sources)
            out.print(sources_line(found, out))
        out.print(generation_line(found))
        if name == ON_THE_FLY:
            found["search"] = method.tuner_for(loaded.model).report()
            out.print(found_line(found["search"]))
    return results


def _compared(results: list[dict[str, Any]], equal: bool | None, joint: bool, exact: bool) -> str:
    """How the two texts of a comparison agree, and their speeds."""
    plain, mine = (found["tokens_per_second"] for found in results)
    speed = f"{mine / plain:.2f} times the speed on this prompt" if plain else "too short to compare speeds"
    if equal is None:
        why = "mtad is lossy by design" if joint else "they are samples"
        return f"the two texts may differ: {why}; {speed}"
    why = "" if equal or exact else "; near-ties may in half precision: see `skipsearch validate --audit`"
    return f"{'same tokens as' if equal else 'tokens differ from'} plain decoding, {speed}{why}"


def _say_verdict(mask: Path | None) -> None:
    """Say so where a mask file itself advises against its use."""
    from skipsearch.maskfile import load_mask

    evidence = load_mask(mask).evidence if mask is not None else None
    if evidence is not None and evidence.verdict != "use":
        low, high = evidence.speedup_ci
        opt.err.print(
            f"note: {mask} says {evidence.verdict!r}: the draft alone was {evidence.speedup:.2f} ({low:.2f} to "
            f"{high:.2f}) times as fast as plain decoding on {evidence.device}; `skipsearch validate` times it here",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _found(saved: Path, start: Path | None) -> str:
    """What was saved: a new mask, or the one that the search started with."""
    from skipsearch.maskfile import load_mask

    kept = start is not None and load_mask(saved).plan == load_mask(start).plan
    return "the mask it began with, which nothing beat" if kept else "what was found"


def _name(mask: Path) -> str:
    from skipsearch.maskfile import load_mask

    return "mask" if load_mask(mask).plan.only_skips else "plan"


def _backend_of(mask: Path | None) -> Literal["eager", "compiled"]:
    """The backend that a mask was tuned for. With --compare plain decoding takes it too."""
    from skipsearch.maskfile import load_mask

    evidence = load_mask(mask).evidence if mask is not None else None
    return "compiled" if evidence is not None and evidence.backend == "compiled" else "eager"
