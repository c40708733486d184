"""Is the output the same? Token by token against `generate`, in parts, each with one JSON line last.

    python benchmarks/lossless.py families [--plans 9]           every supported family, tiny random models, fp32
    python benchmarks/lossless.py demo [--plans 100]             random plans on the bundled model, fp32
    python benchmarks/lossless.py batch [--mask FILE]            batch 8 against eight runs of one
    python benchmarks/lossless.py prompts FILE [--mask FILE]     a prompt file: equal in fp32, audited in bf16,
                                                                 bit for bit in the deterministic mode, and its cost

Exits 1 at any divergence that rounding does not explain.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from skipsearch import DraftPlan, SkipMask, draft_view, load_mask, load_model, self_speculative
from skipsearch.decoding.batch import ALIGNED
from skipsearch.draft.copies import obstacle
from skipsearch.draft.forms import why_not
from skipsearch.errors import UnsupportedModel
from skipsearch.evaluate.audit import audit
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.timing import OurArm
from skipsearch.mask import KINDS
from skipsearch.model.families import FAMILIES, tiny_model
from skipsearch.model.sublayers import find_sublayers
from skipsearch.plan import QUANTISED
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts


def generate(model: Any, ids: torch.Tensor, tokens: int, **changes: Any) -> torch.Tensor:
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "use_cache": True,
                               "attention_mask": (ids != 0).long(), **changes}  # fmt: skip
    out: torch.Tensor = model.generate(ids, **options)
    return out[:, ids.shape[1] :]


def random_plan(rng: random.Random, number: int, model: Any, layers: int) -> DraftPlan:
    """The corners first: layer 0, all attention, all MLP or everything skipped, everything in a quantised form.

    Then every density of every form, and heads in a form, over all tokens or some.
    """
    every, vocabulary = range(layers), model.config.get_text_config().vocab_size
    able = [
        form for form in QUANTISED if all(obstacle(model, (kind, i), form) is None for kind in KINDS for i in every)
    ]
    heads = [form for form in able if (head := model.get_output_embeddings()) and why_not(head.weight, form) is None]
    skips: list[dict[str, Any]] = [
        {"attention": [0]}, {"attention": every}, {"mlp": every}, {"attention": every, "mlp": every},
    ]  # fmt: skip
    corners = [DraftPlan(SkipMask(num_layers=layers, **skip)) for skip in skips]
    corners += [DraftPlan.everywhere(form, layers, form if form in heads else "full") for form in able]
    if number < len(corners):
        return corners[number]
    shares = [rng.random() ** 2 for _ in (*able, "skip", "run")]
    ids = rng.sample(range(vocabulary), vocabulary // 2) if heads and rng.random() < 0.3 else None
    chosen = rng.choices([*able, "skip", "run"], shares, k=2 * layers)
    return DraftPlan.from_forms(chosen, rng.choice(["full", *(form for form in heads if ids is None)]), ids)


def families(args: argparse.Namespace) -> dict[str, Any]:
    """Batches of 8 and single rows in turn; prompts of uneven length; the reference is plain generate, row by row."""
    counts, tokens, refused = {}, 0, []
    for family in FAMILIES:
        model, rng = tiny_model(family), random.Random(family)
        try:
            find_sublayers(model)
        except UnsupportedModel as error:
            refused.append(family)
            print(f"{family:22} refused: {str(error).partition(': ')[2].partition('; see')[0]}", flush=True)
            continue
        prompts = [[rng.randrange(3, 97) for _ in range(rng.randint(4, 20))] for _ in range(16)]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        expected = [generate(model, torch.tensor([p]), args.tokens, eos_token_id=None)[0] for p in prompts]
        wrong = done = accepted = 0
        for number in range(args.plans):
            plan = random_plan(rng, number, model, 4)
            method = self_speculative(plan, max_length=rng.randint(1, 8), exit_threshold=rng.choice([None, 0.2, 0.5]))
            groups = [range(8), range(8, 16)] if number % 3 else [[i] for i in range(8)]
            for rows in map(list, groups):
                out = generate(model, padded[rows], args.tokens, eos_token_id=None, custom_generate=method)
                for row, ours in zip(rows, out, strict=True):
                    wrong += not torch.equal(ours, expected[row])
                    done += len(ours)
                accepted += method.stats.accepted
        counts[family], tokens = wrong, tokens + done
        print(f"{family:22} {done} tokens, {accepted} of them drafted, {wrong} rows differ", flush=True)
    divergences = sum(counts.values())
    print(f"{len(counts)} families supported, {len(refused)} refused; {tokens} tokens, {divergences} divergences")
    return {"supported": len(counts), "refused": len(refused), "plans": args.plans, "tokens": tokens,
            "divergences": divergences, "failed": bool(divergences)}  # fmt: skip


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """A different held-out prompt for each plan."""
    loaded, rng = load_model("demo"), random.Random(0)
    options = SearchOptions(new_tokens=args.tokens)
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out
    expected: dict[int, torch.Tensor] = {}
    blocks: Counter[tuple[int, int]] = Counter()
    wrong = tokens = 0
    for number in range(args.plans):
        plan = random_plan(rng, number, loaded.model, 20)
        method = self_speculative(plan, max_length=rng.randint(1, 8), exit_threshold=rng.choice([None, 0.3, 0.6]))
        which = number % len(prompts)
        ids = torch.tensor([prompts[which]])
        if which not in expected:
            expected[which] = generate(loaded.model, ids, args.tokens)
        out = generate(loaded.model, ids, args.tokens, custom_generate=method)
        wrong += not torch.equal(out, expected[which])
        tokens, blocks = tokens + out.shape[1], blocks + method.stats.blocks
    drafted, accepted = (sum(pair[i] * n for pair, n in blocks.items()) for i in (0, 1))
    print(f"{args.plans} plans, {tokens} tokens ({accepted} of {drafted} drafted accepted): {wrong} divergences")
    return {"plans": args.plans, "tokens": tokens, "drafted": drafted, "accepted": accepted, "divergences": wrong,
            "failed": bool(wrong)}  # fmt: skip


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Plain and with the mask: eight rows at once and one by one, in turns."""
    loaded, file = load_model("demo"), load_mask(args.mask)
    options = SearchOptions(new_tokens=args.tokens)
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, options).held_out[:8]
    longest = max(map(len, prompts))
    pad = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    methods = {"plain": self_speculative(None), "mask": self_speculative(file)}
    seconds: dict[str, list[float]] = {f"{name} {how}": [] for name in methods for how in ("batch", "alone")}
    wrong, rng = 0, random.Random(0)
    for turn in range(4):
        outs = {}
        for arm in rng.sample(sorted(seconds), len(seconds)):
            name, how = arm.split()
            begin = time.perf_counter()
            if how == "batch":
                out = generate(loaded.model, ids, args.tokens, attention_mask=seen, custom_generate=methods[name])
            else:
                rows = [
                    generate(loaded.model, torch.tensor([p]), args.tokens, custom_generate=methods[name],
                             attention_mask=torch.ones(1, len(p), dtype=torch.long))[0] for p in prompts
                ]  # fmt: skip
                most = max(map(len, rows))
                out = torch.stack([torch.nn.functional.pad(row, (0, most - len(row))) for row in rows])
            if turn:
                seconds[arm].append(time.perf_counter() - begin)
            outs[arm] = out
        wrong += sum(not torch.equal(out, outs["plain alone"]) for out in outs.values())
    tokens = int((outs["plain alone"] != 0).sum())
    speed = {arm: round(tokens / statistics.median(times), 1) for arm, times in seconds.items()}
    print(f"8 prompts, {tokens} tokens, tokens/s {speed}: {wrong} divergences")
    return {"tokens": tokens, "tokens_per_second": speed, "divergences": wrong, "failed": bool(wrong)}


