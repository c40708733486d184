"""`skipsearch run`: search a mask, validate it, and export it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from skipsearch.cli import options as opt


@opt.command("run --model demo --trials 50 --time-budget 120")
def run(
    model: opt.Model,
    trials: Annotated[int, typer.Option(min=1, help="number of finished trials in the study")] = 200,
    time_budget: Annotated[
        float, typer.Option(min=0, help="seconds for the run; the first compilation comes on top; 0: no limit")
    ] = 330,
    sampler: Annotated[
        Literal["trust-region", "gp", "tpe", "nsga2", "random"] | None,
        typer.Option(help="what proposes masks (default: trust-region; with --pareto nsga2)"),
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="search the front of acceptance against draft cost")] = False,
    space: Annotated[Path | None, typer.Option(help="TOML file with a [space] table: what may be skipped")] = None,
    context: opt.Contexts = None,
    temperature: opt.Temperature = None,
    memory: opt.Memory = None,
    prompts: opt.PromptsFrom = "builtin", prompt_column: opt.Column = None, prompt_config: opt.Config = None,
    prompt_split: opt.Split = "test", chat: opt.Chat = True,
    num_prompts: opt.Calibration = 24, num_held_out: opt.HeldOut = 20,
    prompt_tokens: opt.PromptTokens = None, new_tokens: opt.NewTokens = 96, rounds: opt.Rounds = 2, seed: opt.Seed = 0,
    backend: opt.Backends = "auto",
    folder: opt.Folder = None,
    storage: Annotated[
        str | None,
        typer.Option(envvar="SKIPSEARCH_STORAGE", help="Optuna storage URL (default SQLite in the folder)"),
    ] = None,
    study: opt.StudyName = "search",
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="processes here that run trials, one per GPU where there are several")
    ] = 1,
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Search what the draft skips and quantises, validate it on held-out prompts, and write mask.json.

    Run it again to continue.
    """
    begin = time.monotonic()
    options = opt.search_options(
        prompts, prompt_column, prompt_config, prompt_split, chat, trials=trials, time_budget=time_budget or None,
        sampler=sampler or ("nsga2" if pareto else "trust-region"), prompts=num_prompts, held_out=num_held_out,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, seed=seed, storage=storage, study=study,
        workers=workers, backend=backend, pareto=pareto, space=space, contexts=tuple(context or ()),
        temperature=temperature, memory=None if memory is None else memory * 1e9,
    )  # fmt: skip
    from skipsearch.report.progress import stages

    if storage is not None:  # a wrong URL is told before a large model is loaded
        from skipsearch.search.storage import open_storage

        open_storage(storage).engine.dispose()
    loaded = opt.load(model, dtype, device, revision, trust)
    loading = time.monotonic() - begin
    if options.time_budget is not None:
        options = replace(options, time_budget=max(1.0, options.time_budget - loading))
    from skipsearch.errors import SkipsearchError
    from skipsearch.files import read_checked
    from skipsearch.report.cells import draw_plan, draw_sensitivity
    from skipsearch.report.page import write_report
    from skipsearch.report.summary import summary_table
    from skipsearch.report.tables import front_table
    from skipsearch.search.result import summary
    from skipsearch.search.run import search
    from skipsearch.search.verdict import verdict_line

    with stages(opt.err, quiet=as_json) as progress:
        result = search(loaded, out=folder, options=options, progress=progress.stage, report=progress.best)
    result.seconds["load"] = loading
    data = summary(result)
    fronts = [front_table(result.front, result.file.provenance.trial)] if pareto else []
    try:
        page = data["files"]["report.html"] = write_report(result.folder)["report"]
    except SkipsearchError as error:  # the results are told all the same
        page = f"not written: {error}"
    cells = draw_plan(result.plan)
    layers = result.mask.num_layers
    drawn = read_checked(result.folder / "sensitivity.json", lambda data: draw_sensitivity(data["loss"], layers))
    if drawn is not None:  # None: of a study that was finished elsewhere
        cells.append("\n").append_text(drawn)
    opt.print_result(
        data,
        as_json,
        verdict_line(data),
        *fronts,
        summary_table(data),
        cells,
        f"\nReport: {page}",
        f"Next: {data['next']}",
    )
    raise typer.Exit(0 if result.file.evidence and result.file.evidence.verdict == "use" else 1)
