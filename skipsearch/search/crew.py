"""Crew: further workers of a run on this machine, one per GPU where there are several."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from skipsearch.errors import ResultsError, SkipsearchError, StudyWarning
from skipsearch.model.load import Loaded

STORAGE = "SKIPSEARCH_STORAGE"  # the environment's variable: command lines are seen by everyone, passwords included
PATIENCE = 20.0  # seconds in which a worker must end when it is told to


@contextmanager
def crew(count: int, loaded: Loaded, url: str, study: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `count - 1` workers beside this process, which is one too; they end with the block.

    Each has its share of the processor, or a GPU of its own where there are several; its output is in
    `worker-<number>.log` in the folder.

    Raises:
        ResultsError: a worker cannot be started.
    """
    if count < 2:
        yield []
        return
    threads, processes = torch.get_num_threads(), list[subprocess.Popen[bytes]]()
    share = max(1, threads // count)
    try:
        for number in range(1, count):
            processes.append(_start(number, share, loaded, url, study, folder))
        torch.set_num_threads(share)
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


def check_crew(count: int, loaded: Loaded) -> None:
    """Find out before the work whether other processes can load the model.

    Raises:
        SkipsearchError: they cannot.
    """
    if count > 1 and loaded.given is None:
        raise SkipsearchError(
            f"workers is {count}, but other processes cannot load a model that is passed as an object; pass the "
            f"result of `load_model`"
        )
    if count > 1 and loaded.given is not None and loaded.given.get("device") == "map":
        raise SkipsearchError(f"workers is {count}, but --device map spreads one model over all GPUs; leave out one")


def _start(number: int, threads: int, loaded: Loaded, url: str, study: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, STORAGE: url, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    given = dict(loaded.given or {})
    if torch.cuda.device_count() > 1 and loaded.model.device.type == "cuda":
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known = known if all(known) else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = known[((loaded.model.device.index or 0) + number) % len(known)]
        given["device"] = "cuda"
    arguments = ["worker", "--study", study]
    for name, value in given.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value:
            arguments += [f"--{name}", str(value)]
    try:
        with (folder / f"worker-{number}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "skipsearch.cli", *arguments], env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
    except OSError as error:
        raise ResultsError(f"worker {number} cannot be started ({error}); run with fewer --workers") from error
