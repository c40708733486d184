"""What a GPU is asked: bandwidth, plain decoding, cost ratios of the published masks, a bench of the widened model.

    benchmarks/gpu_suite.sh [folder]                             # on a CUDA machine
    python benchmarks/gpu_suite.py --tiny --out /tmp/suite       # the same code on a CPU, with tiny shapes

Parts, in this order, each a row of rows.jsonl; one that fails is a row with its error, and the rest goes on:
copies      bandwidth of a large copy and of a large product with a vector
shape X     a Llama of that shape with random weights, bf16: ms a token of `generate`, of our eager and our compiled
            backend, as percent of the copy bandwidth; seconds of verifying 0, 4, 8, 12 tokens; the cost ratio c of a
            draft step in both backends: of each published mask of that shape, of every sublayer in int8 and in int4,
            with the full head, with it quantised too, and over an eighth of the tokens
widened     the bundled model widened to more than 10^9 parameters, bf16: a mask searched with compiled costs (with
            optuna; without it, the measured mask's policy is fitted anew), validated, and a bench with all arms
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from widen import difference, widen

from skipsearch.bench.arms import hf_arm
from skipsearch.bench.bench import BenchOptions, bench, step_costs, weight_bytes
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import copy_bandwidth, read_bandwidth
from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.draft.copies import possible_forms
from skipsearch.evaluate.clock import sequence_at, timed
from skipsearch.evaluate.cost import Costs, Point
from skipsearch.evaluate.objective import best_policy
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.evaluate.windows import WindowReplay, Windows
from skipsearch.mask import SkipMask
from skipsearch.maskfile import load_mask
from skipsearch.model.device import device_name
from skipsearch.model.load import Loaded, load_model
from skipsearch.model.preset import presets
from skipsearch.model.space import Space
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan, Quantised
from skipsearch.policy import DraftPolicy
from skipsearch.report.bench import save_bench
from skipsearch.search.options import MAX_LENGTH, SIDE, TRIAL_LENGTH, SearchOptions

ROOT = Path(__file__).parents[1]
SHAPES = {  # hidden, MLP, layers, heads, KV heads, vocabulary; the preset whose published masks fit
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
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


def widened_row(times: int, device: torch.device, folder: Path, per_group: int, tokens: int) -> dict[str, Any]:
    """The bundled model widened, searched for and measured."""
    narrow = load_model("demo", dtype="float32", device="cpu")
    wide = widen(narrow.model, times)
    row: dict[str, Any] = {"times": times, "parameters": sum(p.numel() for p in wide.parameters())}
    if device.type == "cpu":
        row["relative_difference_fp32"] = difference(narrow.model, wide)
    wide = wide.to(device, torch.bfloat16)
    narrow.model.to(device)
    target = with_backend(Target.of(wide), "auto")
    from skipsearch.search.prepare import candidate_forms

    forms = candidate_forms(target, Space(num_layers=target.num_layers, fixed=SkipMask(num_layers=target.num_layers)))
    (point,) = profile(target, contexts=[112], max_length=MAX_LENGTH, progress=quiet, forms=forms)
    row |= {"verify": point.verify, "attention": point.attention[-1], "mlp": point.mlp[-1], "rest": point.rest}
    plan, policy, how = _search(narrow, point, forms, folder, tokens)
    warm_plan(target, plan)
    policy = dataclasses.replace(policy, ngram=10, never_slower=True)
    groups = prompt_groups(
        ["builtin", "random"], narrow.tokenizer, per_group=per_group, room=300, seed=0,
        vocabulary=target.vocabulary,
    )  # fmt: skip
    data = bench(target, groups, plan, policy, BenchOptions(new_tokens=tokens, rounds=2), quiet)
    save_bench(data, folder)
    shown = ("arm", "tokens_per_second", "speedup_hf", "speedup_plain", "speedup_plain_ci", "share_of_own_bound",
             "of_copy_bandwidth", "joules_per_token", "equal_to_plain", "prompts")  # fmt: skip
    row["bench"] = [{k: r.get(k) for k in shown} for r in data["rows"] if r["group"] == "all"]
    return row | {"plan": plan.columns(), "policy": str(policy), "found_by": how}


def _search(
    narrow: Loaded, point: Point, forms: Sequence[Quantised], folder: Path, tokens: int
) -> tuple[DraftPlan, DraftPolicy, str]:
    """A plan and a policy for these costs, their drafts replayed on the narrow model; and how they were found."""
    try:
        from skipsearch.search.prepare import paying_space, prepare
        from skipsearch.search.run import rescore, search_trials

        options = SearchOptions(trials=40, new_tokens=tokens, prompts=12, held_out=4, backend="eager")
        costs = Costs(identity="wide", points=(point,))
        prepared = dataclasses.replace(prepare(narrow, folder, options, quiet), costs=costs)
        space = paying_space(dataclasses.replace(prepared.space, forms=None), point, forms)
        prepared = dataclasses.replace(prepared, space=space)
        found, _, _ = rescore(prepared, search_trials(narrow, prepared, folder, options, quiet), quiet)
        return found.plan, found.policy, f"{options.trials} trials"
    except ImportError as missing:
        target, file = narrow.target, load_mask(ROOT / "results" / "measured" / "demo.mask.json")
        source = prompt_groups(
            ["builtin"], narrow.tokenizer, per_group=8, room=300, seed=1, vocabulary=target.vocabulary
        )["held-out code"]
        trace = record(target, source, DecodeSettings(new_tokens=tokens), quiet)
        outcomes = WindowReplay(Windows(Replay(target, trace, TRIAL_LENGTH, side=SIDE)), file.mask).outcomes()
        found = best_policy(outcomes, file.mask, point)
        return found.plan, found.policy, f"the measured mask, its policy fitted anew ({missing})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5)
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
    times, per_group = (2, 2) if args.tiny else (16, 6)
    part("widened", lambda: widened_row(times, device, args.out / "widened", per_group, tokens), 120)


if __name__ == "__main__":
    main()
