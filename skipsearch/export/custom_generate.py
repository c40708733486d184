"""`custom-generate`: a folder in the Hub's layout for decoding methods, so that anybody decodes with the plan.

`generate` copies `generate.py` away from the folder (of a Hub repository it downloads no other file but the
requirements), so the mask file stands in it as text; the `mask.json` beside is for other uses.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from skipsearch.errors import BackendWarning, ExportError, shown
from skipsearch.export.draft import Draft
from skipsearch.files import write_text

NEW_TOKENS = 12  # decoded for the check
CODE = '''"""Self-speculative decoding with the draft plan below; made by `skipsearch export`."""

import functools
import json

import skipsearch
from skipsearch.maskfile import parse_mask

MASK = r"""{mask}"""


@functools.cache
def method(**settings):
    """One method for each set of settings, so that what it has measured and compiled stays."""
    return skipsearch.self_speculative(parse_mask(json.loads(MASK)), **settings)


def generate(model, backend=None, deterministic=False, **arguments):
    """Called by `model.generate` with its own arguments."""
    settings = {{"backend": backend, "deterministic": deterministic}}
    return model.generate(**arguments, custom_generate=method(**settings))
'''
CARD = """---
library_name: transformers
base_model: {base}
tags:
- custom_generate
- speculative-decoding
---

# Self-speculative decoding of {model}

The model drafts for itself, with some sublayers skipped or quantised, and verifies: the output is its own.

    pip install skipsearch
    model.generate(**inputs, custom_generate="{folder}", trust_remote_code=True)

{evidence}

What the draft does ({layers} layers):

    {cells}
"""


def write(draft: Draft, folder: Path) -> str:
    """Write code, requirements and card; returns how they are used."""
    mask = (folder / "mask.json").read_text(encoding="utf-8").strip()
    assert '"""' not in mask  # JSON escapes quotes, so whatever the file holds stays a text
    write_text(folder / "custom_generate" / "generate.py", CODE.format(mask=mask))
    write_text(folder / "custom_generate" / "requirements.txt", f"skipsearch>={version('skipsearch')}\n")
    name = draft.file.model.id
    card = CARD.format(
        base=json.dumps(name), model=shown(name)[1:-1], folder=folder.name, evidence=_evidence(draft),
        layers=draft.mask.num_layers, cells=str(draft.file.plan).replace("\n", "\n    "),
    )  # fmt: skip
    write_text(folder / "README.md", card)
    return f"model.generate(**inputs, custom_generate={str(folder)!r}, trust_remote_code=True)"


def _evidence(draft: Draft) -> str:
    found = draft.file.evidence
    if found is None:
        return "It was never measured: `skipsearch validate mask.json` does it."
    low, high = found.speedup_ci
    served = f", {found.served_speedup:.2f} times as served" if found.served_speedup else ""
    return (
        f"Measured on {found.prompts} held-out prompts ({found.backend}, {found.dtype}, {found.device}): "
        f"{found.speedup:.2f} times ({low:.2f} to {high:.2f}) the tokens per second of {found.baseline}{served}, "
        f"acceptance rate {found.acceptance_rate:.2f}. Verdict: {found.verdict}."
    )


@torch.no_grad()
def compare(draft: Draft, folder: Path) -> dict[str, Any]:
    """Decode random tokens with the folder and plainly.

    Raises:
        ExportError: in float32 the tokens differ.
    """
    model = draft.model
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "inputs": draft.loaded.target.random_ids(8)}
    with warnings.catch_warnings():  # compiling would take a minute, and gives the same tokens
        warnings.simplefilter("ignore", BackendWarning)
        got = model.generate(**options, custom_generate=str(folder), trust_remote_code=True, backend="eager")
    same = torch.equal(model.generate(**options), got)
    if not same and model.dtype == torch.float32:
        raise ExportError("decoding with the folder gives other tokens than `generate`; validate the mask with --audit")
    return {"tokens": NEW_TOKENS, "same_tokens": same}