def prompts(args: argparse.Namespace) -> dict[str, Any]:
    file = load_mask(args.mask)
    loaded = load_model("demo")
    source = PromptSource(name=str(args.file), chat=False)
    options = SearchOptions(source=source, prompts=2, held_out=1 << 20, new_tokens=args.tokens, prompt_tokens=360)
    found = chosen_prompts(loaded.target, loaded.tokenizer, options)
    rows = (*found.calibration, *found.held_out)[: args.limit]
    method = self_speculative(file)
    wrong = tokens = 0
    for prompt in rows:
        ids = torch.tensor([prompt])
        seen = {"attention_mask": torch.ones_like(ids)}
        out = generate(loaded.model, ids, args.tokens, custom_generate=method, **seen)
        wrong += not torch.equal(out, generate(loaded.model, ids, args.tokens, **seen))
        tokens += out.shape[1]
    print(f"fp32: {len(rows)} prompts, {tokens} tokens, {wrong} divergences from generate", flush=True)
    half = load_model("demo", dtype="bfloat16").target
    explained = audit(half, rows, file.mask, method.policy, new_tokens=args.tokens, progress=lambda *_: None)
    margins = [round(d.margin, 4) for d in explained.divergences]
    print(f"bf16: {len(margins)} of {len(rows)} prompts diverge, "
          f"{sum(d.explained for d in explained.divergences)} explained by rounding", flush=True)  # fmt: skip
    drafting: dict[str, Any] = {"draft": draft_view(half.model, file.mask), "policy": method.policy}
    arms: dict[str, dict[str, Any]] = {
        "plain": {}, "mask": drafting,
        "plain, deterministic": {"aligned": ALIGNED}, "mask, deterministic": {**drafting, "aligned": ALIGNED},
    }  # fmt: skip
    times, unequal, rng = {arm: [0.0, 0] for arm in arms}, 0, random.Random(0)
    for prompt in rows[: args.deterministic]:
        ids_of = {}
        for arm in rng.sample(sorted(arms), len(arms)):
            run = OurArm(target=half, **arms[arm])(prompt, args.tokens)  # a new scheduler for each prompt
            times[arm][0], times[arm][1] = times[arm][0] + run.seconds, times[arm][1] + run.tokens
            ids_of[arm] = run.ids
        unequal += ids_of["plain, deterministic"] != ids_of["mask, deterministic"]
    speed = {arm: round(n / s, 1) for arm, (s, n) in times.items()}
    print(f"deterministic, bf16: {unequal} of {args.deterministic} prompts differ; tokens/s {speed}")
    return {
        "file": args.file.name, "prompts": len(rows), "tokens": tokens, "divergences_fp32": wrong,
        "divergences_bf16": len(margins), "margins_bf16": margins, "audit_passed": explained.passed,
        "deterministic_prompts": args.deterministic, "deterministic_unequal": unequal, "tokens_per_second_bf16": speed,
        "failed": bool(wrong or unequal or not explained.passed),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for part, plans, tokens in ((families, 9, 96), (demo, 100, 128), (batch, 0, 96), (prompts, 0, 128)):
        one = parts.add_parser(part.__name__)
        one.set_defaults(part=part)
        one.add_argument("--tokens", type=int, default=tokens)
        if plans:
            one.add_argument("--plans", type=int, default=plans)
        else:
            one.add_argument("--mask", type=Path, default=Path("results/measured/demo.mask.json"))
        if part is prompts:
            one.add_argument("file", type=Path)
            one.add_argument("--limit", type=int, default=1 << 20)
            one.add_argument("--deterministic", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    row = args.part(args)
    failed = row.pop("failed")
    print(json.dumps({"benchmark": f"lossless {args.part.__name__}", **row}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
