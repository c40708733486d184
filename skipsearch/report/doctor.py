"""What is installed: versions, device, backend, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("skipsearch", "torch", "transformers", "optuna", "optuna-dashboard", "datasets", "pandas", "typer", "rich",
            "pydantic", "scipy", "plotly", "accelerate")  # fmt: skip


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

        facts["backend"] = (
            f"compiled (kept in {keep_compiled()})" if compiler() else "eager; install g++ for the compiled one"
        )
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
