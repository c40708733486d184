"""Search while serving, on a stream of prompts that changes domain three times: code, English, maths, code again.

    python benchmarks/on_the_fly.py --data FOLDER --out results/measured/stream-demo [--mask results/demo/mask.json]

FOLDER holds humaneval.jsonl, spec_bench.jsonl and gsm8k_test.jsonl. Every arm decodes every prompt of the stream, in
this order and interleaved prompt by prompt, and keeps its state as a server would; each one's own searching is inside
its seconds, and what it times at load in those of its first prompt. Arms: plain; n-grams; an offline mask alone and as
served; SWIFT's own search after the paper, and without its stop at a matchness of 0.95; ours from nothing and from the
offline mask, alone (no n-grams, no fallback, as SWIFT) and as served. Writes prompts.csv,
table.csv and summary.json; the last line is JSON. `notebooks/stream.ipynb` draws it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rivals.swift_online import Swift

from skipsearch import load_mask, load_model, self_speculative
from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.evaluate.timing import Arm, OurArm, our_arm
from skipsearch.files import write_json, write_text
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.device import device_name
from skipsearch.policy import DraftPolicy

WINDOW = 20  # prompts
AHEAD = 1.03  # of plain decoding's rate so far: what counts as a benefit
NGRAMS = DraftPolicy(max_length=1, ngram=10, never_slower=True)


def stream(data: Path, tokenizer: Any, each: int, longest: int, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """(domain, token ids): four stretches of `each` prompts."""
    lines = {name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
             for name in ("humaneval", "spec_bench", "gsm8k_test")}  # fmt: skip
    english = [row["turns"][0] for row in lines["spec_bench"] if row["category"] not in ("coding", "math_reasoning")]
    texts = {
        "code": [row["prompt"] for row in lines["humaneval"]], "english": english,
        "maths": [f"Question: {row['question']}\nAnswer:" for row in lines["gsm8k_test"]],
    }  # fmt: skip
    for number, rows in enumerate(texts.values()):
        random.Random(seed + number).shuffle(rows)
    order = [("code", 0), ("english", 0), ("maths", 0), ("code", each)]
    return [
        (domain, tuple(tokenizer(text)["input_ids"][:longest]))
        for domain, first in order
        for text in texts[domain][first : first + each]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mask", type=Path, default=Path("results/measured/demo.mask.json"))
    parser.add_argument("--each", type=int, default=50, help="prompts of each of four stretches")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", nargs="*", help="of the table, beside plain; default: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loaded, file = load_model(args.model), load_mask(args.mask)
    mask, target = file.mask, with_backend(loaded.target, "auto")
    layers = mask.num_layers
    for half in KINDS:
        warm_plan(target, SkipMask(**{half: range(layers)}, num_layers=layers))  # type: ignore[arg-type]
    served = file.draft
    alone = served.mask_alone()
    bare: dict[str, Any] = {"ngram": 0, "never_slower": False, "seed": args.seed}
    ours: dict[str, Any] = {
        "ours, mask alone": self_speculative("auto", **bare), "ours": self_speculative("auto", seed=args.seed),
        "ours from the offline mask, alone": self_speculative("auto", start=file, **bare),
        "ours from the offline mask": self_speculative("auto", start=file, seed=args.seed),
    }  # fmt: skip
    tuners: dict[str, Any] = {name: method.tuner_for(target.model) for name, method in ours.items()}
    every = [(kind, i) for i in range(layers) for kind in KINDS]
    tuners["SWIFT"] = Swift(target, every, args.seed)
    tuners["SWIFT, no stop at 0.95"] = Swift(target, every, args.seed, enough=2.0)
    arms: dict[str, Arm] = {
        "plain": our_arm(target), "n-grams": our_arm(target, None, NGRAMS),
        "offline mask alone": our_arm(target, mask, alone), "offline mask": our_arm(target, mask, served),
        **{name: OurArm(target=target, tuner=tuner) for name, tuner in tuners.items()},
    }  # fmt: skip
    names = [name for name in arms if not args.arm or name in ("plain", *args.arm)]
    rows: list[dict[str, Any]] = []
    prompts = stream(args.data, loaded.tokenizer, args.each, args.longest, args.seed)

    # Arms of their own, so that those measured learn nothing: first calls choose kernels and fill caches.
    warm = [OurArm(target=target, tuner=Swift(target, every)), our_arm(target, mask, alone)]
    for _ in range(2):
        for arm in warm:
            arm(prompts[0][1], args.new_tokens)
    for number, (domain, ids) in enumerate(prompts):
        turn = number % len(names)
        done = {name: arms[name](ids, args.new_tokens) for name in names[turn:] + names[:turn]}
        for name, one in done.items():
            rows.append({
                "prompt": number, "domain": domain, "arm": name,
                "seconds": round(one.seconds + (tuners[name].prepared if name in tuners and not number else 0.0), 5),
                "tokens": one.tokens, "tau": round(one.stats.tau, 3), "equal": one.ids == done["plain"].ids,
            })  # fmt: skip
        if number % WINDOW == WINDOW - 1:
            part = pd.DataFrame(rows[-WINDOW * len(names) :]).groupby("arm")[["tokens", "seconds"]].sum()
            rate = part["tokens"] / part["seconds"]
            print(
                f"{number + 1:4} {domain:8}",
                {k: round(float(v / rate["plain"]), 2) for k, v in rate.items()},
                flush=True,
            )
    frame = pd.DataFrame(rows)
    table = summary(frame, names, tuners)
    write_text(args.out / "prompts.csv", frame.to_csv(index=False))
    write_text(args.out / "table.csv", table.to_csv(index=False))
    data = {
        "benchmark": "on_the_fly", "model": loaded.name, "backend": target.backend, "prompts": len(prompts),
        "device": device_name(target.device), "rows": json.loads(table.to_json(orient="records")),
        "targets": _targets(frame, table.set_index("arm")),
        "search": {name: tuner.report() for name, tuner in tuners.items() if name in names},
    }  # fmt: skip
    write_json(args.out / "summary.json", data)
    print(table.to_string(index=False))
    print(json.dumps(data))


def summary(frame: pd.DataFrame, names: list[str], tuners: dict[str, Any]) -> pd.DataFrame:
    tokens = frame.pivot(index="prompt", columns="arm", values="tokens")
    seconds = frame.pivot(index="prompt", columns="arm", values="seconds")
    rates = tokens.rolling(WINDOW).sum() / seconds.rolling(WINDOW).sum()
    domains = frame.drop_duplicates("prompt").set_index("prompt")["domain"]
    stretches = (domains != domains.shift()).cumsum()
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(tokens), (1000, len(tokens)))

    def speedup(arm: str, chosen: Any) -> Any:
        return (tokens[arm].to_numpy()[chosen].sum(-1) / seconds[arm].to_numpy()[chosen].sum(-1)) / (
            tokens["plain"].to_numpy()[chosen].sum(-1) / seconds["plain"].to_numpy()[chosen].sum(-1)
        )

    rows = []
    for name in names:
        ratio = (rates[name] / rates["plain"]).dropna()
        low, high = np.percentile(speedup(name, picks), [2.5, 97.5])
        ahead = tokens[name].cumsum() / seconds[name].cumsum() > AHEAD * (
            tokens["plain"].cumsum() / seconds["plain"].cumsum()
        )
        lasting = ahead[::-1].cummin()[::-1]
        first = int(lasting.idxmax()) if lasting.any() else None
        row: dict[str, Any] = {
            "arm": name, "seconds": round(float(seconds[name].sum()), 2),
            "tokens_per_second": round(float(tokens[name].sum() / seconds[name].sum()), 1),
            "over_plain": round(float(speedup(name, slice(None))), 3), "low": round(low, 3), "high": round(high, 3),
            "lowest_window": round(float(ratio.min()), 3), "first_window": round(float(ratio.iloc[0]), 3),
        }  # fmt: skip
        for stretch, label in enumerate(("code", "english", "maths", "code_again"), 1):
            row[label] = round(float(speedup(name, np.flatnonzero(stretches.to_numpy() == stretch))), 3)
        row["ahead_for_good_after_s"] = (
            None if first is None else round(float(seconds[name].iloc[: first + 1].sum()), 2)
        )
        row["search_share"] = tuners[name].report()["share"] if name in tuners else 0.0
        row["equal"] = int(frame.loc[frame["arm"] == name, "equal"].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def _targets(frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Ours against SWIFT from the first window on, against plain in every window, and against the fixed mask."""
    tokens = frame.pivot(index="prompt", columns="arm", values="tokens").rolling(WINDOW).sum()
    rates = tokens / frame.pivot(index="prompt", columns="arm", values="seconds").rolling(WINDOW).sum()
    found = {}
    for ours, fixed in (("ours, mask alone", "offline mask alone"), ("ours", "offline mask"),
                        ("ours from the offline mask, alone", "offline mask alone"),
                        ("ours from the offline mask", "offline mask")):  # fmt: skip
        if not {ours, fixed, "SWIFT", "n-grams"} <= set(rates):
            continue
        over_swift = (rates[ours] / rates["SWIFT"]).dropna()
        found[ours] = {
            "windows_ahead_of_swift": round(float((over_swift > 1).mean()), 3),
            "least_over_swift": round(float(over_swift.min()), 3),
            "least_over_plain": round(float(table.loc[ours, "lowest_window"]), 3),
            "over_n_grams": round(float(table.loc["n-grams", "seconds"] / table.loc[ours, "seconds"]), 3),
            "over_the_fixed_mask": round(float(table.loc[fixed, "seconds"] / table.loc[ours, "seconds"]), 3),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
