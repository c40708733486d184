"""SelfSpeculative: a decoding method as a `custom_generate` callable for `model.generate`.

Promises the output of plain `generate` under the same options, row by row (greedy: the same tokens;
sampling: the same distribution). Options that a callable cannot honour are refused by name, never ignored.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipsearch.compiled.backend import Backend, Progress, warm_draft, with_backend
from skipsearch.decoding.accept import Sampling
from skipsearch.decoding.batch import ALIGNED
from skipsearch.decoding.loop import decode
from skipsearch.decoding.processors import TokenSelection
from skipsearch.decoding.rows import rows_may_differ
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.decoding.tuner import Tuner
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.generate.arguments import Arguments, dropped_arguments, read_arguments
from skipsearch.generate.drafting import Drafting, MakeTuner
from skipsearch.generate.output import RowOutput, ending_of, made_output
from skipsearch.joint.joint import Joint, jointly
from skipsearch.model.cache import CACHE
from skipsearch.model.identity import check_mask_belongs
from skipsearch.model.state import ModelState
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan


class SelfSpeculative:
    """What `self_speculative` returns; pass it as `custom_generate`. One object serves any model and call.

    Attributes:
        plan, policy: what it drafts with; plan None decodes plainly.
        deterministic: whether verification runs in blocks of one fixed shape.
        joint: settings of joint decoding, which is lossy; None decodes losslessly.
        backend: what runs forwards; "auto" is the one that the mask file was tuned for, eager for a bare mask.
        stats: raw counts of the last call.
    """

    def __init__(
        self, drafting: Drafting, *, streamer: BaseStreamer | None = None, deterministic: bool = False,
        backend: Backend = "auto", make_tuner: MakeTuner | None = None, joint: Joint | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.policy, self._file = drafting.plan, drafting.policy, drafting.file
        self.deterministic, self.joint, self.backend, self.stats = deterministic, joint, backend, DecodeStats()
        self._streamer, self._make_tuner, self._warned = streamer, make_tuner, set[str]()
        self._tuners: weakref.WeakKeyDictionary[PreTrainedModel, tuple[ModelState, Tuner]] = weakref.WeakKeyDictionary()
        self._tuning = threading.Lock()  # two first calls at once get one tuner
        self._schedulers: weakref.WeakKeyDictionary[PreTrainedModel, Scheduler] = weakref.WeakKeyDictionary()
        self._drafts: weakref.WeakKeyDictionary[PreTrainedModel, tuple[ModelState, PreTrainedModel]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with its settings, without what it has learnt and compiled."""
        drafting = Drafting(plan=self.plan, policy=self.policy, file=self._file)
        remade = partial(
            type(self), streamer=self._streamer, deterministic=self.deterministic, backend=self.backend,
            make_tuner=self._make_tuner, joint=self.joint,
        )  # fmt: skip
        return remade, (drafting,)

    def warm_up(self, model: PreTrainedModel, progress: Progress | None = None) -> None:
        """Compile what decoding of one sequence needs, or read it from the disk, so that no call has to wait for it.

        Raises:
            MaskError: the mask file is for another model.
        """
        target = Target.of(model)
        draft, target = self._draft_for(target), self._backend_for(target, progress=progress)
        if draft is not None:
            warm_draft(target, draft, progress)
        if self._make_tuner is not None:
            self._tuner_for(target, progress)

    def tuner_for(self, model: PreTrainedModel, progress: Progress | None = None) -> Tuner:
        """The tuner of this model, with what it has found so far.

        Raises:
            DecodingError: this object was made with a mask, so there is no tuner.
        """
        if self._make_tuner is None:
            raise DecodingError("this method has one mask, nothing is searched; make it with self_speculative('auto')")
        return self._tuner_for(Target.of(model), progress)

    def _tuner_for(self, target: Target, progress: Progress | None = None) -> Tuner:
        """The model's tuner; one that is made now decodes with the target's backend, or with the one for a sequence."""
        assert self._make_tuner is not None
        model, state = target.model, ModelState.of(target.model)
        with self._tuning:
            if model not in self._tuners or self._tuners[model][0] != state:
                if target.compiled is None:
                    target = self._backend_for(target, progress=progress)
                drafting = Drafting(plan=self.plan, policy=self.policy)
                self._tuners[model] = state, self._make_tuner(target, drafting, progress)
            return self._tuners[model][1]

    def _draft_for(self, target: Target) -> PreTrainedModel | None:
        if self.plan is None:
            if self._file is not None:
                check_mask_belongs(self._file, target)
            return None
        copies = not DraftPlan.of(self.plan).only_skips
        model, state = target.model, ModelState.of(target.model, count_writes=copies)
        if model not in self._drafts or self._drafts[model][0] != state:
            if self._file is not None:
                check_mask_belongs(self._file, target)
            self._drafts[model] = state, draft_view(model, self.plan)
        return self._drafts[model][1]

    def _backend_for(
        self, target: Target, rows: int = 1, padded_past: bool = False, progress: Progress | None = None
    ) -> Target:
        """The target with the backend that serves so many rows."""
        file = self._file
        tuned = file.evidence.backend if file is not None and file.evidence is not None else None
        wanted = self.backend if self.backend != "auto" else "compiled" if tuned == "compiled" else "eager"
        if wanted == "compiled" and self.deterministic and self.backend == "auto":
            return target
        if wanted == "compiled" and (rows > 1 or self.deterministic or padded_past):
            what = "sequences one at a time" if rows > 1 else "no deterministic decoding" if self.deterministic else ""
            what = what or f"no {CACHE} behind padding"
            self._warn(f"decoding eagerly: backend 'compiled' takes {what}")
            return target
        target = with_backend(target, wanted, progress)
        if tuned is not None and tuned != target.backend and self.joint is None:  # which is always eager
            now = target.backend
            self._warn(f"the mask was tuned for backend {tuned!r}, decoding with {now!r}: another mask may be faster")
        return target

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, BackendWarning, stacklevel=4)

    def _scheduler_for(self, target: Target, sampled: bool) -> Scheduler:
        """Estimates go on from call to call. With sampling they use no clock: the output depends on the seed alone."""
        if sampled:
            return Scheduler(self.policy.costs or (0.5, 1.0), clock=False)
        return self._schedulers.setdefault(target.model, Scheduler(self.policy.costs))

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `generate`; see there for the arguments.

        Raises:
            DecodingError: an option that cannot be honoured.
            MaskError: the mask file is for another model.
        """
        # `generate` passes a callable's own argument names twice, so what it drops is read from its frame.
        dropped = dropped_arguments(model)
        dropped["streamer"] = self._streamer or dropped.get("streamer")
        try:
            target = Target.of(model)
            given = read_arguments(
                target, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, dropped
            )
            if given.batch > 1 and given.of_the_caller and self.joint is None:
                # What counts calls or rows must see what plain decoding shows it: every row, at one length.
                self._warn(f"decoding plainly: a batch with {given.of_the_caller[0]}; decode rows one by one to draft")
                self.stats = DecodeStats()
                plain: Tensor | GenerateDecoderOnlyOutput = model._sample(
                    input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                    generation_config=generation_config, **model_kwargs,
                )  # fmt: skip
                return plain
            return self._decode(target, given)
        except BaseException:
            if dropped["streamer"] is not None:
                with suppress(Exception):  # it may be what failed
                    dropped["streamer"].end()  # a reader in another thread waits for it
            raise

    def _decode(self, target: Target, given: Arguments) -> Tensor | GenerateDecoderOnlyOutput:
        if self.joint is not None and given.processors_in_order:
            name = given.processors_in_order[0]
            raise DecodingError(f"logits_processor holds a {name}, which joint decoding cannot call in order; unset it")
        self.stats = stats = DecodeStats()  # kept by name: another call may replace it meanwhile
        # Criteria that may remember tokens end a block after the processors have seen all of it.
        drafts = not (given.processors_in_order and given.criteria)
        draft = self._draft_for(target) if drafts else None
        target = self._backend_for(target, given.batch, given.padded_past)
        if draft is not None:
            warm_draft(target, draft)
        outputs = [RowOutput() for _ in range(given.batch)]
        scheduler = self._scheduler_for(target, bool(given.config.do_sample))
        tuned = self._make_tuner is not None and given.batch == 1 and drafts and not self.deterministic
        tuner = self._tuner_for(target) if tuned else None
        together = given.batch == 1 or (not (self.deterministic or self.joint) and rows_may_differ(target))
        for group in [list(range(given.batch))] if together else [[b] for b in range(given.batch)]:
            sequences = self._sequences(target, None if tuned else draft, given, group)
            ending = ending_of(given, outputs)
            if self.joint is not None:
                blocks = jointly(sequences, self.joint, ending, stats)
            else:
                blocks = decode(
                    sequences, ending, policy=self.policy if drafts else None, stats=stats, scheduler=scheduler,
                    tuner=tuner, temperature=given.temperature,
                )  # fmt: skip
            try:
                for block in blocks:
                    outputs[block.row].add(block, given)
                    if given.streamer is not None:
                        for token in block.tokens:
                            given.streamer.put(torch.tensor([token]))
            except BaseException:
                sequences.close()
                raise
        if given.streamer is not None:
            given.streamer.end()
        past = given.layout.past if given.batch == 1 else None
        if past is not None:
            sequences.cache.hand_over(past)
        return made_output(given.input_ids, outputs, given, past)

    def _sequences(
        self, target: Target, draft: PreTrainedModel | None, given: Arguments, group: list[int]
    ) -> Sequences:
        """Some rows of a call, ready to be decoded."""
        seed = int(torch.randint(2**62, ())) if given.config.do_sample else None
        sampling = None if seed is None else Sampling.from_seed(seed, given.input_ids.device)
        return Sequences(
            target, given.input_ids[group], capacity=max(given.config.max_length, given.input_ids.shape[1]) + 1,
            draft=draft, selection=TokenSelection(processors=given.processors, sampling=sampling, ends=given.eos_ids),
            layout=given.layout_of(group), aligned=ALIGNED if self.deterministic else 0,
        )  # fmt: skip
