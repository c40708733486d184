"""A plan against its rivals, on held-out prompts of one run: plain decoding, all int8, the best mask, n-grams.

    skipsearch run --model MODEL --out results/MODEL
    skipsearch run --model MODEL --out results/MODEL-masks --space masks.toml      # [space] forms = ["skip"]
    python benchmarks/plans.py --model MODEL --plan results/MODEL/mask.json [--mask results/MODEL-masks/mask.json]

All arms decode every prompt in each round, in random order; intervals are over prompts. "all int8, K" is every sublayer
and the head in int8 with a fixed draft length; the best of the lengths is named, chosen on these same prompts, which
favours it. The last line is one JSON object; --rows FILE keeps it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipsearch import load_mask, load_model
from skipsearch.bench.bench import weight_bytes
from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.draft.copies import copies_bytes
from skipsearch.evaluate.clock import step_costs
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.timing import Arm, our_arm, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import NGRAM, DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts

LENGTHS = (3, 5, 8)
Drafts = dict[str, tuple[DraftPlan, DraftPolicy]]  # what drafts, and how, by arm


def quiet(*_: Any) -> None:
    pass


def uniform(layers: int) -> Drafts:
    """Everything in int8, with each fixed length."""
    plan = DraftPlan.everywhere("int8", layers)
    return {f"all int8, K = {length}": (plan, DraftPolicy(max_length=length)) for length in LENGTHS}


def drafts(args: argparse.Namespace, layers: int) -> Drafts:
    """By arm; plain decoding and n-grams are not among them."""
    found = uniform(layers)
    for name, path in (("mask", args.mask), ("plan", args.plan)):
        file = None if path is None else load_mask(path)
        if file is not None and file.drafting_plan is not None:
            found[name] = file.drafting_plan, file.draft.mask_alone()
            if name == "plan":
                found["plan, served"] = file.drafting_plan, replace(file.draft, ngram=NGRAM, never_slower=True)
    return found


def compare(
    target: Target, prompts: Sequence[Ids], chosen: Drafts, settings: DecodeSettings
) -> list[dict[str, Any]]:  # fmt: skip
    """Time plain decoding, n-grams and these plans on the same prompts; a row an arm."""
    arms: dict[str, Arm] = {"plain": our_arm(target), "plain again (A/A)": our_arm(target)}
    arms |= {name: our_arm(target, plan, policy) for name, (plan, policy) in chosen.items()}
    arms["n-grams"] = our_arm(target, None, DraftPolicy.ngrams_alone())
    timings = time_interleaved(arms, prompts, settings, quiet, "plans")
    context = round(sum(map(len, prompts)) / len(prompts))
    rows: list[dict[str, Any]] = []
    for name, found in timings.items():
        speedup, interval = found.speedup(timings["plain"])
        row = {
            "arm": name, "tokens_per_second": round(found.tokens_per_second, 2), "speedup": round(speedup, 3),
            "speedup_ci": [round(bound, 3) for bound in interval], "acceptance": round(found.stats.acceptance_rate, 4),
            "tau": round(found.stats.tau, 3), "equal_to_plain": found.ids() == timings["plain"].ids(),
        }  # fmt: skip
        if name in chosen:
            plan, policy = chosen[name]
            draft, plain = step_costs(target, plan, context)
            row |= {"c": round(draft / plain, 4), "copies_bytes": round(copies_bytes(target.model, plan)),
                    "plan": plan.columns(), "policy": str(policy)}  # fmt: skip
        rows.append(row)
        print(f"{name:20} {speedup:5.2f}x ({interval[0]:.2f} to {interval[1]:.2f})  acceptance "
              f"{found.stats.acceptance_rate:.3f}  equal {row['equal_to_plain']}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--prompts-from", default="builtin")
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model, dtype=args.dtype)
    options = SearchOptions(
        source=PromptSource(name=args.prompts_from), held_out=args.held_out, new_tokens=args.tokens, rounds=args.rounds
    )
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out
    target = with_backend(loaded.target, "auto", quiet)
    chosen = drafts(args, target.num_layers)
    for plan, _ in chosen.values():
        warm_plan(target, plan, quiet)
    rows = compare(target, prompts, chosen, options.decoding())
    best = max((row for row in rows if row["arm"].startswith("all int8")), key=lambda row: float(row["speedup"]))
    gain = next((row["speedup"] / best["speedup"] for row in rows if row["arm"] == "plan"), None)
    row = {
        "benchmark": "plans", "model": loaded.name, "device": device_name(target.device), "backend": target.backend,
        "dtype": str(target.dtype).removeprefix("torch."), "prompts": len(prompts), "new_tokens": args.tokens,
        "rounds": args.rounds, "weight_bytes": weight_bytes(target.model), "best_all_int8": best["arm"],
        "plan_over_best_all_int8": None if gain is None else round(gain, 3), "rows": rows,
    }  # fmt: skip
    if args.rows:
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        args.rows.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
