"""Crew: further workers of a run on this machine, one a GPU where there are several."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from skipsearch.errors import SkipsearchError, StudyWarning
from skipsearch.model.load import Loaded

STORAGE = "SKIPSEARCH_STORAGE"  # the environment's variable: command lines are seen by everyone, passwords included
PATIENCE = 20.0  # seconds in which a worker must end when it is told to


@contextmanager
def crew(count: int, loaded: Loaded, url: str, study: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `count - 1` workers beside this process, which is one too; they end with the block.

    Each has its share of the processor, or a GPU of its own where there are several; its output is in
    `worker-<number>.log` in the folder.

    Raises:
        SkipsearchError: other processes cannot load the model.
    """
    if count < 2:
        yield []
        return
    threads, share = torch.get_num_threads(), max(1, (os.cpu_count() or 1) // count)
    processes = [_start(number, share, loaded, url, study, folder) for number in range(1, count)]
    try:
        torch.set_num_threads(min(threads, share))
        yield processes
    finally:
        torch.set_num_threads(threads)
        ended = [process.poll() for process in processes]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for number, code in enumerate(ended, 1):
            if code:
                path = folder / f"worker-{number}.log"
                lines = path.read_text(errors="replace").strip().splitlines()
                said = lines[-1] if lines else f"exit code {code}"
                warnings.warn(f"worker {number} ended early ({said}); see {path}", StudyWarning, stacklevel=2)


def _start(number: int, threads: int, loaded: Loaded, url: str, study: str, folder: Path) -> subprocess.Popen[bytes]:
    if loaded.given is None:
        raise SkipsearchError(
            "workers is more than 1, but other processes cannot load a model that is passed as an object; "
            "pass the result of `load_model`"
        )
    arguments = ["worker", "--study", study]
    for name, value in loaded.given.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value:
            arguments += [f"--{name}", str(value)]
    environment = {**os.environ, STORAGE: url, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch.cuda.device_count() > 1:
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known = known if all(known) else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = known[number % len(known)]
    with (folder / f"worker-{number}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "skipsearch.cli", *arguments], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
