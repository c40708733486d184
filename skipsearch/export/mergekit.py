"""`mergekit`: the draft as a passthrough merge of the layers that stay; a few lines of YAML in place of weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from skipsearch.errors import ExportError
from skipsearch.export.draft import Draft, check_whole_layers, compare_logits

FILE = "mergekit.yaml"


def check(draft: Draft) -> None:
    """Raises ExportError: a layer is skipped in part, or the weights are not a checkpoint that mergekit reads."""
    check_whole_layers(draft, "mergekit")
    if draft.weights.gguf_file is not None:
        raise ExportError(f"model {draft.name} is a GGUF file, which mergekit cannot read; use --to hf or --to gguf")


def write(draft: Draft, folder: Path) -> str:
    """Write the slices; returns how they are merged."""
    lines = ["merge_method: passthrough", f"dtype: {str(draft.model.dtype).removeprefix('torch.')}", "slices:"]
    for first, last in runs(draft.kept):
        lines.append(f"  - sources: [{{model: {json.dumps(draft.weights.source)}, layer_range: [{first}, {last}]}}]")
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"mergekit-yaml {folder / FILE} DRAFT"


def runs(kept: list[int]) -> list[tuple[int, int]]:
    """Rising layers as ranges without their ends: [0, 1, 2, 5] is (0, 3), (5, 6)."""
    groups = [[i for _, i in group] for _, group in itertools.groupby(enumerate(kept), lambda pair: pair[1] - pair[0])]
    return [(group[0], group[-1] + 1) for group in groups]


def compare(draft: Draft, folder: Path) -> dict[str, Any]:
    """Raises ExportError: what was written has other logits than the draft view."""
    return compare_logits(draft, _load_back(draft, folder))


def _load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The model with the layers that the file names. mergekit itself is not run."""
    read = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
    ranges = [source["layer_range"] for part in read["slices"] for source in part["sources"]]
    return draft.with_kept([i for first, last in ranges for i in range(first, last)])
