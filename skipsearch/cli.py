"""The command line: parses, calls one function, prints.

Results go to stdout, progress and logs to stderr. With --json stdout holds one JSON object, nothing else.
Exit codes: 0 success, 1 a failed verdict or run, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from skipsearch.errors import BackendWarning, SkipsearchError

if TYPE_CHECKING:
    from skipsearch.model.load import Loaded
    from skipsearch.search.options import SearchOptions

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Find which sublayers an LLM may skip while drafting, prove it, and decode with it.",
)  # fmt: skip
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="preset (see `skipsearch models`), hub id or local folder")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or map to spread over all devices")]
Revision = Annotated[str | None, typer.Option(help="hub revision")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run modelling code from the hub")]
PromptsFrom = Annotated[
    str, typer.Option("--prompts", help="builtin, a .txt/.jsonl/.csv/.parquet file, or a data set id")
]
Column = Annotated[str | None, typer.Option("--prompt-column", help="column that holds the prompts")]
Config = Annotated[str | None, typer.Option("--prompt-config", help="configuration of a data set id")]
Split = Annotated[str, typer.Option("--prompt-split", help="split of a data set id")]
Chat = Annotated[bool, typer.Option(help="use the model's chat template where it has one")]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="cut prompts to so many tokens")]
NewTokens = Annotated[int, typer.Option(min=2, help="tokens to decode from each prompt")]
Calibration = Annotated[int, typer.Option("--num-prompts", min=2, help="prompts to search with")]
HeldOut = Annotated[int, typer.Option("--num-held-out", min=2, help="prompts to validate on")]
Rounds = Annotated[int, typer.Option(min=1, help="repetitions of validation")]
Backends = Annotated[
    Literal["auto", "eager", "compiled"],
    typer.Option(
        "--backend",
        help="what runs forwards; auto: compiled if it can (generate: what the mask was tuned for, eager without one)",
    ),
]
Temperature = Annotated[float, typer.Option(min=0, help="sample at it; 0 decodes greedily")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]


def _load(name: str, dtype: str, device: str, revision: str | None, trust: bool) -> Loaded:
    with err.status(f"loading {escape(name)}"):
        from skipsearch.model.load import load_model

        return load_model(name, dtype=dtype, device=device, revision=revision, trust_remote_code=trust)


def _options(
    source: str, column: str | None, config: str | None, split: str, chat: bool, **settings: Any
) -> SearchOptions:
    from skipsearch.search.options import SearchOptions
    from skipsearch.search.prompts import PromptSource

    prompts = PromptSource(name=source, column=column, config=config, split=split, chat=chat)
    return SearchOptions(source=prompts, **settings)


def _print(data: dict[str, Any], as_json: bool, *shown: Any) -> None:
    if as_json:
        print(json.dumps(data))
    else:
        for part in shown:
            out.print(part, markup=False, soft_wrap=isinstance(part, str))


@app.command()
def run(
    model: Model,
    trials: Annotated[int, typer.Option(min=1, help="finished trials that the study shall hold")] = 200,
    time_budget: Annotated[float | None, typer.Option(min=0, help="seconds for trials")] = None,
    sampler: Annotated[
        Literal["trust-region", "gp", "tpe", "nsga2", "random"] | None,
        typer.Option(help="who proposes masks (default: trust-region, with --pareto nsga2)"),
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="search the front of acceptance against draft cost")] = False,
    space: Annotated[Path | None, typer.Option(help="TOML file with a [space] table: what may be skipped")] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="context length to serve (default: the prompts'); may be repeated")
    ] = None,
    temperature: Temperature = 0.0,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB that replay may take (default: fits)")] = None,
    prompts: PromptsFrom = "builtin", prompt_column: Column = None, prompt_config: Config = None,
    prompt_split: Split = "test", chat: Chat = True, num_prompts: Calibration = 24, num_held_out: HeldOut = 20,
    prompt_tokens: PromptTokens = None, new_tokens: NewTokens = 96, rounds: Rounds = 2, seed: Seed = 0,
    backend: Backends = "auto",
    folder: Annotated[Path | None, typer.Option("--out", help="results folder (default results/<model>)")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL (default SQLite in the folder)")] = None,
    study: Annotated[str, typer.Option(help="name of the study")] = "search",
    dtype: Dtype = "auto", device: Device = "auto", revision: Revision = None, trust: Trust = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Search a mask, validate it on held-out prompts, and write mask.json. Run it again to continue."""
    options = _options(
        prompts, prompt_column, prompt_config, prompt_split, chat, trials=trials, time_budget=time_budget,
        sampler=sampler or ("nsga2" if pareto else "trust-region"), prompts=num_prompts, held_out=num_held_out,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, seed=seed, storage=storage, study=study,
        backend=backend, pareto=pareto, space=space, contexts=tuple(context or ()), temperature=temperature,
        memory=None if memory is None else memory * 1e9,
    )  # fmt: skip
    from skipsearch.report.progress import stages

    loaded = _load(model, dtype, device, revision, trust)
    from skipsearch.report.tables import front_table, summary_table
    from skipsearch.search.run import search, summary

    with stages(err, quiet=as_json) as progress:
        result = search(loaded, out=folder, options=options, progress=progress.stage, report=progress.trials(trials))
    data = summary(result)
    fronts = [front_table(result.front, result.file.provenance.trial)] if pareto else []
    _print(
        data,
        as_json,
        *fronts,
        summary_table(data),
        str(result.mask),
        f"\nNext: {_next_step(model, result.folder, data)}",
    )
    raise typer.Exit(0 if result.file.evidence and result.file.evidence.verdict == "use" else 1)


