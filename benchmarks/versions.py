"""What did a change cost? Decoding through `generate` in two checkouts, interleaved in one run.

    python benchmarks/versions.py --before ../other-checkout

Each checkout serves from a process of its own, and so does this one a second time (A/A). They take turns, call by call;
seconds are those of one `generate` of 64 tokens, prefill included, with the bundled model: plainly, and with a mask,
eager and compiled. Printed: the median of each, and the ratio after / before with a 95 % interval over turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1]
SERVE = """
import sys, time, json, torch
torch.set_num_threads(2)
from skipsearch import SkipMask, load_model, self_speculative
loaded = load_model("demo")
layers = loaded.target.num_layers
mask = SkipMask(attention=range(1, layers, 2), mlp=range(2, layers, 2), num_layers=layers)
ids = loaded.tokenizer("def read_config(path):\\n", return_tensors="pt").input_ids
def method(kind, backend):
    return self_speculative(mask if kind == "mask" else None, backend=backend)
methods = {(k, b): method(k, b) for k in ("plain", "mask") for b in ("eager", "compiled")}
def run(key):
    begin = time.perf_counter()
    loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=None,
                          do_sample=False, eos_token_id=None, custom_generate=methods[key])
    return time.perf_counter() - begin
for key in methods:
    for _ in range(3):
        run(key)
print("ready", flush=True)
for line in sys.stdin:
    print(run(tuple(line.split())), flush=True)
"""


class Server:
    """A checkout that decodes when it is told to."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVE], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, cwd=folder,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.ask, self.said = self.process.stdin, self.process.stdout
        assert self.said.readline().strip() == "ready"

    def seconds(self, kind: str, backend: str) -> float:
        self.ask.write(f"{kind} {backend}\n")
        self.ask.flush()
        return float(self.said.readline())


def interval(ratios: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median ratio of a turn."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    servers = {"before": Server(args.before.resolve()), "after": Server(HERE), "after again (A/A)": Server(HERE)}
    rng, rows = np.random.default_rng(0), []
    for kind in ("plain", "mask"):
        for backend in ("eager", "compiled"):
            found: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(args.turns):
                for name in rng.permutation(list(servers)):
                    found[name].append(servers[name].seconds(kind, backend))
            times = {name: np.array(values) for name, values in found.items()}
            for name, base in (("after", "before"), ("after again (A/A)", "after")):
                ratios = times[name] / times[base]
                low, high = interval(ratios)
                rows.append({
                    "decoding": kind, "backend": backend, "of": name, "over": base,
                    "ms": round(1e3 * float(np.median(times[name])), 2),
                    "ratio": round(float(np.median(ratios)), 4), "ci": [round(low, 4), round(high, 4)],
                })  # fmt: skip
                print(rows[-1], flush=True)
    for server in servers.values():
        server.process.kill()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
