"""Make a model n times as wide without changing its function, so that it is bound by memory as large models are.

Every linear W becomes an n x n grid of W / n; embeddings, norms, heads and KV heads are tiled; the output head
is untied and divided by n. Each hidden unit then exists n times with the same value, so the logits stay what they
were (for a power of two n also in half precision, but for the order of sums), and acceptance is that of the real
model, while every layer streams n squared times the bytes.

    python benchmarks/widen.py --times 4 --out /tmp/demo-x4                 # save it; then --model /tmp/demo-x4
    python benchmarks/widen.py --times 4 --out /tmp/demo-x4 --trials 100    # and search a mask for it

The search replays drafts on the narrow model, which accepts the same, and takes seconds from the wide one.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.evaluate.cost import Costs, draft_step
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.evaluate.validate import SERVED, Validation, arm_of, evidence
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, Provenance
from skipsearch.model.load import load_model, model_card
from skipsearch.model.space import Space
from skipsearch.policy import NGRAM
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import candidate_forms, paying_space, prepare
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


def search_wide(narrow: Any, wide: Any, folder: Path, trials: int, new_tokens: int, held_out: int) -> dict[str, Any]:
    """A mask for the wide model: replay on the narrow one, seconds of the wide one, validated on the wide one."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == total:
            print(f"{stage}: {done}", flush=True)

    options = SearchOptions(trials=trials, held_out=held_out, new_tokens=new_tokens)
    prepared = prepare(narrow, folder, replace(options, backend="eager"), progress)
    target = with_backend(wide.target, "auto", progress)
    context = round(prepared.trace.mean_context)
    forms = candidate_forms(target, Space(num_layers=target.num_layers, fixed=SkipMask(num_layers=target.num_layers)))
    (point,) = profile(target, contexts=[context], max_length=MAX_LENGTH, progress=progress, forms=forms)
    space = paying_space(replace(prepared.space, forms=None), point, forms)
    prepared = replace(prepared, costs=Costs(identity="wide", points=(point,)), space=space)
    study = search_trials(narrow, prepared, folder, options, progress)
    found, trial, _ = rescore(prepared, study, progress)
    warm_plan(target, found.plan)
    step = draft_step(point, found.plan, found.policy.uses_confidence)
    served = replace(found.policy, ngram=NGRAM, never_slower=True, costs=(step, *point.verify))
    settings = DecodeSettings(new_tokens=new_tokens, rounds=1)
    alone = arm_of(found.plan)
    plans = {alone: (found.plan, found.policy), SERVED: (found.plan, served)}
    measured = Validation(target, prepared.prompts.held_out, dict(plans), settings).run(progress)
    MaskFile.of(
        found.plan, model=model_card(target, folder.name), draft=served,
        evidence=evidence(target, prepared.prompts.held_out, measured, found.cost_ratio, arm=alone),
        provenance=Provenance(torch=torch.__version__, transformers=transformers.__version__, trial=trial),
    ).save(folder / "mask.json")  # fmt: skip
    return {
        "plan": found.plan.columns(), "policy": str(served), "predicted": found.speedup,
        "speedup": measured.arms[alone].speedup, "speedup_ci": measured.arms[alone].speedup_ci,
        "served": measured.arms[SERVED].speedup, "cost_ratio": found.cost_ratio,
        "verify": [seconds / point.verify[0] for seconds in point.verify],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=8)
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
        row |= search_wide(narrow, loaded, args.out, args.trials, args.tokens, args.held_out)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
