"""The device that a model runs on: its name, synchronisation and free memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for token ids: that of the embedding, even if its weights are offloaded."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    if device.type == "meta":
        hook = getattr(embedding, "_hf_hook", None) or getattr(model, "_hf_hook", None)
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device


def device_name(device: torch.device) -> str:
    """The name of the processor, to be stored with measured values."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle. A clock on the host then measures the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> float:
    """Free memory of the device in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:  # what the file cache holds counts as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # this system does not report it
        return 4e9
