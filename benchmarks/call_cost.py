"""What does it cost to look before each call whether the model was changed?

    python benchmarks/call_cost.py

Calls of `generate` for 64 tokens with the bundled model, compiled, plainly and with a mask: as they are, as they are
again (A/A), and with what was read of the model at the first call taken for granted. They take turns in one process.
Printed: the median of each, the ratio over the last with a 95 % interval over turns, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from skipsearch import SkipMask, load_model, self_speculative
from skipsearch.compiled import backend
from skipsearch.generate import method as method_module
from skipsearch.model.state import ModelState


class Granted:
    """In place of `ModelState`: reads a model once."""

    def __init__(self) -> None:
        self.known: dict[int, ModelState] = {}

    def of(self, model: Any, **_: Any) -> ModelState:
        if id(model) not in self.known:
            self.known[id(model)] = ModelState.of(model)
        return self.known[id(model)]


def interval(ratios: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the median."""
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    return [round(float(np.quantile(medians, q)), 4) for q in (0.025, 0.975)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=150)
    args = parser.parse_args()
    loaded = load_model("demo")
    layers = loaded.target.num_layers
    mask = SkipMask(attention=range(1, layers, 2), mlp=range(2, layers, 2), num_layers=layers)
    ids = loaded.tokenizer("def read_config(path):\n", return_tensors="pt").input_ids
    granted, rows = Granted(), []

    def seconds(method: Any, state: Any) -> float:
        backend.ModelState = method_module.ModelState = state  # type: ignore[misc]
        begin = time.perf_counter()
        loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, custom_generate=method
        )
        return time.perf_counter() - begin

    for name, drafted in (("plain", None), ("mask", mask)):
        method = self_speculative(drafted, backend="compiled")
        arms: dict[str, Callable[[], float]] = {
            "as it is": lambda m=method: seconds(m, ModelState),
            "as it is (A/A)": lambda m=method: seconds(m, ModelState),
            "granted": lambda m=method: seconds(m, granted),
        }  # fmt: skip
        for _ in range(5):
            for arm in arms.values():
                arm()
        rng, found = np.random.default_rng(0), {arm: list[float]() for arm in arms}
        for _ in range(args.turns):
            for arm in rng.permutation(list(arms)):
                found[arm].append(arms[arm]())
        times = {arm: np.array(values) for arm, values in found.items()}
        for arm in ("as it is", "as it is (A/A)"):
            ratios = times[arm] / times["granted"]
            rows.append({
                "decoding": name, "arm": arm, "ms": round(1e3 * float(np.median(times[arm])), 2),
                "over_granted": round(float(np.median(ratios)), 4), "ci": interval(ratios),
            })  # fmt: skip
            print(rows[-1])
    begin = time.perf_counter()
    for _ in range(50):
        ModelState.of(loaded.model)
    state_ms = round(1e3 * (time.perf_counter() - begin) / 50, 3)
    print(json.dumps({"benchmark": "call_cost", "rows": rows, "state_ms": state_ms}))


if __name__ == "__main__":
    main()
