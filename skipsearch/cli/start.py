"""`skipsearch` without a command: the next step from here, or the version."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from skipsearch.cli.options import app, out


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context, tell_version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    """Find which sublayers an LLM may skip while drafting, prove it, and decode with it."""
    if tell_version:
        print(version("skipsearch"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        for line in (*_from_here(), "All commands: skipsearch --help"):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def _from_here() -> tuple[str, str]:
    """What the newest results folder holds, and the command to go on with."""
    found = sorted(Path("results").glob("*/mask.json"), key=lambda path: path.stat().st_mtime)
    begun = sorted(Path("results").glob("*/trace.json"), key=lambda path: path.stat().st_mtime)
    if begun and not (begun[-1].parent / "mask.json").exists():
        return (
            f"{begun[-1].parent}: a run that has not finished.",
            "Next: the same `skipsearch run` again; it goes on where it stopped",
        )
    if not found:
        return (
            "No results/*/mask.json here yet. `demo` is the bundled model; yours: a hub id, folder or .gguf file.",
            "Next: skipsearch run --model demo    # or ./my-model",
        )
    from skipsearch.files import read_checked
    from skipsearch.maskfile import load_mask
    from skipsearch.model.preset import name_of
    from skipsearch.search.verdict import next_step

    path = found[-1]
    file = load_mask(path)
    if file.evidence is None:
        return f"{path}: not timed yet.", f"Next: skipsearch validate {path} --model {name_of(file.model.id)}"
    verdict = file.evidence.verdict
    cut_short = read_checked(path.parent / "summary.json", lambda data: bool(data["cut_short"]))
    return f"{path}: {verdict}.", f"Next: {next_step(verdict, name_of(file.model.id), path, cut_short=bool(cut_short))}"
