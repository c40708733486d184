"""A mask file as a document, whole or with one field edited."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

EVIDENCE = {
    "acceptance_rate": 0.875, "tau": 4.5, "cost_ratio": 0.5, "speedup": 1.25, "speedup_ci": [1.125, 1.375],
    "baseline": "greedy, same runtime", "tokens_per_second": 50.0, "baseline_tokens_per_second": 40.0,
    "greedy_equal": True, "backend": "eager", "dtype": "float32", "device": "cpu", "prompts": 16, "tokens": 2048,
    "prompts_sha256": "ab12", "verdict": "use",
}  # fmt: skip
DOCUMENT: dict[str, Any] = {
    "format": "skipsearch-mask",
    "version": 1,
    "model": {
        "id": "demo", "revision": None, "architecture": "LlamaForCausalLM", "num_layers": 4, "config_sha256": "cd34",
    },
    "skip": {"attention": [0, 2], "mlp": [2, 3]},
    "draft": {"max_length": 7, "exit_threshold": 0.5},
    "evidence": EVIDENCE,
    "provenance": {
        "tool_version": "0.1.0", "torch": "2.9.0", "transformers": "5.17.0", "study": "demo", "trial": 12, "seed": 0,
        "created": "2026-01-01T00:00:00Z",
    },
}  # fmt: skip


def edited(field: str, *value: Any) -> dict[str, Any]:
    """DOCUMENT with the dotted field set to the value, or, with no value, removed."""
    data = copy.deepcopy(DOCUMENT)
    *parents, last = field.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return data


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path
