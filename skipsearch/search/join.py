"""Join: run trials of a study that a run has prepared, in another process or on another machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skipsearch.compiled.backend import Progress
from skipsearch.draft.copies import possible_forms
from skipsearch.draft.view import draft_view
from skipsearch.errors import StudyMismatch, enough_memory
from skipsearch.evaluate.cost import Costs
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.windows import Windows
from skipsearch.model.identity import model_card, weights_fingerprint
from skipsearch.model.load import Loaded
from skipsearch.plan import DraftPlan
from skipsearch.search.budget import FEWER
from skipsearch.search.job import Job
from skipsearch.search.options import TRIAL_LENGTH, drafts_side_by_side
from skipsearch.search.storage import storage_faults, stored
from skipsearch.search.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What a worker has done.

    Attributes:
        trials, own: finished trials of the study, and how many of them are this worker's.
        wanted: finished trials at which the study has enough.
        best: most predicted tokens per second of all trials.
        seconds, waited: of the worker, and for which the storage did not answer.
    """

    study: str
    trials: int
    own: int
    wanted: int
    best: float
    seconds: float
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A study that is ready for workers.

    Attributes:
        identity: everything that scores depend on, by name.
        trials: finished trials at which it has enough.
        share: of the trace, which counts as the whole.
    """

    url: str
    study: str
    job: Job
    identity: dict[str, str]
    costs: Costs
    trials: int
    share: float


def read_offer(url: str, study: str) -> Offer:
    """Read what a run has left in a study for its workers.

    Raises:
        StudyMismatch: there is no such study, it has nothing for workers, or it was prepared by another version.
        ResultsError: the storage cannot be used.
    """
    with storage_faults(url):
        found = stored(url, study, ("identity", "job", "costs", "trials", "share"))
    if lacking := [name for name in ("job", "costs", "trials", "share") if found[name] is None]:
        raise StudyMismatch(
            f"study {study} has no {lacking[0]} for workers, because its run is still preparing, or an older version "
            f"made it; join once the run shows trials, or start a new study with `skipsearch run --study`"
        )
    return Offer(
        url=url, study=study, job=Job.read(found["job"], study), identity=found["identity"],
        costs=Costs.of(found["costs"]), trials=int(found["trials"]), share=float(found["share"]),
    )  # fmt: skip


@enough_memory("score trials", FEWER)
def join(
    loaded: Loaded, offer: Offer, *, seconds: float | None = None, memory: float | None = None,
    progress: Progress = lambda stage, done, total: None,
    report: Callable[[int, float], None] = lambda done, best: None,
) -> Joined:  # fmt: skip
    """Run trials until the study has enough; nothing is recorded, profiled or validated.

    Args:
        loaded: the study's model, on any device: costs are those of the study.
        seconds: after which no trial is begun; None: no limit.
        memory: bytes that a pass of replay may use; None: as the device allows.
        progress: called with (stage, done, total).
        report: called with (finished trials, best predicted tokens per second).

    Raises:
        StudyMismatch: the study is of another model, or needs forms that cannot be made here.
        ResultsError: the storage cannot be used.
    """
    begin, job = time.monotonic(), offer.job
    _check(loaded, offer)
    views = [draft_view(loaded.model, DraftPlan.everywhere(f, job.space.num_layers)) for f in job.space.quantised]
    progress("reference", 0, 1)
    side = drafts_side_by_side(job.trace.new_tokens)
    replay = Replay(loaded.target, job.trace, TRIAL_LENGTH, memory=memory, side=side, states=True)
    replay.ranks_PT = job.ranks_PT(replay.ids.device)
    progress("reference", 1, 1)
    own, best = 0, 0.0

    def told(done: int, most: float) -> None:
        nonlocal best
        best = most
        progress("trials", done, offer.trials)
        report(done, most)

    with storage_faults(offer.url):
        study = Study(offer.url, offer.study, job.space, offer.identity, job.sampler, job.seed, job.pareto)
        study.queue(job.seeds)
        point = offer.costs.mean_over(job.contexts or (job.trace.mean_context,))
        scorer = Scorer(Windows(replay), point, job.pareto, offer.share, study.stages())
        left = None if seconds is None else max(0.0, seconds - (time.monotonic() - begin))
        own = study.optimize(scorer, trials=offer.trials, time_budget=left, report=told)
        done, waited = len(study.finished()), study.waited
    del views  # they kept the quantised copies alive, so that each was made once
    return Joined(
        study=offer.study, trials=done, own=own, wanted=offer.trials, best=best,
        seconds=time.monotonic() - begin, waited=waited,
    )  # fmt: skip


def _check(loaded: Loaded, offer: Offer) -> None:
    mine: dict[str, Any] = {
        "model": str(model_card(loaded.target, loaded.name).config_sha256),
        "weights": weights_fingerprint(loaded.model),
    }
    for name, value in mine.items():
        if offer.identity.get(name) != value:
            what = "another model" if name == "model" else "other weights or another dtype"
            raise StudyMismatch(
                f"study {offer.study} was made with {what} than {loaded.name}; pass the study's --model"
                f"{'' if name == 'model' else f', in {offer.job.dtype}'}"
            )
    possible = possible_forms(loaded.model) if offer.job.space.quantised else {}
    for form in offer.job.space.quantised:
        if why := possible[form]:
            raise StudyMismatch(f"study {offer.study} quantises to {form}, which cannot be done here: {why}")
