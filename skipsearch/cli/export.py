"""`skipsearch export`: the draft for other engines and tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from skipsearch.cli import options as opt


@opt.command("export results/demo/mask.json --model demo --to hf --out demo-draft")
def export(
    mask: Annotated[Path, typer.Argument(help="mask.json")],
    model: opt.Model,
    to: Annotated[
        Literal["hf", "nemotron-nas", "mergekit", "gguf", "custom-generate"],
        typer.Option(help="hf: a checkpoint without the skipped layers; nemotron-nas: without the skipped sublayers"),
    ],
    folder: Annotated[Path, typer.Option("--out", help="folder to write; must not exist, or be empty")],
    dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None, trust: opt.Trust = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Write the draft for another engine or tool, load it back, and compare it with the draft view."""
    from skipsearch.maskfile import load_mask

    file = load_mask(mask)
    loaded = opt.load(model, dtype, device, revision, trust)
    from skipsearch.export.draft import Draft
    from skipsearch.export.export import export_mask
    from skipsearch.model.load import weights_of

    draft = Draft(loaded=loaded, file=file, weights=weights_of(model), trust=trust)
    with opt.err.status("writing, loading back, comparing"):
        data = export_mask(draft, to, folder)
    opt.print_result(data, as_json, *_lines(data))


def _lines(data: dict[str, Any]) -> list[str]:
    size = sum(data["files"].values()) / 1e6
    check = data["check"]
    how = "layers read back" if data["format"] == "mergekit" else "loaded back"
    compared = (
        f"{how}: logits of {check['tokens']} random tokens differ by {check['largest_difference']:.3g} from the "
        f"draft view's at most, the likeliest tokens are {'the same' if check['same_argmax'] else 'not all the same'}"
        if "largest_difference" in check
        else f"decoded {check['tokens']} tokens with it, {'' if check['same_tokens'] else 'not '}the same as plainly"
    )
    what = f"{data['layers']} of {data['of']} layers, {data['skipped']} of {2 * data['of']} sublayers skipped"
    return [f"{data['folder']}: {data['format']}, {what}, {size:.1f} MB", compared, f"Next: {data['next']}"]
