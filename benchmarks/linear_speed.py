"""Products of few rows with all weights of a model: plain against packed, milliseconds.

    python benchmarks/linear_speed.py [--model demo] [--dtype float32]

What a step's linear layers take, for 1 to 13 rows: torch's own product, and oneDNN's with packed weights, which the
compiled backend takes where it wins. Arms alternate, medians of 9 turns. On a machine with AVX-512, these variables
show what one with AVX2 does: ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipsearch import load_model
from skipsearch.compiled.packing import Packed, packed_product
from skipsearch.model.device import device_name

ROWS, TURNS = (1, 2, 4, 6, 9, 13), 9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    model = load_model(args.model, dtype=args.dtype, device="cpu").model
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    arms: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {"plain": lambda x, linear: F.linear(x, linear.weight)}
    try:
        packed = Packed(linears)
        packed_product(linears[0].weight.new_ones(1, linears[0].in_features), packed.of(linears[0]), None)
        arms["packed"] = lambda x, linear: packed_product(x, packed.of(linear), None)
    except RuntimeError as error:
        print(f"no packed products here: {str(error).splitlines()[0]}")
    rows = []
    for count in ROWS:
        inputs = {n: linears[0].weight.new_ones(1, count, n) for n in {linear.in_features for linear in linears}}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(TURNS + 2):
            for name, product in arms.items():
                begin = time.perf_counter()
                for linear in linears:
                    product(inputs[linear.in_features], linear)
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - begin)
        rows.append(
            {"rows": count} | {f"{name}_ms": round(1e3 * statistics.median(s), 2) for name, s in seconds.items()}
        )
        print(rows[-1], flush=True)
    size = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
    print(json.dumps({
        "benchmark": "linear_speed", "model": args.model, "dtype": args.dtype, "device": device_name(model.device),
        "capability": torch.backends.cpu.get_cpu_capability(), "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "weight_bytes": size, "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
