"""Energy: the machine's counters as they are found, and a reason where they tell nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipsearch.decoding.stats import DecodeStats
from skipsearch.evaluate import energy
from skipsearch.evaluate.energy import Energy, EnergyMeter
from skipsearch.evaluate.timing import Run, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for folder, name in (("0", "package-0"), ("0:0", "core"), ("1", "package-1"), ("2", "psys")):
        domain = tmp_path / f"intel-rapl:{folder}"
        domain.mkdir()
        for file, value in (("name", name), ("energy_uj", "9000000"), ("max_energy_range_uj", "10000000")):
            (domain / file).write_text(f"{value}\n")
    return tmp_path


def test_packages_are_summed_and_wrap_around(powercap: Path) -> None:
    """Prevents joules of parts counted twice, and a negative figure when a counter starts again from 0."""
    meter = EnergyMeter(CPU)
    assert meter.source == "RAPL, CPU packages: 2" and meter.joules() == 0
    (powercap / "intel-rapl:0" / "energy_uj").write_text("9500000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("1000000")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("9900000")
    assert meter.joules() == pytest.approx(0.5 + 2)


def test_counters_that_cannot_be_read(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a crash, or 0 joules, where the system keeps the counter from us; these tests may run as root."""
    meter, read = EnergyMeter(CPU), Path.read_text

    def denied(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    for found in (meter, EnergyMeter(CPU)):
        assert found.joules() is None and "energy_uj is readable by root alone" in str(found.reason)
    monkeypatch.setattr(energy, "POWERCAP", powercap / "none")
    assert EnergyMeter(CPU).reason == f"{powercap}/none has no RAPL counter"
    assert "type mps" in str(EnergyMeter(torch.device("mps")).reason)


@pytest.mark.parametrize("fault", ["", "library", "driver", "counter", "split"])
def test_nvml(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents another GPU's joules under CUDA_VISIBLE_DEVICES, millijoules, and those of all parts of a split GPU."""

    class NVMLError(Exception):
        pass

    def fails_with(name: str, value: Any) -> Any:
        def call(*_: Any) -> Any:
            if fault == name:
                raise NVMLError("Not Supported")
            return value() if callable(value) else value

        return call

    counter = iter([5000, 7500, 9000])
    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=fails_with("driver", None), nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=fails_with("counter", lambda: next(counter)),
        nvmlDeviceGetMigMode=lambda handle: [fault == "split" and handle == "GPU-12-34", 0],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", None if fault == "library" else fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="12-34"))
    meter = EnergyMeter(GPU)
    reasons = {"library": r"skipsearch[energy]", "driver": "finds no", "counter": "be read: Not Supp", "split": "MIG"}
    if fault:
        assert meter.joules() is None and not meter.source and reasons[fault] in str(meter.reason)
    else:
        assert meter.source == "NVML" and (meter.joules(), meter.joules()) == (2.5, 4.0)


@pytest.mark.parametrize(("joules", "seconds", "why"), [(2, 0.6, None), (2, 0.2, "too short"), (0, 9, "stood still")])
def test_joules_a_token_are_of_all_runs(joules: float, seconds: float, why: str | None) -> None:
    """Prevents a figure from runs that are shorter than the counter's steps, 0 for one that stands still, or 0/0."""
    meter: Any = SimpleNamespace(joules=iter_joules(joules).__next__, reason=None)
    run = Run(seconds=seconds / 2, tokens=3, prefill=seconds / 2, ids=(1, 2, 3, 4), stats=DecodeStats())
    settings = DecodeSettings(new_tokens=4, rounds=2)
    timed = time_interleaved({"a": lambda *_: run}, [(1,), (2,)], settings, lambda *_: None, "", meter)
    found = (timed["a"].energy + Energy(reason=None)).to_dict()
    assert found["joules_per_token"] == (None if why else joules / 4)
    assert why in found["energy_reason"] if why else found["energy_reason"] is None
    assert Energy.of([(None, 1.0, 4)], "none here").to_dict() == {
        "joules_per_token": None,
        "energy_reason": "none here",
    }


def iter_joules(step: float) -> Iterator[float]:
    """Readings before and after each run; between runs the counter goes on."""
    total = 0.0
    while True:
        yield total
        total += step
        yield total
        total += 100
