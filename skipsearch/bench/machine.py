"""What the machine can do and what a run took of it: copy bandwidth, peak memory, energy."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from skipsearch.model.device import synchronize

COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far beyond the caches


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, counting those read and those written."""
    size = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[2:])


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a large matrix once for a product with a vector, as decoding reads weights."""
    size = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"] // 4
    matrix = torch.ones((size // 8192, 8192), device=device)
    vector = torch.ones(8192, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        matrix @ vector
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 4 * size / statistics.median(seconds[2:])


@contextlib.contextmanager
def peak_memory(device: torch.device, found: dict[str, float]) -> Iterator[None]:
    """Put into found["bytes"] the most memory used inside: of the device, or of the process on a CPU."""
    reset = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif reset.exists():
        with contextlib.suppress(OSError):
            reset.write_text("5")  # the kernel's own way to forget the high-water mark
    yield
    if device.type == "cuda":
        found["bytes"] = float(torch.cuda.max_memory_allocated(device))
        return
    try:
        status = Path("/proc/self/status").read_text()
        found["bytes"] = float(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


class Energy:
    """Joules that the GPU has used, by NVML; None where it does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        with contextlib.suppress(Exception):  # no library, no driver, no counter: each means that nobody can tell
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
            self._read(self._handle)

    def joules(self) -> float | None:
        """Since the driver was loaded."""
        if self._handle is None:
            return None
        try:
            return float(self._read(self._handle)) / 1000
        except Exception:  # the counter of some cards comes and goes
            return None
