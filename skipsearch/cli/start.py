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
    """Find a cheap draft inside an LLM (sublayers skipped or quantised), prove that it pays, and decode with it."""
    if tell_version:
        print(version("skipsearch"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        for line in (*_from_here(), "All commands: skipsearch --help"):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def _from_here() -> tuple[str, ...]:
    """What the newest results folder holds, and the command to go on with."""
    files = [path for name in ("mask.json", "trace.json") for path in Path("results").glob(f"*/{name}")]
    if not files:
        return (
            "No results/*/mask.json here yet. `demo` is the bundled model; yours: a hub id, folder or .gguf file.",
            "Next: skipsearch run --model demo    # or ./my-model",
        )
    folder = max(files, key=lambda path: path.stat().st_mtime).parent
    path = folder / "mask.json"
    if not path.exists():
        return f"{folder}: a run that has not finished.", "Next: the same `skipsearch run` again; it goes on"
    from skipsearch.files import read_checked
    from skipsearch.maskfile import load_mask
    from skipsearch.search.verdict import next_of

    file = load_mask(path)
    proof, then = file.evidence, f"Next: {next_of(file, path, read_checked(folder / 'summary.json', dict))}"
    if proof is None:
        return f"{path}: not timed yet.", then
    low, high = proof.speedup_ci
    said = f"{path}: {proof.verdict}, {proof.speedup:.2f}x ({low:.2f} to {high:.2f}) over plain decoding."
    code = f'model.generate(**inputs, custom_generate=skipsearch.self_speculative("{path}"))'
    return (said, then, f"In Python: {code}") if proof.verdict == "use" else (said, then)
