"""Which cheap signal foretells what a mask is worth? Rank correlations over many masks.

    python benchmarks/signals.py --out results/measured/signals-demo [--model demo] [--masks 200]

Signals are taken on calibration prompts: agreement and KL of single skips (summed), their product, the cosine of the
last hidden states, the agreement of one teacher-forced pass with the whole mask, exact replay. All but the last come
from passes over whole sequences, as their papers take them: there a draft reads its own keys of what stands before,
and in decoding the full model's. What they are held against is really decoded on held-out prompts, each mask with fixed
drafts of 5 tokens: acceptance rate, and tokens per second. For the latter each signal is also read as the acceptance of
a token and joined with the measured costs. Masks are random, of all densities, and neighbours of a good one. Writes
masks.csv and table.csv; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rivals.hidden import last_states
from scipy.stats import bootstrap, spearmanr
from torch import Tensor

from skipsearch import SkipMask, load_mask, load_model
from skipsearch.compiled.backend import warm_plan
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.hidden_states import layer_states
from skipsearch.evaluate.objective import score_policy
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import Trace
from skipsearch.files import write_text
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import prepare

K = 5
POLICY = DraftPolicy(max_length=K)


class Passes:
    """Teacher-forced passes over the calibration trace."""

    def __init__(self, target: Target, trace: Trace) -> None:
        self.target = target
        self.ids, generated = trace.padded(target.device)
        self.states = layer_states(target, self.ids, generated)
        self.seen = self.states.seen[:, 1:]
        self.full = self.run(target.model)[0]

    def run(self, model: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities that foretell generated tokens [N, V], and the last hidden states."""
        logits, hidden = last_states(model, self.target.sublayers.path, self.ids)
        return logits[:, :-1][self.seen].float().log_softmax(-1), hidden

    def of(self, mask: SkipMask) -> dict[str, float]:
        """Agreement, KL(full | draft), cosine."""
        logp, hidden = self.run(draft_view(self.target.model, mask))
        return {
            "agreement": float((logp.argmax(-1) == self.full.argmax(-1)).float().mean()),
            "kl": float((self.full.exp() * (self.full - logp)).sum(-1).mean()),
            "cosine": self.states.cosine(hidden, self.states.hidden[-1]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mask", type=Path, default=Path("results/measured/demo.mask.json"), help="the good one")
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded, good = load_model(args.model, dtype=args.dtype), load_mask(args.mask).mask
    options = SearchOptions(new_tokens=args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(loaded, Path(scratch), options, lambda *_: None)
    target, point, part = prepared.target, prepared.point, prepared.trace.head(12, args.tokens)
    passes, replay = Passes(target, part), Replay(target, part, K)
    layers = good.num_layers
    single = {
        sub: passes.of(SkipMask.from_sublayers([sub], layers))
        for sub in SkipMask.from_bits([True] * 2 * layers).sublayers()
    }
    rng = random.Random(0)
    masks: list[SkipMask] = []
    while len(masks) < args.masks:
        if len(masks) % 2:
            flips = rng.sample(prepared.space.free, rng.randint(1, layers))
            mask = good ^ SkipMask.from_sublayers(flips, layers)
        else:
            density = rng.uniform(0.05, 0.8)
            mask = SkipMask.from_bits([i % layers > 0 and rng.random() < density for i in range(2 * layers)])
        if mask not in masks:
            masks.append(mask)
    rows: list[dict[str, Any]] = []
    for mask in masks:
        warm_plan(target, mask)
        joint, alone = passes.of(mask), [single[sub] for sub in mask.sublayers()]
        replayed = score_policy(DraftReplay(replay, mask), POLICY, point)
        rows.append({
            "mask": "".join(map(str, mask.bits())), "skipped": len(mask), "step": draft_step(point, mask, False),
            "single-skip agreement": 1 - sum(1 - s["agreement"] for s in alone),
            "single-skip KL": float(np.exp(-sum(s["kl"] for s in alone))),
            "product of singles": float(np.prod([s["agreement"] for s in alone])),
            "cosine": joint["cosine"], "single teacher-forced pass": joint["agreement"],
            "exact replay": replayed.acceptance_rate, "exact replay, joined": replayed.tokens_per_second,
        })  # fmt: skip
    prompts = prepared.prompts.held_out[: args.prompts]
    arms = [our_arm(target, mask, POLICY) for mask in masks]
    plain, begin = our_arm(target), time.perf_counter()
    for turn, i in enumerate(rng.sample(range(len(masks)), len(masks))):
        base = [plain(prompt, args.tokens) for prompt in prompts[:2]]
        runs = [arms[i](prompt, args.tokens) for prompt in prompts]
        drafted, accepted = sum(r.stats.drafted for r in runs), sum(r.stats.accepted for r in runs)
        rows[i] |= {
            "turn": turn,
            "decoded acceptance": accepted / drafted,
            "tokens_per_second": sum(r.tokens for r in runs) / sum(r.seconds for r in runs),
            "plain_tokens_per_second": sum(r.tokens for r in base) / sum(r.seconds for r in base),
        }
    table = pd.DataFrame(rows).sort_values("turn")
    # Against plain steps timed beside them, so that a slower minute is not a worse mask.
    table["speedup"] = table["tokens_per_second"] / table["plain_tokens_per_second"].rolling(9, 1, True).median()
    signals = list(table.columns[3:9])
    out = []
    for name in signals:
        accept = table[name].clip(0.001, 0.999)
        rate = (1 - accept ** (K + 1)) / (1 - accept) / ((K + point.first) * table["step"] + point.verify[K])
        joined = table["exact replay, joined"] if name == "exact replay" else rate
        out.append({
            "signal": name, **_correlation("acceptance", table[name], table["decoded acceptance"]),
            **_correlation("speed", table[name], table["speedup"]),
            **_correlation("speed, joined with costs", joined, table["speedup"]),
        })  # fmt: skip
    result = pd.DataFrame(out)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "masks.csv", table.round(5).to_csv(index=False))
    write_text(args.out / "table.csv", result.to_csv(index=False))
    print(result.to_string(index=False))
    print(json.dumps({
        "benchmark": "signals", "model": loaded.name, "device": device_name(target.device), "masks": len(masks),
        "backend": target.backend, "decoding_s": round(time.perf_counter() - begin, 1), "rows": out,
    }))  # fmt: skip


def _correlation(label: str, a: Any, b: Any) -> dict[str, float]:
    pair = (np.asarray(a), np.asarray(b))
    found = bootstrap(
        pair, lambda x, y: spearmanr(x, y).statistic, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {
        label: round(float(spearmanr(*pair).statistic), 3), f"{label}, low": round(float(found.low), 3),
        f"{label}, high": round(float(found.high), 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
