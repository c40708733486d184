"""Make a model n times as wide without changing its function, so that it is bound by memory as large models are.

Every linear W becomes an n x n grid of W / n; embeddings, norms, heads and KV heads are tiled; the output head
is untied and divided by n. Each hidden unit then exists n times with the same value, so the logits stay what they
were (for a power of two n also in half precision, but for the order of sums), and acceptance is that of the real
model, while every layer streams n squared times the bytes.

    python benchmarks/widen.py --times 4 --out /tmp/demo-x4                 # save it; then --model /tmp/demo-x4
    python benchmarks/widen.py --times 4 --out /tmp/demo-x4 --trials 100    # search for it, and decode what was found
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from plans import Drafts, compare, quiet, uniform
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.evaluate.cost import Costs, draft_step
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.mask import SkipMask
from skipsearch.model.device import device_name
from skipsearch.model.load import Loaded, load_model
from skipsearch.model.space import Space
from skipsearch.model.target import Target
from skipsearch.policy import NGRAM
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import candidate_forms, chosen_prompts, paying_space, prepare
from skipsearch.search.run import rescore, search_trials


@torch.no_grad()
def widen(model: PreTrainedModel, times: int) -> PreTrainedModel:
    """A Llama-like model with `times` as many hidden units, heads and MLP units, and the same function.

    Args:
        times: n, at least 1; a power of two keeps division exact.
    """
    config = copy.deepcopy(model.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) * times)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        wide: Any = type(model)(config)
    wide = wide.to(model.dtype).to_empty(device="cpu")
    narrow = dict(model.named_modules())
    head = model.get_output_embeddings()
    for name, module in wide.named_modules():
        old = narrow[name]
        if module is wide.get_output_embeddings():
            module.weight.copy_(head.weight.repeat(1, times) / times)
        elif isinstance(module, nn.Linear):
            module.weight.copy_(old.weight.repeat(times, times) / times)
            if module.bias is not None:
                module.bias.copy_(old.bias.repeat(times))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                tiled: Tensor = getattr(old, key)
                parameter.copy_(tiled.repeat(*[1] * (tiled.dim() - 1), times))
            for key, buffer in module.named_buffers(recurse=False):
                buffer.copy_(getattr(old, key))  # of rotary positions, which depend on the head size alone
                for attribute in ("original_inv_freq",):
                    if hasattr(module, attribute):
                        setattr(module, attribute, getattr(old, attribute))
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval()


def difference(narrow: PreTrainedModel, wide: PreTrainedModel) -> float:
    """Largest difference of logits on random tokens, relative to the largest logit."""
    ids = torch.randint(narrow.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = narrow(ids).logits.float(), wide(ids).logits.float()
    return float((expected - got).abs().max() / expected.abs().max())


def searched(narrow: Loaded, target: Target, folder: Path, options: SearchOptions) -> tuple[Drafts, dict[str, Any]]:
    """The best mask and the best plan for the wide model, with what the searches found and took.

    Drafts are replayed on the narrow model, which accepts the same; seconds are the wide one's.
    """
    prepared = prepare(narrow, folder, replace(options, backend="eager"), quiet)
    context = round(prepared.trace.mean_context)
    forms = candidate_forms(target, Space(num_layers=target.num_layers, fixed=SkipMask(num_layers=target.num_layers)))
    (point,) = profile(target, contexts=[context], max_length=MAX_LENGTH, progress=quiet, forms=forms)
    row: dict[str, Any] = {
        "backend": target.backend, "verify": [seconds / point.verify[0] for seconds in point.verify],
        "plain_seconds": point.verify[0], "rest": point.rest,
        "sublayer_seconds": {form: {kind: of[-1] for kind, of in costs.items()} for form, costs in point.forms.items()}
        | {"run": {"attention": point.attention[-1], "mlp": point.mlp[-1]}},
    }  # fmt: skip
    chosen = Drafts()
    prepared = replace(prepared, costs=Costs(identity="wide", points=(point,)))
    for name, possible in (("mask", []), ("plan", forms)):
        space = paying_space(replace(prepared.space, forms=None), point, possible)
        begin, mine = time.perf_counter(), replace(prepared, space=space)
        (folder / name).mkdir(parents=True, exist_ok=True)
        found, _, _ = rescore(mine, search_trials(narrow, mine, folder / name, options, quiet), quiet)
        chosen[name] = found.plan, found.policy
        row[name] = {"search_seconds": time.perf_counter() - begin, "predicted": found.speedup}
    plan, policy = chosen["plan"]
    step = draft_step(point, plan, policy.uses_confidence)
    chosen["plan, served"] = plan, replace(policy, ngram=NGRAM, never_slower=True, costs=(step, *point.verify))
    return chosen | uniform(target.num_layers), row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="keep the last line here")
    args = parser.parse_args()
    narrow = load_model("demo", dtype="float32", device="cpu")
    wide = widen(narrow.model, args.times)
    row: dict[str, Any] = {
        "benchmark": "widen", "times": args.times, "parameters": sum(p.numel() for p in wide.parameters()),
        "relative_difference_fp32": difference(narrow.model, wide),
    }  # fmt: skip
    wide.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    narrow.tokenizer.save_pretrained(args.out)
    del wide
    if args.trials:
        loaded = load_model(str(args.out), dtype=args.dtype)
        options = SearchOptions(trials=args.trials, held_out=args.held_out, new_tokens=args.tokens)
        target = with_backend(loaded.target, "auto", quiet)
        chosen, found = searched(narrow, target, args.out, options)
        for plan, _ in chosen.values():
            warm_plan(target, plan)
        prompts = chosen_prompts(target, narrow.tokenizer, options).held_out
        row |= found | {"device": device_name(target.device), "dtype": args.dtype}
        row["rows"] = compare(target, prompts, chosen, DecodeSettings(new_tokens=args.tokens, rounds=2))
    if args.rows:
        args.rows.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
