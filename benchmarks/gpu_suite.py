"""What a GPU is asked: bandwidth, plain decoding, cost ratios of the published masks, a bench of the widened model.

    benchmarks/gpu_suite.sh [folder]                             # on a CUDA machine
    python benchmarks/gpu_suite.py --tiny --out /tmp/suite       # the same code on a CPU, with tiny shapes

Parts, in this order, each a row of rows.jsonl; one that fails is a row with its error, and the rest goes on:
copies      bandwidth of a large copy and of a large product with a vector
shape X     a Llama of that shape with random weights, bf16: ms a token of `generate`, of our eager and our compiled
            backend, as percent of the copy bandwidth; seconds of verifying 0, 4, 8, 12 tokens; the cost ratio c of a
            draft step in both backends: of each published mask of that shape, of every sublayer in int8 and in int4,
            with the full head, with it quantised too, and over an eighth of the tokens
widened     the bundled model widened to more than 10^9 parameters, bf16: searches over masks and over plans with
            compiled costs, both decoded beside plain decoding, n-grams and all int8, and a bench with all arms
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plans import compare
from transformers import LlamaConfig, LlamaForCausalLM
from widen import difference, searched, widen

from skipsearch.bench.arms import hf_arm
from skipsearch.bench.bench import BenchOptions, bench, weight_bytes
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import copy_bandwidth, read_bandwidth
from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.draft.copies import possible_forms
from skipsearch.evaluate.clock import sequence_at, step_costs, timed
from skipsearch.evaluate.form_speed import form_seconds
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.model.device import device_name
from skipsearch.model.load import load_model
from skipsearch.model.preset import presets
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy
from skipsearch.report.bench import save_bench
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import chosen_prompts

SHAPES = {  # hidden, MLP, layers, heads, KV heads, vocabulary; the presets of these names hold masks that fit
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
}
TINY = {"llama-2-13b": (64, 128, 40, 4, 4, 512)}


def quiet(*_: Any) -> None:
    pass


def random_llama(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of this shape, weights drawn so that activations stay finite (zeros would read faster than real ones)."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, eos_token_id=None,
        bos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02 if "embed" in name else parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def shape_row(name: str, shape: tuple[int, ...], device: torch.device, bandwidth: float, tokens: int) -> dict[str, Any]:
    """Plain decoding and cost ratios at one shape."""
    model = random_llama(shape, device, torch.bfloat16)
    prompt = tuple(range(3, 67))
    moved = weight_bytes(model)
    row: dict[str, Any] = {"shape": name, "parameters": sum(p.numel() for p in model.parameters()), "bytes": moved}
    start = time.perf_counter()
    eager = Target.of(model)
    compiled = with_backend(eager, "compiled")
    row["compile_seconds"] = time.perf_counter() - start
    arms = {"generate": hf_arm(eager), "eager": our_arm(eager)}
    if compiled.compiled is not None:
        arms["compiled"] = our_arm(compiled)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(4):
        for arm, run in arms.items():
            done = run(prompt, tokens)
            if turn:
                seconds[arm].append(done.seconds / done.tokens)
    for arm, values in seconds.items():
        step = statistics.median(values)
        row[arm] = {"ms_a_token": 1e3 * step, "of_copy_bandwidth": moved / step / bandwidth}
    if compiled.compiled is not None:
        row["compiled_over_generate"] = row["generate"]["ms_a_token"] / row["compiled"]["ms_a_token"]
    for label, target in (("eager", eager), ("compiled", compiled))[: len(arms) - 1]:
        plain = sequence_at(target, None, 128, MAX_LENGTH)
        row[f"verify_{label}"] = {
            k: statistics.median(timed(plain, partial(plain.verify, [k])) for _ in range(9)) for k in (0, 1, 4, 8, 12)
        }
        del plain
        row[f"c_{label}"] = {}
        preset = presets().get(name)
        for seed in preset.masks if preset is not None else ():
            if seed.mask.num_layers == shape[2]:
                warm_plan(target, seed.mask)
                draft, step = step_costs(target, DraftPlan(seed.mask), 128, repeats=7)
                row[f"c_{label}"][seed.name] = draft / step
        row[f"c_forms_{label}"] = form_costs(target)
    return row


def form_costs(target: Target) -> dict[str, float | str]:
    """The cost ratio c of plans that quantise every sublayer, by form and head; or why a form is not possible."""
    found: dict[str, float | str] = {}
    few = range(target.vocabulary // 8)
    for form, why in possible_forms(target.model).items():
        plans = {
            form: DraftPlan.everywhere(form, target.num_layers, "full"),
            f"{form}, head": DraftPlan.everywhere(form, target.num_layers),
            f"{form}, head of few": DraftPlan.from_forms([form] * 2 * target.num_layers, form, few),
        }  # fmt: skip
        for name, plan in plans.items():
            if why is None:
                warm_plan(target, plan)
                draft, step = step_costs(target, plan, 128, repeats=7)
                found[name] = draft / step
            else:
                found[name] = why
    return found


def widened_row(
    times: int, device: torch.device, folder: Path, tokens: int, then: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """The bundled model widened, searched for over masks and over plans, and measured."""
    narrow = load_model("demo", dtype="float32", device="cpu")
    wide = widen(narrow.model, times)
    row: dict[str, Any] = {"times": times, "parameters": sum(p.numel() for p in wide.parameters())}
    if device.type == "cpu":
        row["relative_difference_fp32"] = difference(narrow.model, wide)
    wide = wide.to(device, torch.bfloat16)
    narrow.model.to(device)
    target = with_backend(Target.of(wide), "auto")
    row["backend"], row["form_seconds"] = target.backend, form_seconds(target)
    options = SearchOptions(trials=50, new_tokens=tokens, prompts=8, held_out=8)
    chosen, found = searched(narrow, target, folder, options)
    plan, served = chosen["plan, served"]
    row |= found
    for drafted, _ in chosen.values():
        warm_plan(target, drafted)
    prompts = chosen_prompts(narrow.target, narrow.tokenizer, options).held_out
    row["arms"] = compare(target, prompts, chosen, DecodeSettings(new_tokens=tokens, rounds=2))
    then |= {"tokenizer": narrow.tokenizer, "target": target, "plan": plan, "served": served}
    return row


def bench_row(
    folder: Path, per_group: int, tokens: int, tokenizer: Any, target: Target, plan: DraftPlan, served: DraftPolicy
) -> dict[str, Any]:  # fmt: skip
    """All arms of the bench on the widened model."""
    groups = prompt_groups(
        ["builtin", "random"], tokenizer, per_group=per_group, room=300, seed=0, vocabulary=target.vocabulary
    )
    data = bench(target, groups, plan, served, BenchOptions(new_tokens=tokens, rounds=2), quiet)
    save_bench(data, folder)
    shown = ("arm", "tokens_per_second", "speedup_hf", "speedup_plain", "speedup_plain_ci", "share_of_own_bound",
             "of_copy_bandwidth", "joules_per_token", "equal_to_plain", "prompts")  # fmt: skip
    return {"arms": [{k: r.get(k) for k in shown} for r in data["rows"] if r["group"] == "all"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--parts", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    args = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "rows.jsonl"
    here = {"device": device_name(device), "torch": torch.__version__}
    bandwidth = 1.0

    def part(name: str, run: Callable[[], dict[str, Any]], needs: float) -> None:
        nonlocal bandwidth
        if args.parts and name != "copies" and not any(name.startswith(wanted) for wanted in args.parts):
            return
        left = 60 * args.minutes - (time.monotonic() - begin)
        row: dict[str, Any] = {"benchmark": "gpu_suite", "part": name, **here}
        start = time.monotonic()
        if left < needs:
            row["skipped"] = f"{left:.0f} s are left, it takes about {needs:.0f}"
        else:
            try:
                row |= run()
            except Exception as error:  # the other parts are worth having all the same
                row |= {"error": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-1500:]}
        row["seconds"] = time.monotonic() - start
        bandwidth = row.get("copy_bytes_per_second", bandwidth)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "where"}), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    part(
        "copies",
        lambda: {"copy_bytes_per_second": copy_bandwidth(device), "read_bytes_per_second": read_bandwidth(device)}, 5,
    )  # fmt: skip
    tokens = 24 if args.tiny else 64
    for name, shape in (TINY if args.tiny else SHAPES).items():
        part(f"shape {name}", lambda n=name, s=shape: shape_row(n, s, device, bandwidth, tokens), 45)  # type: ignore[misc]
    (times, per_group), then = (2, 2) if args.tiny else (16, 3), dict[str, Any]()
    folder = args.out / "widened"
    part("widened", lambda: widened_row(times, device, folder, tokens, then), 120)
    if then:
        part("bench of widened", lambda: bench_row(folder, per_group, tokens, **then), 60)


if __name__ == "__main__":
    main()
