"""Energy: joules by the machine's own counters, NVML's on a GPU and RAPL's on a CPU; or the reason why there are none.

A counter counts all that its device does, other processes and waiting too. It moves in steps of up to 100 ms, so single
runs cannot be told apart: all runs of an arm are summed. It is read between runs, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
LEAST = 1.0  # seconds that an arm's runs must take in all
Counter = tuple[Callable[[], float], float]  # reads joules; at how many it starts again from 0 (0: never)


class _NoCounter(Exception):
    """Says why nothing can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """What runs used, prefill included; in sum.

    Attributes:
        joules, seconds, tokens: of the runs whose joules are known.
        reason: why they are not known, where they are not.
    """

    joules: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    reason: str | None = "not measured"

    @classmethod
    def of(cls, runs: Iterable[tuple[float | None, float, int]], reason: str | None) -> Energy:
        """The sum over runs, each (joules or None, seconds, tokens)."""
        known = [run for run in runs if run[0] is not None]
        joules, seconds, tokens = (sum(column) for column in zip(*known, strict=True)) if known else (0, 0, 0)
        return cls(joules=joules, seconds=seconds, tokens=tokens, reason=reason)

    def __add__(self, other: Energy) -> Energy:
        runs = [(e.joules, e.seconds, e.tokens) for e in (self, other)]
        return Energy.of(runs, self.reason or other.reason)

    @property
    def unknown(self) -> str | None:
        """Why joules a token are not known; None if they are."""
        if not self.tokens:
            return self.reason or "no tokens were decoded"
        if self.seconds < LEAST:
            return f"runs of less than {LEAST:g} s in all are too short for the counter; raise --new-tokens or --rounds"
        return None if self.joules > 0 else "the counter stood still"

    @property
    def per_token(self) -> float | None:
        """Joules a token, to four digits."""
        return None if self.unknown else float(f"{self.joules / self.tokens:.4g}")

    def to_dict(self) -> dict[str, Any]:
        """For a row of JSON: the figure, or null with the reason."""
        return {"joules_per_token": self.per_token, "energy_reason": self.unknown}


class EnergyMeter:
    """The counters of a device.

    Args:
        devices: on how many the model lies; of several none is read.

    Attributes:
        source: what is read; empty if nothing can be.
        reason: why nothing can be read, or could be the last time; None if it could.
    """

    reason: str | None = None

    def __init__(self, device: torch.device, devices: int = 1) -> None:
        self.source, self._sum, self._last = "", 0.0, list[float]()
        try:
            if devices > 1:
                raise _NoCounter(f"the model lies on {devices} devices")
            self._counters = _gpu(device) if device.type == "cuda" else _packages(device)
            self._last = [read() for read, _ in self._counters]
            self.source = "NVML" if device.type == "cuda" else f"RAPL, CPU packages: {len(self._counters)}"
        except _NoCounter as error:
            self.reason = str(error)

    def joules(self) -> float | None:
        """Used since this meter was made; None if it cannot be read. To be called more often than a counter wraps."""
        if not self.source:
            return None
        try:
            now = [read() for read, _ in self._counters]
        except _NoCounter as error:
            self.reason = str(error)
            return None
        for before, after, (_, size) in zip(self._last, now, self._counters, strict=True):
            self._sum += max(0.0, after - before + (size if after < before else 0.0))
        self._last, self.reason = now, None
        return self._sum


def _packages(device: torch.device) -> list[Counter]:
    """RAPL's counters of whole CPU packages; their parts, and the platform's, would count the same joules again."""
    if device.type != "cpu":
        raise _NoCounter(f"no energy counter is known for a device of type {device.type}")

    def joules(path: Path) -> float:
        try:
            return int(path.read_text()) / 1e6
        except PermissionError:
            raise _NoCounter(f"{path} is readable by root alone; chmod a+r it") from None
        except (OSError, ValueError) as error:
            raise _NoCounter(f"{path} cannot be read: {error}") from None

    found: list[Counter] = []
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):  # AMD's are called so too
        with suppress(OSError):
            if (folder / "name").read_text().startswith("package"):
                found.append((partial(joules, folder / "energy_uj"), joules(folder / "max_energy_range_uj")))
    if not found:
        raise _NoCounter(f"{POWERCAP} has no RAPL counter")
    return found


def _gpu(device: torch.device) -> list[Counter]:
    """NVML's counter of a GPU, which is found by its UUID: CUDA_VISIBLE_DEVICES changes the numbers."""
    try:
        import pynvml
    except ImportError:
        raise _NoCounter("pynvml is not installed; pip install 'skipsearch[energy]'") from None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        split = False
        with suppress(pynvml.NVMLError):  # most GPUs cannot be split
            split = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError as error:
        raise _NoCounter(f"NVML finds no counter: {error}") from error
    if split:
        raise _NoCounter("the GPU is split (MIG), and its counter counts all parts")

    def joules() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError as error:
            raise _NoCounter(f"NVML's counter cannot be read: {error}") from error

    return [(joules, 0.0)]


def devices_of(model: torch.nn.Module) -> int:
    """On how many devices a model lies."""
    return len({parameter.device for parameter in model.parameters()})
