"""`skipsearch bench`: rows, groups of prompts, arms; and the widened model, which computes the same function."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import quiet
from hypothesis import given
from hypothesis import strategies as st

from skipsearch import DraftPlan, SkipMask
from skipsearch.bench.arms import AGAIN, HF_ASSISTED, HF_EAGER, HYBRID, MASK, PLAIN, PLAN, arms, prefix_mask
from skipsearch.bench.bench import BenchOptions, bench, weight_bytes
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import copy_bandwidth, peak_memory
from skipsearch.bench.rows import group_rows
from skipsearch.decoding.stats import DecodeStats
from skipsearch.errors import BackendWarning, PromptError, SkipsearchError
from skipsearch.evaluate.timing import Run, Timing
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy
from skipsearch.report.bench import bench_picture, save_bench

ROOT = Path(__file__).parents[2]
SKIP = DraftPlan(SkipMask(attention=[0, 2], mlp=[1], num_layers=4))


@pytest.fixture(scope="module")
def measured(tiny: Any) -> dict[str, Any]:
    groups = {"one": (tuple(range(3, 12)), tuple(range(20, 34))), "two": (tuple(range(40, 47)), tuple(range(60, 71)))}
    options = BenchOptions(new_tokens=16, rounds=1, backend="eager")
    return bench(Target.of(tiny("llama")), groups, SKIP, DraftPolicy(max_length=3, exit_threshold=0.02), options, quiet)


def row(data: dict[str, Any], arm: str, group: str = "all") -> dict[str, Any]:
    return next(r for r in data["rows"] if r["arm"] == arm and r["group"] == group)


def test_every_arm_decodes_the_same_tokens_and_counts_them_alike(measured: Any) -> None:
    """Prevents an arm from being faster because it decodes less or other text, or counts the token of the prefill."""
    names = {r["arm"] for r in measured["rows"]}
    assert {HF_EAGER, HF_ASSISTED, PLAIN, AGAIN, MASK, HYBRID} <= names
    for r in measured["rows"]:
        assert r["greedy_equal"] == r["equal_to_plain"] == r["prompts"], r["arm"]
    # Tokens that come with the prefill are not counted: the first one, or the whole first block.
    assert row(measured, PLAIN)["tokens"] == row(measured, MASK)["tokens"] == row(measured, HF_EAGER)["tokens"] == 60
    assert row(measured, PLAIN)["tokens"] == sum(row(measured, PLAIN, g)["tokens"] for g in ("one", "two"))
    assert row(measured, PLAIN)["speedup_plain"] == 1
    assert measured["machine"]["copy_bytes_per_second"] > 1e8


def test_bound_and_share_by_hand() -> None:
    """Prevents a share of the bound that is computed from the counts of another arm."""

    def timing(seconds: float, blocks: Counter[Any]) -> Timing:
        stats = DecodeStats(blocks=blocks)
        runs = tuple(
            Run(seconds=seconds, tokens=12, prefill=0.1, ids=(1,) * 13, stats=stats if i == 0 else DecodeStats())
            for i in range(2)
        )
        return Timing(seconds=np.full(2, seconds), prefill=np.full(2, 0.1), runs=runs)

    timed = {PLAIN: timing(12.0, Counter({(0, 0): 24})), MASK: timing(8.0, Counter({(4, 2): 8}))}
    found = {r["arm"]: r for r in group_rows("g", timed, {MASK: {"c": 0.25, "bytes": 100}}, 400, 1000.0, 0)}
    assert found[MASK]["speedup_plain"] == pytest.approx(1.5)
    assert found[MASK]["own_bound"] == pytest.approx(3 / (1 + 0.25 * 4))
    assert found[MASK]["share_of_own_bound"] == pytest.approx(1.0)
    assert found[MASK]["bytes_per_second"] == pytest.approx((8 * 400 + 32 * 100) / 16)
    assert found[PLAIN]["of_copy_bandwidth"] == pytest.approx(24 * 400 / 24 / 1000)


def test_saved_rows_are_read_back_and_drawn(measured: Any, tmp_path: Path) -> None:
    """Prevents a picture with other figures than the table, and unescaped names in the SVG."""
    paths = save_bench(measured, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(measured))
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert len(lines) == len(measured["rows"]) + 1 and set(paths) == {"bench.json", "bench.csv", "bench.svg"}
    picture = bench_picture(measured)
    assert f"{row(measured, MASK)['speedup_plain']:.2f}" in picture and "A/A" in picture
    ElementTree.fromstring(picture)


def test_unknown_arm_is_refused(tiny: Any) -> None:
    """Prevents a misspelt arm from being ignored silently."""
    with pytest.raises(SkipsearchError, match="arm is 'masc', must be one of"):
        options = BenchOptions(only=("masc",), backend="eager")
        bench(Target.of(tiny("llama")), {"g": ((3, 4, 5),)}, SKIP, DraftPolicy(), options, quiet)


def test_prompts_by_group(demo: Any, tmp_path: Path) -> None:
    """Prevents the eight categories of MT-bench from being eight groups, and groups from being mixed."""
    names = ("qa", "math", "stem")
    rows = [{"category": c, "turns": [f"{c} number {i} of these", "and then"]} for i in range(6) for c in names]
    file = tmp_path / "spec.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings: dict[str, Any] = {"per_group": 3, "room": 9, "seed": 0, "vocabulary": 4096}
    groups = prompt_groups([str(file), "random", "builtin"], demo.tokenizer, **settings)
    assert list(groups) == ["qa", "mt_bench", "random tokens", "held-out code"]
    assert all(len(group) == 3 for group in groups.values())
    assert all(len(prompt) <= 9 for name, group in groups.items() if name != "held-out code" for prompt in group)
    assert prompt_groups(["random"], demo.tokenizer, **settings) == {"random tokens": groups["random tokens"]}
    file.write_text('{"category": "qa"\n')
    with pytest.raises(PromptError, match=r"line 1 of prompt file .* is not JSON"):
        prompt_groups([str(file)], demo.tokenizer, **settings)


@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_prefix_exit_runs_as_much_as_the_mask(attention: set[int], mlp: set[int]) -> None:
    """Prevents the early exit from running fewer sublayers than the mask."""
    mask = SkipMask(attention=attention, mlp=mlp, num_layers=20)
    prefix = prefix_mask(mask)
    assert prefix.attention == prefix.mlp
    left = [2 * 20 - len(m.attention) - len(m.mlp) for m in (mask, prefix)]
    assert abs(left[0] - left[1]) <= 1 or left[0] < 2


def test_weight_bytes_leave_out_a_table_that_is_only_looked_up_in(tiny: Any) -> None:
    """Prevents bandwidth figures that count an untied embedding, or count a tied head twice."""
    model = tiny("llama")
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert weight_bytes(model) == every - (0 if tied else model.get_input_embeddings().weight.nbytes)


def test_machine_says_what_it_can() -> None:
    """Prevents a zero where a figure cannot be measured."""
    device = torch.device("cpu")
    assert peak_memory(device, lambda: torch.zeros(1000)) > 1e6 and copy_bandwidth(device) > 1e8


def test_arms_without_a_mask(tiny: Any) -> None:
    """Prevents a benchmark from needing a mask: plain decoding and n-grams need none."""
    assert not {MASK, PLAN, HYBRID, HF_ASSISTED} & arms(Target.of(tiny("llama")), None, DraftPolicy(), 64).keys()


def test_widened_model_is_the_same_function(tiny: Any) -> None:
    """Prevents wrong tiling of attention heads, grouped keys or the scale of the output head."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from widen import difference, widen
    finally:
        sys.path.pop(0)
    narrow = tiny("llama")
    for times in (2, 4):
        wide = widen(narrow, times)
        assert difference(narrow, wide) < 1e-5
        layers = [sum(p.numel() for p in m.model.layers.parameters()) for m in (narrow, wide)]
        assert layers[1] > 0.95 * times**2 * layers[0]
        ids = torch.arange(3, 12)[None]
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(wide.generate(ids, **options), narrow.generate(ids, **options))