def _next_step(model: str, folder: Path, data: dict[str, Any]) -> str:
    if data["evidence"]["verdict"] != "use":
        return "this mask does not pay here; try more --trials, other --prompts, or a model that tolerates skipping"
    return f"skipsearch generate --model {model} --mask {folder / 'mask.json'} --prompt 'def read_config(path):'"


@app.command()
def generate(
    model: Model,
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
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    compare: Annotated[bool, typer.Option(help="decode plainly too, and compare speed and tokens")] = False,
    backend: Backends = "auto",
    seed: Seed = 0, dtype: Dtype = "auto", device: Device = "auto", revision: Revision = None, trust: Trust = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Continue a prompt with a mask (or plainly), streaming."""
    if decoding == "mtad" and on_the_fly:
        raise typer.BadParameter("mtad and --on-the-fly exclude each other", param_hint="--decoding")
    if decoding == "mtad" and (mask is None) == (draft_model is None):
        raise typer.BadParameter("mtad drafts with either --mask or --draft-model", param_hint="--decoding")
    of_mtad = {"--beam-width": beam_width, "--threshold": threshold, "--draft-model": draft_model}
    for name, value in {} if decoding == "mtad" else of_mtad.items():
        if value is not None:
            raise typer.BadParameter("it goes with --decoding mtad alone", param_hint=name)
    if compare and mask is None and not (on_the_fly or draft_model):
        raise typer.BadParameter("it compares a mask with plain decoding, so it needs --mask", param_hint="--compare")
    for name, given in {"--save": save, "--share": share}.items():
        if given is not None and not on_the_fly:
            raise typer.BadParameter("nothing is searched without --on-the-fly", param_hint=name)
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"folder {save.absolute().parent} does not exist; make it first", param_hint="--save")
    backend = "eager" if decoding == "mtad" else backend
    tuned = backend if backend != "auto" else "compiled" if on_the_fly else _backend_of(mask)
    loaded = _load(model, dtype, device, revision, trust)
    from skipsearch.decoding.continuation import check_room, continue_text
    from skipsearch.maskfile import load_mask
    from skipsearch.online.auto import self_speculative
    from skipsearch.report.progress import stages
    from skipsearch.report.tables import found_line, generation_line

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    methods = {"plain": self_speculative(None, backend=tuned)}
    if decoding == "mtad":
        small = _load(draft_model, dtype, device, None, trust).model if draft_model else None
        methods["mtad (lossy)"] = self_speculative(
            mask, decoding="mtad", beam_width=beam_width, threshold=threshold, draft_model=small
        )
    elif on_the_fly:
        methods["on the fly"] = self_speculative("auto", start=mask, seed=seed, share=share, backend=tuned)
    elif mask is not None:
        methods["mask"] = self_speculative(mask, backend=tuned)
    if len(methods) > 1 and not compare:
        del methods["plain"]
    results: dict[str, Any] = {}
    tuner = None
    check_room(loaded, prompt, max_new_tokens)
    with stages(err, quiet=as_json) as progress:
        for method in methods.values():  # warm-up, so that the first arm pays for nothing alone
            few = {**settings, "max_new_tokens": min(16 if compare else 2, max_new_tokens)}
            continue_text(loaded, prompt, method, stream=False, progress=progress.stage, **few)
    if on_the_fly:
        tuner = methods["on the fly"].tuner_for(loaded.model)
    for name, method in methods.items():
        if not as_json and len(methods) > 1:
            out.rule(name)
        results[name] = continue_text(loaded, prompt, method, stream=not as_json, **settings)
        if tuner is not None and name == "on the fly":
            results[name]["search"] = tuner.report()
        if not as_json:
            out.print(generation_line(results[name]))
            if name == "on the fly":
                out.print(found_line(results[name]["search"]))
    equal = None
    if len(results) > 1 and temperature == 0 and decoding == "lossless":
        equal = len({tuple(result["tokens"]) for result in results.values()}) == 1
        if not as_json:
            out.print("same tokens as plain decoding" if equal else "tokens differ from plain decoding")
    elif len(results) > 1 and not as_json:
        why = "mtad is lossy by design" if decoding == "mtad" else "they are samples"
        out.print(f"the two texts may differ: {why}")
    if as_json:
        print(json.dumps({**results, "greedy_equal": equal}))
    if save is not None and tuner is not None:
        tuner.save(save, loaded.name)
        if not as_json:
            kept = mask is not None and load_mask(save).mask == load_mask(mask).mask
            found = "the mask it began with, which nothing beat" if kept else "what was found"
            out.print(f"saved {found}; next: skipsearch validate {save} --model {model}")
    # In half precision verifying several rows at once may round differently: a difference is no failure there.
    raise typer.Exit(1 if equal is False and str(loaded.model.dtype) == "torch.float32" else 0)


def _backend_of(mask: Path | None) -> str:
    """The backend that a mask was tuned for: with --compare both arms take it."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask) if mask is not None else None
    return file.evidence.backend if file is not None and file.evidence is not None else "eager"


@app.command()
def validate(
    mask: Annotated[Path, typer.Argument(help="mask.json")],
    model: Model = "demo",
    prompts: PromptsFrom = "builtin", prompt_column: Column = None, prompt_config: Config = None,
    prompt_split: Split = "test", chat: Chat = True, num_prompts: Calibration = 24, num_held_out: HeldOut = 20,
    prompt_tokens: PromptTokens = None, new_tokens: NewTokens = 96, rounds: Rounds = 2, seed: Seed = 0,
    backend: Backends = "auto", temperature: Temperature = 0.0,
    write: Annotated[bool, typer.Option(help="put the new evidence into the mask file")] = False,
    audited: Annotated[
        bool, typer.Option("--audit", help="instead of timing, explain every difference from plain decoding in fp32")
    ] = False,
    dtype: Dtype = "auto", device: Device = "auto", revision: Revision = None, trust: Trust = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Time a mask against plain decoding on held-out prompts of this machine."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask)
    options = _options(
        prompts, prompt_column, prompt_config, prompt_split, chat, prompts=num_prompts, held_out=num_held_out,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, seed=seed, backend=backend,
        temperature=temperature,
    )  # fmt: skip
    loaded = _load(model, dtype, device, revision, trust)
    from skipsearch.model.load import check_mask_belongs
    from skipsearch.report.progress import stages
    from skipsearch.report.tables import mask_table
    from skipsearch.search.run import validate_file

    check_mask_belongs(file, loaded.model)
    if audited:
        from skipsearch.report.tables import audit_table
        from skipsearch.search.run import audit_file

        with stages(err, quiet=as_json) as progress:
            found = audit_file(loaded, file, options, progress.stage).to_dict()
        _print(found, as_json, audit_table(found))
        raise typer.Exit(0 if found["passed"] else 1)
    with stages(err, quiet=as_json) as progress:
        fresh = validate_file(loaded, file, options, progress.stage)
    if write:
        fresh.save(mask)
    _print(fresh.model_dump(mode="json"), as_json, mask_table(fresh))
    raise typer.Exit(0 if fresh.evidence and fresh.evidence.verdict == "use" else 1)


@app.command()
def bench(
    model: Model = "demo",
    mask: Annotated[Path | None, typer.Option(help="mask.json; without it, arms that need none")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", help="builtin, random, or a file (Spec-Bench: a group a task); may be repeated"),
    ] = None,
    per_group: Annotated[int, typer.Option(min=2, help="prompts of each group")] = 8,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="an arm beside plain; may be repeated")] = None,
    hf: Annotated[bool, typer.Option(help="measure transformers' own ways too")] = True,
    new_tokens: NewTokens = 96, rounds: Rounds = 2, backend: Backends = "auto", seed: Seed = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="results folder (default results/<model>)")] = None,
    dtype: Dtype = "auto", device: Device = "auto", revision: Revision = None, trust: Trust = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Time every way to decode side by side: transformers' own, plain, n-grams, the mask, both."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask) if mask is not None else None
    loaded = _load(model, dtype, device, revision, trust)
    from skipsearch.bench.bench import BenchOptions, bench_file
    from skipsearch.report.bench import bench_title, counts_table, groups_table, save_bench, speed_table
    from skipsearch.report.progress import stages

    options = BenchOptions(
        new_tokens=new_tokens, rounds=rounds, backend=backend, hf=hf, only=tuple(arm or ()), seed=seed,
        sources=tuple(prompts or ("builtin",)), per_group=per_group,
    )  # fmt: skip
    with stages(err, quiet=as_json) as progress:
        data = bench_file(loaded, file, options, progress.stage)
    paths = save_bench(data, folder or Path("results") / loaded.name)
    tables = (bench_title(data), speed_table(data), counts_table(data), groups_table(data))
    _print({**data, "files": paths}, as_json, *tables, f"picture: {paths['bench.svg']}")


