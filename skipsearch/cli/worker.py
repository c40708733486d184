"""`skipsearch worker`: run trials of a study that `skipsearch run` has prepared."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import Annotated

import typer

from skipsearch.cli import options as opt


@opt.command("worker --model demo --storage postgresql+psycopg://user@host/optuna")
def worker(
    model: opt.Model,
    storage: Annotated[
        str, typer.Option(envvar="SKIPSEARCH_STORAGE", help="Optuna storage URL, the one given to `skipsearch run`")
    ],
    study: opt.StudyName = "search",
    time_budget: Annotated[float, typer.Option(min=0, help="seconds after which no trial is begun; 0: no limit")] = 0,
    memory: opt.Memory = None, dtype: opt.Dtype = "auto", device: opt.Device = "auto", revision: opt.Revision = None,
    trust: opt.Trust = False, as_json: opt.Json = False, debug: opt.Debug = False,
) -> None:  # fmt: skip
    """Join a study from any machine and run trials until it has enough.

    Nothing is recorded, profiled or validated: `skipsearch run` with the same --storage has done it, or will.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # how schedulers end a process
    with opt.err.status("reading the study"):
        from skipsearch.search.join import join, read_offer

        offer = read_offer(storage, study)
    from skipsearch.report.progress import stages

    loaded = opt.load(model, offer.job.dtype if dtype == "auto" else dtype, device, revision, trust)
    with stages(opt.err, quiet=as_json) as progress:
        done = join(
            loaded, offer, seconds=time_budget or None, memory=None if memory is None else memory * 1e9,
            progress=progress.stage, report=progress.best,
        )  # fmt: skip
    waited = f"; the storage did not answer for {done.waited:.0f} s" if done.waited else ""
    enough = "it has enough" if done.trials >= done.wanted else f"{done.wanted} are wanted"
    line = (
        f"study {done.study}: {done.trials} trials, {done.own} of them here in {done.seconds:.0f} s; {enough}{waited}"
    )
    opt.print_result(asdict(done), as_json, line)