def test_bench_on_the_command_line(tmp_path: Path) -> None:
    """Prevents --json from printing anything but the object, and a benchmark without its files."""
    command = [str(Path(sys.executable).parent / "skipsearch")]
    done = subprocess.run(
        [*command, "bench", "--model", "demo", "--arm", "n-gram", "--no-hf", "--backend", "eager", "--per-group", "2",
         "--new-tokens", "8", "--rounds", "1", "--out", str(tmp_path), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert {r["arm"] for r in data["rows"]} == {"plain", "n-gram"} and Path(data["files"]["bench.svg"]).exists()


def test_a_method_that_transformers_cannot_run_is_left_out(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a bug in a rival, met with some releases on a GPU, from costing the whole bench."""
    from skipsearch.bench import bench as module

    def broken(*_: Any) -> Run:
        raise TypeError("'NoneType' object is not subscriptable")

    every = module.arms
    monkeypatch.setattr(module, "arms", lambda *given: {**every(*given), HF_ASSISTED: broken})
    options = BenchOptions(new_tokens=6, rounds=1, backend="eager")
    groups = {"one": (tuple(range(3, 12)), tuple(range(20, 28)))}
    with pytest.warns(BackendWarning, match="HF assisted by view"):
        data = bench(Target.of(tiny("llama")), groups, SKIP, DraftPolicy(max_length=3), options, quiet)
    assert {HF_EAGER, MASK} <= {r["arm"] for r in data["rows"]} and HF_ASSISTED not in {r["arm"] for r in data["rows"]}
    monkeypatch.setattr(module, "arms", lambda *given: {**every(*given), MASK: broken})
    with pytest.raises(TypeError):
        bench(Target.of(tiny("llama")), groups, SKIP, DraftPolicy(max_length=3), options, quiet)