@app.command()
def show(mask: Annotated[Path, typer.Argument(help="mask.json")], as_json: Json = False, debug: Debug = False) -> None:
    """Draw a mask file: a row of cells for each kind of sublayer, and its evidence."""
    from skipsearch.maskfile import load_mask
    from skipsearch.report.tables import mask_table

    file = load_mask(mask)
    _print(file.model_dump(mode="json"), as_json, mask_table(file))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="skip_layers.json of Self-SD or SWIFT")],
    layers: Annotated[int, typer.Option(min=1, help="decoder layers of the model")],
    to: Annotated[Path, typer.Option("--to", help="mask file to write")] = Path("mask.json"),
    key: Annotated[str | None, typer.Option(help="which entry of the file")] = None,
    model_id: Annotated[str, typer.Option(help="hub id to note in the file")] = "unknown",
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Turn a skip set of Self-SD or SWIFT into a mask file."""
    from skipsearch.maskfile import import_mask
    from skipsearch.report.tables import mask_table

    file = import_mask(source, num_layers=layers, key=key, model_id=model_id)
    file.save(to)
    _print({"file": str(to), **file.model_dump(mode="json")}, as_json, mask_table(file), f"written to {to}")


@app.command()
def models(
    families: Annotated[
        bool, typer.Option("--families", help="instead of presets, model families, each proven or refused here and now")
    ] = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """List the presets, or the families of models that can be skipped in."""
    if families:
        from dataclasses import asdict

        from skipsearch.model.families import FAMILIES, prove
        from skipsearch.report.tables import family_table

        with err.status("building a tiny model of each family, and proving its sublayers"):
            rows = [asdict(prove(family)) for family in FAMILIES]
        count = sum(row["supported"] for row in rows)
        data = {"families": rows, "supported": count, "refused": len(rows) - count}
        _print(data, as_json, family_table(data), f"{count} supported, {len(rows) - count} refused")
        return
    from skipsearch.model.preset import presets
    from skipsearch.report.tables import preset_table

    found = presets()
    data = {
        n: {"id": p.model_id, "num_layers": p.num_layers, "masks": [m.name for m in p.masks]} for n, p in found.items()
    }
    _print(data, as_json, preset_table(data))


@app.command()
def dashboard(
    results: Annotated[Path | None, typer.Argument(help="a results folder or study.db (default: newest)")] = None,
    storage: Annotated[str | None, typer.Option(help="an Optuna storage URL instead")] = None,
    host: str = "127.0.0.1", port: Annotated[int, typer.Option(min=0, max=65535)] = 8080, debug: Debug = False,
) -> None:  # fmt: skip
    """Open optuna-dashboard on a study."""
    from skipsearch.report.dashboard import serve

    serve(results, storage, host, port, announce=lambda line: err.print(line, markup=False, soft_wrap=True))


@app.command()
def doctor(
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="instead, check the cost model against real decoding (minutes)")
    ] = False,
    model: Model = "demo", backend: Backends = "auto", seed: Seed = 0, dtype: Dtype = "auto", device: Device = "auto",
    revision: Revision = None, trust: Trust = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Print versions, device and backend, and what is missing; or calibrate."""
    if calibrated:
        loaded = _load(model, dtype, device, revision, trust)
        from skipsearch.report.progress import stages
        from skipsearch.report.tables import calibration_table
        from skipsearch.search.calibrate import calibrate

        options = _options("builtin", None, None, "test", True, seed=seed, backend=backend)
        with stages(err, quiet=as_json) as progress:
            data = calibrate(loaded, options, progress.stage)
        _print(data, as_json, *(calibration_table(found) for found in data["contexts"]), _calibration_verdict(data))
        raise typer.Exit(0 if data["passed"] else 1)
    from skipsearch.report.doctor import examine
    from skipsearch.report.tables import doctor_table

    data = examine()
    _print(data, as_json, doctor_table(data))
    raise typer.Exit(1 if data["missing"] else 0)


def _calibration_verdict(data: dict[str, Any]) -> str:
    if data["passed"]:
        return "the cost model foretells tokens per second here"
    return "the cost model does not foretell tokens per second well here; is the machine busy with something else?"


def main() -> None:
    """Entry point: turns our errors into one line, and an interruption into exit 130."""
    import logging
    import os
    import warnings

    debug = "--debug" in sys.argv
    if not debug:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("once", category=BackendWarning)
        warnings.showwarning = lambda message, *_, **__: err.print(f"note: {message}", markup=False, soft_wrap=True)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # our error says it; the library says it again
    try:
        app()
    except SkipsearchError as error:
        if debug:
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", markup=True, highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # typer makes 130 of an interruption
            raise
        err.print("\ninterrupted; every finished trial is kept, run the same command again to continue", soft_wrap=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
