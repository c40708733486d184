"""report.html: what a results folder holds, as one page without scripts that needs no network.

A file that is missing or damaged costs its section, which says so in one line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from skipsearch.errors import ResultsError, first_line
from skipsearch.files import read_checked, write_text
from skipsearch.maskfile import MaskFile, load_mask
from skipsearch.report import sections
from skipsearch.search.verdict import next_of, verdict_line

REPORT = "report.html"
MASK = "mask.json"
WIDE = ("Held-out prompts, one by one", "Set-up")
Draw = Callable[[MaskFile, Any, Any], str]  # mask.json, the section's file (of mask.json: the summary), a second one
SECTIONS: dict[str, tuple[str, str, Draw]] = {  # by title: file, second file, content
    "What drafts": (MASK, "", sections.plan),
    "What one sublayer does alone": ("sensitivity.json", "", sections.sensitivity),
    "Predicted and measured": ("summary.json", "", sections.measured),
    "Trials": ("trials.csv", "", sections.history),
    "Acceptance against cost": ("front.json", "trials.csv", sections.front),
    "Where the seconds went": ("summary.json", "", sections.seconds),
    WIDE[0]: ("validation.json", "texts.json", sections.prompts),
    WIDE[1]: (MASK, "", sections.set_up),
}
FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error)
NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the report of a results folder.

    Returns:
        "report", its path; "verdict", None if nothing was validated; "lacks", the files of which it shows nothing.

    Raises:
        ResultsError: there is no such folder, or it holds no mask.json; or the report cannot be written.
        MaskError: mask.json is damaged.
    """
    command = f"`skipsearch run --model MODEL --out {folder}`"
    if not folder.is_dir():
        raise ResultsError(f"results folder {folder} does not exist; make it with {command}, or check the path")
    if not (folder / MASK).exists():
        raise ResultsError(f"results folder {folder} holds no {MASK}; make one with {command}")
    file, lacks, out = load_mask(folder / MASK), list[str](), out or folder / REPORT
    try:
        summary = _read(folder, "summary.json")
    except FAULTS:
        summary = {}  # the sections that need it say so
    body = [_section(folder, file, summary, title, lacks) for title in SECTIONS]
    name, css = escape(file.model.id), files("skipsearch.report").joinpath("page.css").read_text("utf-8")
    write_text(out, (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: skipsearch</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">\n<style>\n{css}</style></head>\n<body>'
        f"<header><h1>{name}: what its draft skips and quantises</h1>{_lead(file, summary, folder / MASK)}</header>\n"
        f"<main>{''.join(body)}</main></body></html>\n"
    ))  # fmt: skip
    return {"report": str(out), "verdict": file.evidence and file.evidence.verdict, "lacks": lacks}


def _read(folder: Path, name: str) -> Any:
    """A file of the folder, parsed; ResultsError says in a sentence why not."""
    path, made = folder / name, f"`skipsearch run --out {folder}` makes it"
    if not path.exists():
        raise ResultsError(f"{name} is not in this folder; {made}.")
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    found = read_checked(path, lambda data: data)
    if found is None:
        raise ResultsError(f"{name} is damaged or was changed; {made} anew.")
    return found


def _section(folder: Path, file: MaskFile, summary: Any, title: str, lacks: list[str]) -> str:
    """One section; the name of a file that it could not show is added to `lacks`."""
    (name, second, draw), body, why = SECTIONS[title], "", ""
    try:
        data = summary if name == MASK else _read(folder, name)
        if second:
            try:
                body = draw(file, data, _read(folder, second))
            except FAULTS as error:
                why = _why(second, error)
        body = body or draw(file, data, None)
    except FAULTS as error:
        why, second = _why(name, error), name
    if why:
        body += f'<p class="lacks">{escape(why)}</p>'
        lacks += [second] * (second not in lacks)
    return f'<section class="{"wide" if title in WIDE else ""}"><h2>{title}</h2>{body}</section>\n'


def _why(name: str, error: Exception) -> str:
    ours = isinstance(error, ResultsError)
    return str(error) if ours else f"{name} holds what this version cannot show ({first_line(error)})."


def _lead(file: MaskFile, summary: Any, mask: Path) -> str:
    """Whether it is worth it, in one sentence, and what to do next."""
    proof, said, then = file.evidence, "", next_of(file, mask, summary)
    if proof is None:
        return (
            f'<p class="lead">Not validated: whether it pays is not known.</p><p>Next: <code>{escape(then)}</code></p>'
        )
    try:
        if summary["evidence"] == proof.model_dump(mode="json"):  # else it was validated again since
            said = verdict_line(summary)
    except FAULTS:
        pass
    if not said:
        low, high = proof.speedup_ci
        found = f"{proof.speedup:.2f}x ({low:.2f} to {high:.2f}) over plain decoding"
        said = f"It pays: {found}." if proof.verdict == "use" else f"It is not proven to pay: {found}."
    pays, then = proof.verdict == "use", escape(then)
    return (
        f'<p class="lead"><span class="verdict {"yes" if pays else "no"}">{proof.verdict}</span> {escape(said)}</p>'
        f"<p>Next: {f'<code>{then}</code>' if pays else then}</p>"
    )
