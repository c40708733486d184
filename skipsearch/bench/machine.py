"""Figures of the machine: memory bandwidth, and the peak memory of a run."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from skipsearch.model.device import synchronize

COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far more than the caches hold


def _median_seconds(device: torch.device, action: Callable[[], object]) -> float:
    """Median time of 6 calls, after 2 that are not counted."""
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy; bytes read and bytes written both count."""
    size = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    return 2 * size / _median_seconds(device, lambda: target.copy_(source))


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large matrix-vector product, which reads the matrix once, as decoding reads weights."""
    rows = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"] // 4 // 8192
    matrix, vector = torch.ones((rows, 8192), device=device), torch.ones(8192, device=device)
    return 4 * matrix.numel() / _median_seconds(device, lambda: matrix @ vector)


def peak_memory(device: torch.device, run: Callable[[], object]) -> float:
    """The most memory in bytes that is in use during `run`: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    run()
    try:
        status = Path("/proc/self/status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
