"""Replay of one mask against really decoding with it: seconds, and whether the accepted counts agree.

    python benchmarks/replay_speed.py [--mask results/demo/mask.json]

16 calibration prompts x 128 tokens of the demo model, fp32. Both do the same block walk: once with the
mask's K as a fixed length, once with its own policy. Arms alternate, medians of 5 rounds. A replay starts
from nothing but the trace's keys and values, which a search makes once. Then passes over more and more drafts
at once, up to nearly a trial's, tell whether masks side by side would be faster. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from skipsearch import SkipMask, load_mask, load_model
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SIDE, TRIAL_LENGTH, SearchOptions
from skipsearch.search.prepare import chosen_prompts

PROMPTS, TOKENS, ROUNDS = 16, 128, 5


def accepted(blocks: Counter[tuple[int, int]]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for (_, n), count in blocks.items():
        counts[n] += count
    return counts


def pass_seconds(replay: Replay, mask: SkipMask) -> list[dict[str, Any]]:
    """Passes over more and more block starts at once: once a start costs what it did, more of them gain nothing.

    As many more starts are what several masks in one pass would be, at best: they do not even share what is skipped.
    """
    found: list[dict[str, Any]] = []
    firsts = [(p, len(prompt) + 1) for p, prompt in enumerate(replay.trace.prompts)]
    counts = [count for count in (1, 4, 16, 48, 96) if count <= len(firsts) * replay.side]
    for _ in range(ROUNDS + 1):
        for count in counts:
            starts = sorted((p, t + 3 * (n // len(firsts))) for n in range(count) for p, t in [firsts[n % len(firsts)]])
            begin = time.perf_counter()
            DraftReplay(replay, mask).evaluate(starts)
            found.append({"starts": count, "seconds": time.perf_counter() - begin})
    rows = []
    for count in counts:
        seconds = statistics.median([row["seconds"] for row in found[len(counts) :] if row["starts"] == count])
        tokens = count * replay.max_length
        rows.append({"starts": count, "tokens": tokens, "ms": round(1e3 * seconds, 2),
                     "ms_a_token": round(1e3 * seconds / tokens, 4)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask", type=Path, default=Path("results/demo/mask.json"))
    file = load_mask(parser.parse_args().mask)
    loaded = load_model("demo")
    target, options = loaded.target, SearchOptions(new_tokens=TOKENS)
    prompts = chosen_prompts(target, loaded.tokenizer, options).calibration[:PROMPTS]
    trace = record(target, prompts, DecodeSettings(new_tokens=TOKENS), lambda *_: None)
    draft = file.draft
    policies = {
        "fixed K": DraftPolicy(max_length=draft.max_length),
        "the mask's policy": DraftPolicy(max_length=draft.max_length, exit_threshold=draft.exit_threshold),
    }
    begin = time.perf_counter()
    replay = Replay(target, trace, draft.max_length)
    set_up = time.perf_counter() - begin
    rows = []
    for name, policy in policies.items():
        real_seconds, replay_seconds = [], []
        arm = our_arm(target, file.mask, policy)
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            replayed = DraftReplay(replay, file.mask).walk(policy)
            replay_seconds.append(time.perf_counter() - begin)
            real: Counter[tuple[int, int]] = Counter()
            seconds = 0.0
            for prompt in prompts:
                run = arm(prompt, TOKENS)
                real += run.stats.blocks
                seconds += run.seconds
            real_seconds.append(seconds)
        a, b = statistics.median(replay_seconds), statistics.median(real_seconds)
        rows.append({
            "policy": f"{name}: {policy}", "replay_s": round(a, 3), "decoding_s": round(b, 3), "ratio": round(b / a, 1),
            "ratio_range": [
                round(min(real_seconds) / max(replay_seconds), 1), round(max(real_seconds) / min(replay_seconds), 1),
            ],
            "accepted_counts_identical": accepted(real) == accepted(replayed), "blocks_identical": real == replayed,
        })  # fmt: skip
        print(f"{rows[-1]['policy']}: replay {a:.2f} s, decoding {b:.2f} s, {b / a:.1f} times faster, accepted counts "
              f"{'identical' if rows[-1]['accepted_counts_identical'] else 'DIFFER'}")  # fmt: skip
    passes = pass_seconds(Replay(target, trace, TRIAL_LENGTH, side=SIDE), file.mask)
    for row in passes:
        print(
            f"a pass of {row['starts']} drafts, {row['tokens']} tokens: {row['ms']} ms, {row['ms_a_token']} ms a token"
        )
    print(json.dumps({
        "benchmark": "replay_speed", "passes": passes, "prompts": PROMPTS, "tokens": trace.tokens,
        "set_up_s": round(set_up, 3), "threads": torch.get_num_threads(), "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
