"""Commands about files and presets: show, report, import, models, dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipsearch.cli import options as opt


@opt.command("show results/demo/mask.json")
def show(
    mask: Annotated[Path, typer.Argument(help="mask.json")], as_json: opt.Json = False, debug: opt.Debug = False
) -> None:
    """Draw a mask file, one row of cells for each kind of sublayer, and print its evidence."""
    from skipsearch.maskfile import load_mask
    from skipsearch.report.tables import mask_table

    file = load_mask(mask)
    opt.print_result(file.model_dump(mode="json"), as_json, mask_table(file))


@opt.command("report results/demo")
def report(
    results: Annotated[Path, typer.Argument(help="a results folder, as `skipsearch run` leaves it")],
    out: Annotated[Path | None, typer.Option(help="file to write (default: report.html in the folder)")] = None,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Write what a run found as one HTML page that needs no network."""
    from skipsearch.report.page import write_report

    data = write_report(results, out)
    lacking = f"; it says what is missing: {', '.join(data['lacks'])}" if data["lacks"] else ""
    opt.print_result(data, as_json, f"written to {data['report']}{lacking}")


@opt.command("import skip_layers.json --layers 40 --to mask.json", name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="skip_layers.json of Self-SD or SWIFT")],
    layers: Annotated[int, typer.Option(min=1, help="decoder layers of the model")],
    to: Annotated[Path, typer.Option("--to", help="mask file to write")] = Path("mask.json"),
    key: Annotated[str | None, typer.Option(help="which entry of the file; needed if it has several")] = None,
    model_id: Annotated[str, typer.Option(help="hub id to write into the file")] = "unknown",
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Turn a skip set of Self-SD or SWIFT into a mask file."""
    from skipsearch.maskimport import import_mask
    from skipsearch.report.tables import mask_table

    file = import_mask(source, num_layers=layers, key=key, model_id=model_id)
    file.save(to)
    opt.print_result({"file": str(to), **file.model_dump(mode="json")}, as_json, mask_table(file), f"written to {to}")


@opt.command("models --families")
def models(
    families: Annotated[
        bool, typer.Option("--families", help="list model families instead of presets; each is tested now")
    ] = False,
    as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """List the presets, or the model families whose sublayers can be skipped."""
    if families:
        from dataclasses import asdict

        from transformers.utils import logging

        from skipsearch.model.families import FAMILIES, prove
        from skipsearch.report.tables import family_table

        logging.set_verbosity_error()  # what the library says of tiny configurations
        with opt.err.status("building a tiny model of each family, and proving its sublayers"):
            rows = [asdict(prove(family)) for family in FAMILIES]
        count = sum(row["supported"] for row in rows)
        data: dict[str, Any] = {"families": rows, "supported": count, "refused": len(rows) - count}
        opt.print_result(data, as_json, family_table(data), f"{count} supported, {len(rows) - count} refused")
        return
    from skipsearch.model.preset import presets
    from skipsearch.report.tables import preset_table

    data = {
        name: {
            "id": preset.model_id,
            "package": preset.package,
            "num_layers": preset.num_layers,
            "masks": [mask.name for mask in preset.masks],
        }
        for name, preset in presets().items()
    }
    opt.print_result(data, as_json, preset_table(data))


@opt.command("dashboard results/demo")
def dashboard(
    results: Annotated[Path | None, typer.Argument(help="a results folder or study.db (default: newest)")] = None,
    storage: Annotated[str | None, typer.Option(help="an Optuna storage URL, instead of results")] = None,
    host: str = "127.0.0.1", port: Annotated[int, typer.Option(min=0, max=65535)] = 8080, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Open optuna-dashboard on a study."""
    from skipsearch.report.dashboard import serve

    serve(results, storage, host, port, announce=lambda line: opt.err.print(line, markup=False, soft_wrap=True))
