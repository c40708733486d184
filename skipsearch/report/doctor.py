"""What is installed: versions, device, backend, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from skipsearch.plan import QUANTISED

PACKAGES = ("skipsearch", "torch", "transformers", "optuna", "optuna-dashboard", "datasets", "pandas", "typer", "rich",
            "pydantic", "scipy", "plotly", "accelerate")  # fmt: skip


WIDTH, LAYERS = 1536, 4  # of the model whose products are timed


def _forms(device: Any) -> str:
    """What products of one row cost in each form on this machine, and which forms are left out of a search."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from skipsearch.compiled.compile import compiler
    from skipsearch.compiled.model import CompiledModel
    from skipsearch.evaluate.form_speed import form_seconds, paying_forms
    from skipsearch.model.target import Target

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=16, vocab_size=128
    )
    with torch.device(device):
        target = Target.of(LlamaForCausalLM(config).to(dtype).eval())
    if compiler() is not None:
        target = replace(target, compiled=CompiledModel(target))
    seconds = form_seconds(target)
    pays, whole, said = paying_forms(seconds), seconds["run"], []
    for form in QUANTISED:
        value = seconds[form]
        if isinstance(value, float) and isinstance(whole, float):
            said.append(f"{form} {value / whole:.2f}" + ("" if form in pays else " (left out: not cheaper here)"))
        else:
            said.append(f"{form} left out: {value}")
    return f"{', '.join(said)} of a {str(dtype).removeprefix('torch.')} product's time ({target.backend})"


def _other_versions(versions: dict[str, str]) -> list[str]:
    """One sentence for each package of another version than this one was tested with."""
    try:
        wanted = [Requirement(text) for text in requires("skipsearch") or ()]
    except PackageNotFoundError:  # run from a folder, without being installed
        return []
    return [
        f"{need.name} {need.specifier}, {found} is installed: `pip install '{need.name}{need.specifier}'`"
        for need in wanted
        if not need.marker and (found := versions.get(need.name, "not installed")) != "not installed"
        and not need.specifier.contains(found, prereleases=True)
    ]  # fmt: skip


def examine() -> dict[str, Any]:
    """Facts by name, and "missing": one sentence for each thing that a run needs and does not find."""
    missing = []
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
            missing.append(f"{name}: install it with `pip install {name}`")
    missing += _other_versions(versions)
    facts: dict[str, Any] = {"versions": versions}
    if versions["torch"] != "not installed":
        import torch

        from skipsearch.model.device import device_name

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts |= {
            "device": f"{device}: {device_name(device)}",
            "default dtype": "as stored" if device.type == "cuda" else "float32",
        }
        from skipsearch.compiled.compile import compiler, keep_compiled
        from skipsearch.evaluate.energy import EnergyMeter

        meter = EnergyMeter(device)
        facts["energy counter"] = meter.source or f"n/a: {meter.reason}"
        facts["backend"] = (
            f"compiled (kept in {keep_compiled()})" if compiler() else "eager; install g++ for the compiled one"
        )
        try:
            facts["draft forms"] = _forms(device)
        except Exception as error:  # a broken compiler raises anything, and doctor is for such machines
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            facts["draft forms"] = f"not measured ({why})"
            if compiler():  # it is there and does not work, so decoding will be eager
                facts["backend"] = f"eager: compiling fails ({why}); mend or reinstall g++"
    model = Path(__file__).resolve().parents[1] / "demo" / "model" / "model.safetensors"
    facts["bundled model"] = "present" if model.is_file() else "absent"
    if not model.is_file():
        missing.append("the bundled model: reinstall skipsearch, or run `python benchmarks/train_demo.py` in a clone")
    facts["hub"] = "offline (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else "online when needed"
    free = shutil.disk_usage(Path.cwd()).free
    facts["free disk"] = f"{free / 2**30:.1f} GiB"
    if free < 2**28:
        missing.append("disk space: free at least 256 MiB for results")
    return {**facts, "missing": missing}
