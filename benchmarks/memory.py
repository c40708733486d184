"""Peak memory of speculative decoding against plain decoding of the same tokens.

    python benchmarks/memory.py [--model demo] [--mask results/demo/mask.json ..]

Each arm is a fresh process that loads the model and decodes 4 prompts. Three figures: the
peak resident size of the process (on a GPU: the allocator's peak); how far that lies above the size before
the model was loaded, which on a small model is half library code; and the bytes of all tensors alive at
the end, parameters and caches, shared storage counted once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 3
KEYS = ("peak", "above_start", "tensors")


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def arm(model: str, mask_path: str, backend: str, tokens: int) -> None:
    import torch

    from skipsearch import load_model, self_speculative
    from skipsearch.search.options import SearchOptions
    from skipsearch.search.prepare import chosen_prompts

    before = resident()
    loaded = load_model(model)
    method = self_speculative(mask_path or None, backend=backend)  # type: ignore[arg-type]
    prompts = chosen_prompts(loaded.target, loaded.tokenizer, SearchOptions()).held_out[:4]
    for prompt in prompts:
        ids = torch.tensor([prompt], device=loaded.model.device)
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, custom_generate=method,
            return_dict_in_generate=True,
        )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak, before = torch.cuda.max_memory_allocated(), 0
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_mkldnn  # not the compiler's stand-ins
    }
    assert out is not None
    print(
        json.dumps(
            {
                "peak": peak,
                "above_start": peak - before,
                "tensors": sum(storages.values()),
                "tokens": method.stats.committed,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mask", nargs="+", default=["results/demo/mask.json"])
    parser.add_argument("--backend", default="eager", choices=["eager", "compiled"])
    parser.add_argument("--tokens", type=int, default=384, help="new tokens of each of 4 prompts")
    parser.add_argument("--arm")
    args = parser.parse_args()
    if args.arm is not None:
        arm(args.model, args.arm, args.backend, args.tokens)
        return
    found: dict[str, list[dict[str, int]]] = {path: [] for path in ("", *args.mask)}
    for _ in range(ROUNDS):
        for path, results in found.items():
            command = [sys.executable, __file__, "--model", args.model, "--backend", args.backend, "--arm", path,
                       "--tokens", str(args.tokens)]  # fmt: skip
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    median = {
        path: {key: statistics.median(r[key] for r in results) for key in KEYS} for path, results in found.items()
    }
    ratio = {path: {key: median[path][key] / median[""][key] for key in KEYS} for path in args.mask}
    for path in args.mask:
        for key in KEYS:
            plain, mask = (median[name][key] / 2**20 for name in ("", path))
            print(f"{path} {key:12} {plain:8.1f} MiB plain, {mask:8.1f} MiB with it, ratio {ratio[path][key]:.3f}")
    rounded = {path: {key: round(value, 4) for key, value in of.items()} for path, of in ratio.items()}
    row = {"benchmark": "memory", "model": args.model, "backend": args.backend, "ratio": rounded, "bytes": median}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
