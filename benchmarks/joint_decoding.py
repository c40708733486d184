"""Joint decoding (MTAD, lossy) beside plain sampling and exact speculative sampling: perplexity and speed.

    python benchmarks/joint_decoding.py --out results/measured/joint-demo [--mask results/demo/mask.json]

Samples continuations of held-out prompts at temperature 1 with every arm, interleaved prompt by prompt, all eagerly in
the same runtime; perplexity is that of what was generated, under the target. Plain sampling at lower temperatures is an
arm as well: it too trades the target's distribution for likelier text, at no gain in speed. Joules are those of
the machine's counter, null where there is none. Writes table.csv and summary.json; the last line is JSON.
`notebooks/joint.ipynb` draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from skipsearch import load_mask, load_model, self_speculative
from skipsearch.evaluate.energy import Energy, EnergyMeter
from skipsearch.files import write_json, write_text
from skipsearch.model.device import device_name, synchronize
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts

WIDTHS, THRESHOLDS, LENGTHS = (1, 2, 4, 8), (0.1, 0.3, 0.5, 0.7, 0.9), (4,)
COOLER = (0.8, 0.6)


@torch.no_grad()
def log_likelihoods(model: Any, ids: torch.Tensor, prompt: int) -> list[float]:
    """Of each generated token under the target, at temperature 1."""
    logits = model(input_ids=ids).logits[0, prompt - 1 : -1].float().log_softmax(-1)
    found: list[float] = logits.gather(1, ids[0, prompt:, None])[:, 0].tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mask", type=Path, default=Path("results/measured/demo.mask.json"))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loaded, file = load_model(args.model), load_mask(args.mask)
    model, mask = loaded.model, file.mask
    options = SearchOptions(held_out=args.prompts, new_tokens=args.new_tokens)
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out[: args.prompts]
    arms: dict[tuple[str, str], tuple[Any, float]] = {
        ("plain sampling", "temperature 1"): (self_speculative(None, backend="eager"), 1.0)
    }
    for cooler in COOLER:
        arms["plain sampling", f"temperature {cooler}"] = (self_speculative(None, backend="eager"), cooler)
    for length in (2, 4):
        method = self_speculative(mask, max_length=length, backend="eager")
        arms["exact speculative sampling", f"K {length}"] = (method, 1.0)
    tuned = self_speculative(file, ngram=0, never_slower=False, backend="eager")
    arms["exact speculative sampling", "the file's policy"] = (tuned, 1.0)
    for length in LENGTHS:
        for width in WIDTHS:
            for threshold in THRESHOLDS:
                method = self_speculative(
                    mask, decoding="mtad", max_length=length, beam_width=width, threshold=threshold
                )
                arms["MTAD (lossy)", f"{width} beams, threshold {threshold}, K {length}"] = (method, 1.0)
    keys, meter = list(arms), EnergyMeter(model.device)
    rows = []
    for method, temperature in arms.values():  # warm-up
        first = torch.tensor([prompts[0]], device=model.device)
        model.generate(first, custom_generate=method, max_new_tokens=8, do_sample=True, temperature=temperature)
    for turn in range(args.rounds):
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=model.device)
            shift = (number + turn * len(prompts)) % len(keys)
            for key in keys[shift:] + keys[:shift]:
                method, temperature = arms[key]
                torch.manual_seed(1000 * turn + number)
                synchronize(model.device)
                before, begin = meter.joules(), time.perf_counter()
                out = model.generate(
                    ids, custom_generate=method, max_new_tokens=args.new_tokens, do_sample=True, top_k=0,
                    temperature=temperature, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
                synchronize(model.device)
                seconds, after = time.perf_counter() - begin, meter.joules()
                energy = math.nan if before is None or after is None else after - before
                found = log_likelihoods(model, out, ids.shape[1])
                rows.append({
                    "method": key[0], "setting": key[1], "prompt": number, "round": turn, "seconds": seconds,
                    "tokens": len(found), "log_likelihood": sum(found), "joules": energy,
                    "accepted": method.stats.accepted, "drafted": method.stats.drafted,
                    "verifies": method.stats.verifies,
                })  # fmt: skip
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    frame = pd.DataFrame(rows)
    table = summary(frame, meter.reason)
    write_text(args.out / "table.csv", table.to_csv(index=False))
    targets = _targets(table)
    data = {"benchmark": "joint_decoding", "model": loaded.name, "device": device_name(model.device),
            "dtype": str(model.dtype), "targets": targets,
            "rows": json.loads(table.to_json(orient="records"))}  # fmt: skip
    write_json(args.out / "summary.json", data)
    print(table.to_string(index=False))
    print(json.dumps(data))


def summary(frame: pd.DataFrame, no_energy: str | None) -> pd.DataFrame:
    """A row a setting; intervals are over prompts."""
    plain = frame[(frame["method"] == "plain sampling") & (frame["setting"] == "temperature 1")]
    rng = np.random.default_rng(0)
    count = plain["prompt"].nunique()
    picks = rng.integers(0, count, (1000, count))
    of_plain = plain.groupby("prompt")[["log_likelihood", "tokens", "seconds"]].sum()
    rows = []
    for (method, setting), part in frame.groupby(["method", "setting"], sort=False):
        of = part.groupby("prompt")[["log_likelihood", "tokens", "seconds"]].sum()

        def ratio(chosen: Any, of: pd.DataFrame = of) -> Any:
            def mean(one: pd.DataFrame) -> Any:
                return one["log_likelihood"].to_numpy()[chosen].sum(-1) / one["tokens"].to_numpy()[chosen].sum(-1)

            return np.exp(mean(of_plain) - mean(of))

        used = [(None if np.isnan(j) else j, s, n) for j, s, n in part[["joules", "seconds", "tokens"]].to_numpy()]
        low, high = np.percentile(ratio(picks), [2.5, 97.5])
        rows.append({
            "method": method, "setting": setting,
            "perplexity": round(math.exp(-part["log_likelihood"].sum() / part["tokens"].sum()), 3),
            "over_plain": round(float(ratio(slice(None))), 3), "low": round(low, 3), "high": round(high, 3),
            "tau": round(1 + part["accepted"].sum() / max(1, part["verifies"].sum()), 3),
            "acceptance_rate": round(part["accepted"].sum() / max(1, part["drafted"].sum()), 3),
            "tokens_per_second": round(part["tokens"].sum() / part["seconds"].sum(), 1),
            **Energy.of(used, no_energy).to_dict(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _targets(table: pd.DataFrame) -> dict[str, Any]:
    """Of the settings as fast as the faster exact speculative sampling: the least perplexity over plain sampling's."""
    exact = table[table["method"] == "exact speculative sampling"]["tokens_per_second"].max()
    fast = table[(table["method"] == "MTAD (lossy)") & (table["tokens_per_second"] >= exact)]
    if fast.empty:
        return {"as_fast_as_exact": False}
    best = fast.loc[fast["over_plain"].idxmin()]
    return {"as_fast_as_exact": True, "setting": best["setting"], "over_plain": best["over_plain"],
            "speed_over_exact": round(float(best["tokens_per_second"] / exact), 3)}  # fmt: skip


if __name__ == "__main__":
    main()
