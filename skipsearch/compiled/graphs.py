"""Graphs: work of fixed shapes and addresses, recorded on a GPU once and replayed without the host."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_capturing = threading.Lock()  # one at a time in a process


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the library for matrix products keeps megabytes of memory for each stream."""
    return torch.cuda.Stream(device)


def capture(run: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Record what a function does. The caller keeps the tensors that it reads: a graph holds their addresses alone.

    Args:
        pool: memory that graphs which are never in use together share.

    Returns:
        A function that does it again, and what `run` returned, which each replay overwrites.
    """
    with _capturing, torch.cuda.device(device):
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # so that nothing is compiled or autotuned during the capture
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, and may allocate memory.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = run()
    return graph.replay, out
