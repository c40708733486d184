"""Commands that measure: validate, bench, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipsearch.cli import options as opt


@opt.command("validate results/demo/mask.json --model demo --num-held-out 40")
def validate(
    mask: Annotated[Path, typer.Argument(help="mask.json")],
    model: opt.ModelOfMask = None,
    prompts: opt.PromptsFrom = "builtin", prompt_column: opt.Column = None, prompt_config: opt.Config = None,
    prompt_split: opt.Split = "test", chat: opt.Chat = True,
    num_prompts: opt.Calibration = 24, num_held_out: opt.HeldOut = 20,
    prompt_tokens: opt.PromptTokens = None, new_tokens: opt.NewTokens = 96, rounds: opt.Rounds = 2, seed: opt.Seed = 0,
    backend: opt.Backends = "auto", temperature: opt.Temperature = None, context: opt.Contexts = None,
    write: Annotated[bool, typer.Option(help="write the new evidence into the mask file")] = False,
    audited: Annotated[
        bool, typer.Option("--audit", help="do not time; explain every difference from plain decoding in fp32")
    ] = False,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Time a mask against plain decoding on this machine, with held-out prompts."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask)
    options = opt.search_options(
        prompts, prompt_column, prompt_config, prompt_split, chat, prompts=num_prompts, held_out=num_held_out,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, seed=seed, backend=backend,
        temperature=temperature, contexts=tuple(context or ()),
    )  # fmt: skip
    from skipsearch.model.preset import name_of

    model = model or name_of(file.model.id)
    if model is None:  # the file names it, and does not say where it lies
        raise typer.BadParameter(f"the mask is for {file.model.id}; say where that lies", param_hint="--model")
    loaded = opt.load(model, dtype, device, revision, trust)
    from skipsearch.model.identity import check_mask_belongs
    from skipsearch.report.progress import stages
    from skipsearch.report.tables import mask_table
    from skipsearch.search.revalidate import validate_file

    check_mask_belongs(file, loaded.target)
    if audited:
        from skipsearch.report.tables import audit_table
        from skipsearch.search.revalidate import audit_file

        with stages(opt.err, quiet=as_json) as progress:
            found = audit_file(loaded, file, options, progress.stage).to_dict()
        opt.print_result(found, as_json, audit_table(found))
        raise typer.Exit(0 if found["passed"] else 1)
    with stages(opt.err, quiet=as_json) as progress:
        fresh = validate_file(loaded, file, options, progress.stage)
    if write:
        fresh.save(mask)
    opt.print_result(fresh.model_dump(mode="json"), as_json, mask_table(fresh))
    raise typer.Exit(0 if fresh.evidence and fresh.evidence.verdict == "use" else 1)


@opt.command("bench --model demo --mask results/demo/mask.json --prompts builtin:code --no-hf")
def bench(
    model: opt.Model = "demo",
    mask: Annotated[Path | None, typer.Option(help="mask.json; without it, only arms that need no mask")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts", help="builtin[:code|:chat], random, or a file (Spec-Bench: a group per task); may be repeated"
        ),
    ] = None,
    per_group: Annotated[int, typer.Option(min=2, help="prompts of each group")] = 8,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="an arm besides plain; may be repeated")] = None,
    hf: Annotated[bool, typer.Option(help="also measure transformers' own methods")] = True,
    new_tokens: opt.NewTokens = 96, rounds: opt.Rounds = 2, backend: opt.Backends = "auto", seed: opt.Seed = 0,
    temperature: opt.Temperature = None, folder: opt.Folder = None,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Time all decoding methods side by side: transformers' own, plain, n-grams, the mask, both."""
    from skipsearch.bench.groups import RANDOM
    from skipsearch.evaluate.prompts import check_source
    from skipsearch.maskfile import load_mask

    file = load_mask(mask) if mask is not None else None
    for source in prompts or ():
        if source != RANDOM:
            check_source(source)
    loaded = opt.load(model, dtype, device, revision, trust)
    from skipsearch.bench.bench import BenchOptions, bench_file
    from skipsearch.files import results_folder
    from skipsearch.report.bench import bench_title, counts_table, groups_table, save_bench, speed_table
    from skipsearch.report.progress import stages

    options = BenchOptions(
        new_tokens=new_tokens, rounds=rounds, backend=backend, hf=hf, only=tuple(arm or ()), seed=seed,
        sources=tuple(prompts or ("builtin",)), per_group=per_group, temperature=temperature,
    )  # fmt: skip
    with stages(opt.err, quiet=as_json) as progress:
        data = bench_file(loaded, file, options, progress.stage)
    paths = save_bench(data, folder or results_folder(loaded.name))
    tables = (bench_title(data), speed_table(data), counts_table(data), groups_table(data))
    opt.print_result({**data, "files": paths}, as_json, *tables, f"picture: {paths['bench.svg']}")


@opt.command("doctor")
def doctor(
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="instead, compare the cost model with real decoding (takes minutes)")
    ] = False,
    model: opt.Model = "demo", backend: opt.Backends = "auto", seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Print versions, device and backend, and what is missing; or calibrate."""
    if calibrated:
        loaded = opt.load(model, dtype, device, revision, trust)
        from skipsearch.compiled.backend import with_backend
        from skipsearch.evaluate.calibrate import calibrate
        from skipsearch.report.progress import stages
        from skipsearch.report.tables import calibration_table
        from skipsearch.search.options import SearchOptions
        from skipsearch.search.prepare import chosen_prompts

        options = SearchOptions(seed=seed, backend=backend)
        with stages(opt.err, quiet=as_json) as progress:
            prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).calibration
            target = with_backend(loaded.target, backend, progress.stage)
            data = {"model": loaded.name, **calibrate(target, prompts, progress.stage, seed=seed)}
        opt.print_result(data, as_json, *map(calibration_table, data["contexts"]), _calibration_verdict(data))
        raise typer.Exit(0 if data["passed"] else 1)
    from skipsearch.report.doctor import examine
    from skipsearch.report.tables import doctor_table

    data = examine()
    opt.print_result(data, as_json, doctor_table(data))
    raise typer.Exit(1 if data["missing"] else 0)


def _calibration_verdict(data: dict[str, Any]) -> str:
    if data["passed"]:
        return "the cost model predicts tokens per second here"
    return "the cost model does not predict tokens per second well here; is the machine busy with something else?"
