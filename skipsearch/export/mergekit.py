"""`mergekit`: the draft as a passthrough merge of the layers that stay; a few lines of YAML in place of weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import yaml
from transformers import PreTrainedModel

from skipsearch.errors import ExportError
from skipsearch.export.draft import Draft

FILE = "mergekit.yaml"


def write(draft: Draft, folder: Path) -> str:
    """Write the slices; returns how they are merged.

    Raises:
        ExportError: the weights are not a checkpoint that mergekit reads.
    """
    if draft.weights.gguf_file is not None:
        raise ExportError("the model is a GGUF file, which mergekit cannot read; use --to hf or --to gguf")
    lines = ["merge_method: passthrough", f"dtype: {str(draft.model.dtype).removeprefix('torch.')}", "slices:"]
    source = draft.weights.source
    source = str(Path(source).resolve()) if Path(source).is_dir() else source  # the file may be merged elsewhere
    for _, run in itertools.groupby(enumerate(draft.kept), lambda pair: pair[1] - pair[0]):
        layers = [i for _, i in run]
        lines.append(f"  - sources: [{{model: {json.dumps(source)}, layer_range: [{layers[0]}, {layers[-1] + 1}]}}]")
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"mergekit-yaml {folder / FILE} DRAFT"


def load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The model with the layers that the file names; mergekit itself is not run."""
    read = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
    ranges = [source["layer_range"] for part in read["slices"] for source in part["sources"]]
    return draft.with_layers([i for first, last in ranges for i in range(first, last)])
