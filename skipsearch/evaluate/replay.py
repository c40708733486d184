"""Replay: what speculative decoding with a mask would accept, without decoding.

Greedy output is known in advance (the trace), so a draft that starts behind t committed tokens can be
run over the reference tokens t..t+K in one pass against the reference keys and values: up to its first
mismatch it is the real draft. Promises the accepted counts of real decoding, exactly (in fp32). Knows no
seconds. With a confidence exit, how far a draft goes *beyond* its first mismatch is taken from the
reference tokens too; that changes its cost by a fraction of a token, never what is accepted.

Sampled output too: given that a token x stands in the target's own output, the chance that it came there as an accepted
draft is min(1, draft_probs(x) / target_probs(x)), whose mean over x is sum(min(target_probs, draft_probs)), the
acceptance of speculative sampling. A fixed random number for each token of the trace decides, the same for every mask.

Prompts of similar length share a pass; in front of the first layer that a draft changes, hidden states are those of the
reference, so a pass begins there.

Shapes: P prompts, or rows of a pass, each with several starts of one prompt; K drafted tokens; Q queries of a row;
T positions; C tokens of a continuation; V vocabulary; H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from skipsearch.decoding.rows import rows_may_differ
from skipsearch.draft.view import RemovedLayer, with_layers
from skipsearch.evaluate.reference import Grid, Group, Keeping, ReferenceLayer, Resumed, Start, group_by_length
from skipsearch.evaluate.scores import Scores, log_probs
from skipsearch.evaluate.trace import Trace
from skipsearch.model.cache import CACHE
from skipsearch.model.device import free_memory
from skipsearch.model.target import Target

PREFILL_TOKENS = 4096  # of prompts whose reference is made in one forward
AHEAD = 16  # the longest draft that any replay of a reference may run


class Replay:
    """The reference of one trace, and draft passes over it; `DraftReplay` walks them for one mask.

    Args:
        target: whose trace it is; run eagerly.
        trace: its own continuations.
        max_length: the largest K that a policy may have.
        rows: block starts to run in one pass, at most.
        side: starts of one prompt side by side, at most.
        reference: keys and values of every layer over the trace, with room for a pass behind them, of a model on which
            another replay was `together`; None: they are made by running it.
        memory: bytes that a pass may take beside the reference; None: a quarter of what the device has free.
        states: whether to keep the continuations' hidden states in front of each layer, so that a draft can begin at
            the first layer that it changes.

    Attributes:
        together: whether starts can be drafted side by side in one pass.
        groups: prompts that share a pass.
    """

    def __init__(
        self, target: Target, trace: Trace, max_length: int = 8, *, rows: int = 128, memory: float | None = None,
        side: int = 1, reference: list[tuple[Tensor, Tensor]] | None = None, states: bool = False,
    ) -> None:  # fmt: skip
        self.target, self.trace, self.max_length, self.side = target, trace, max_length, max(2, side)
        self.lengths = [len(p) + len(c) for p, c in zip(trace.prompts, trace.continuations, strict=True)]
        # Room behind each row, so that a draft near the end has (meaningless) tokens to read.
        self._ahead = max(max_length, AHEAD)
        self.ids, _ = trace.padded(target.device, self._ahead)
        self.rule = trace.rule
        self.scores = Scores(target, trace, self.ids)
        # chances [P, T] of acceptance, and the target's own log-probability of each token; with sampling alone
        shape = (len(self.lengths), max(self.lengths) + self._ahead + 1)
        self.chance_PT = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.ids.device)
        self.target_PT = torch.zeros(shape, device=self.ids.device)
        self.ranks_PT: Tensor | None = None  # see `frequency.Frequency`; for plans with a smaller head
        self._scratch: dict[Any, Tensor] = {}
        every = tuple(range(len(self.lengths)))
        if reference is not None:
            self.groups = [Group(every, max(self.lengths), self._layers(reference), [])]
        else:
            self.groups = [self._make_group(part, states) for part in group_by_length(self.lengths)]
        self._group_of = {prompt: group for group in self.groups for prompt in group.prompts}
        self.together = True
        self.together = reference is not None or (rows_may_differ(target) and self._keys_may_move())
        self.resumes = self.together and states
        self.resumes = self.resumes and self._states_are_those_of_a_pass()
        # Else each start is a pass of its own: slower, and the same.
        self.rows = self._rows_that_fit(rows, memory) if self.together else 1

    def with_length(self, max_length: int) -> Replay:
        """The same reference for other drafts, one of each prompt in a row; the two must not run at once."""
        assert max_length <= AHEAD
        other = copy.copy(self)
        other.max_length, other.side = max_length, 1
        other.rows = max(1, self.rows * self.max_length // max(max_length, self.max_length))
        return other

    def _layers(self, reference: list[tuple[Tensor, Tensor]]) -> list[ReferenceLayer]:
        return [ReferenceLayer(*pair, self._scratch) for pair in reference]

    @torch.no_grad()
    def _make_group(self, prompts: tuple[int, ...], states: bool) -> Group:
        """Keys and values [P, H, T, D] of every layer over these prompts; padding is last, so unseen."""
        longest = max(self.lengths[p] for p in prompts)
        begins_P = torch.tensor([len(self.trace.prompts[p]) for p in prompts], device=self.ids.device)
        room = max(len(self.trace.continuations[p]) for p in prompts) + self._ahead
        at_PC = (begins_P[:, None] + torch.arange(room, device=self.ids.device)).clamp(max=longest - 1)
        ids_PT = self.ids[list(prompts), :longest]
        kept: list[list[tuple[Tensor, Tensor]]] = []
        hidden: list[list[Tensor]] = []
        step = max(1, PREFILL_TOKENS // longest)
        for first in range(0, len(prompts), step):
            part = slice(first, first + step)
            cache = Cache(layers=[DynamicLayer() for _ in range(self.target.num_layers)])
            layers = [Keeping(layer, at_PC[part]) for layer in self.target.layers] if states else []
            model = with_layers(self.target.model, self.target.sublayers.path, layers) if states else self.target.model
            few = {} if self.rule.temperature or not self.target.takes_logits_to_keep else {"logits_to_keep": 1}
            logits = model(input_ids=ids_PT[part], **{CACHE: cache}, use_cache=True, **few).logits
            if self.rule.temperature:
                self._keep_target(logits, prompts[part])
            kept.append([(layer.keys, layer.values) for layer in cache.layers])
            hidden.append([layer.kept for layer in layers])
        behind = (0, 0, 0, max(self._ahead, self.side * self.max_length))  # behind each row, for what a pass adds
        reference = [
            (F.pad(torch.cat([c[i][0] for c in kept]), behind), F.pad(torch.cat([c[i][1] for c in kept]), behind))
            for i in range(self.target.num_layers)
        ]
        return Group(
            prompts, longest, self._layers(reference), [torch.cat(parts) for parts in zip(*hidden, strict=True)]
        )

    @torch.no_grad()
    def _keys_may_move(self) -> bool:
        """Whether drafts side by side equal those run alone; false with ALiBi, whose bias depends on a key's slot."""
        model = self.target.model
        prompt = min(range(len(self.lengths)), key=lambda p: (self.lengths[p] < 4, self.lengths[p]))
        length = self.lengths[prompt]
        try:
            _, at_PQ, logits_PQV = self.logits(model, [(prompt, max(1, length - 1 - far)) for far in (2, 0)])
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model does not understand such masks
        alone = model(input_ids=self.ids[prompt : prompt + 1, :length], use_cache=False).logits[0]
        known = at_PQ < length
        return self._close(logits_PQV[known], alone[at_PQ[known]])

    @torch.no_grad()
    def _states_are_those_of_a_pass(self) -> bool:
        """Whether a pass that begins in the middle, at stored hidden states, ends as one that begins in front."""
        prompt = max(range(len(self.lengths)), key=lambda p: len(self.trace.continuations[p]))
        starts = [(prompt, len(self.trace.prompts[prompt]) + 1)]
        if len(self.trace.continuations[prompt]) < 2:
            return False
        whole, half = (self.logits(self.target.model, starts, first)[2] for first in (0, self.target.num_layers // 2))
        known = min(self.max_length, len(self.trace.continuations[prompt]) - 1)
        return self._close(half[:, :known], whole[:, :known])

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        half = self.target.dtype in (torch.float16, torch.bfloat16)
        far = (found.float() - expected.float()).abs().max()
        return bool(far <= (0.05 if half else 1e-3) * expected.float().abs().max())

    def _rows_that_fit(self, most: int, memory: float | None) -> int:
        """Starts of a pass: each may have a copy of its prompt's keys and values in one layer, and has its logits."""
        row = max(group.bytes_of_row for group in self.groups) + 4 * 4 * self.max_length * self.target.vocabulary
        budget = memory if memory is not None else 0.25 * free_memory(self.ids.device)
        return int(max(1, min(most, budget // row)))

    def passes(self, starts: Iterable[Start]) -> Iterator[list[Start]]:
        """These starts in parts that one pass can run, in order."""
        of_group: dict[int, list[Start]] = {}
        for start in sorted(starts):
            of_group.setdefault(id(self._group_of[start[0]]), []).append(start)
        for part in of_group.values():
            yield from (part[first : first + self.rows] for first in range(0, len(part), self.rows))

    def logits(
        self, view: PreTrainedModel, starts: list[Start], first: int = 0
    ) -> tuple[tuple[Grid, Tensor], Tensor, Tensor]:
        """One pass of a draft view, or of the model itself, over drafts from these starts, which share a group.

        Args:
            first: the first layer that the view changes; those before it are not run, where the replay `resumes`.

        Returns:
            how the starts were laid out, with the prompt of each row [P]; the places [P, Q] of the tokens read; and
            the logits [P, Q, V] behind them.
        """
        k, device, group = self.max_length, self.ids.device, self._group_of[starts[0][0]]
        # A draft behind t committed tokens has the reference up to t - 2; token t - 1 is its first input.
        length = group.longest if self.together else starts[0][1] - 1
        local = [(group.row(prompt), t) for prompt, t in starts]
        grid = Grid(local, len(group.prompts) if self.together else 0, k, length, self.side, device)
        first_PG = torch.tensor([t - 1 for _, t in starts], device=device)[grid.start_PG]
        at_PQ = (first_PG[..., None] + torch.arange(k, device=device)).flatten(1)
        prompt_P = torch.tensor(group.prompts, device=device)[grid.prompt_P]
        for layer in group.layers:
            layer.grid = grid
        given: dict[str, Any] = {"position_ids": at_PQ} if self.target.takes_positions else {}
        if self.together:
            given["attention_mask"] = self._mask(grid, first_PG, at_PQ)
        if first and self.resumes:
            view = self._resumed(view, group, first, grid, at_PQ)
        logits_PQV = view(
            input_ids=self.ids[prompt_P[:, None], at_PQ], **{CACHE: Cache(layers=list(group.layers))},
            use_cache=True, **given,
        ).logits  # fmt: skip
        return (grid, prompt_P), at_PQ, logits_PQV

    def _mask(self, grid: Grid, first_PG: Tensor, at_PQ: Tensor) -> Any:
        """A query sees the reference in front of its draft, and its own draft up to itself."""
        k = self.max_length
        reference_T = torch.arange(grid.length, device=at_PQ.device)
        keys_PT = torch.cat([reference_T.expand(len(at_PQ), -1), at_PQ], 1)
        before_PQT = reference_T < first_PG.repeat_interleave(k, 1)[..., None]
        of_Q = torch.arange(grid.start_PG.shape[1], device=at_PQ.device).repeat_interleave(k)
        itself_PQT = (of_Q[:, None] == of_Q).expand(len(at_PQ), -1, -1)
        return self.target.attention.masks(
            at_PQ, lambda _window: keys_PT, only_RQK=torch.cat([before_PQT, itself_PQT], 2)
        )

    def _resumed(self, view: PreTrainedModel, group: Group, first: int, grid: Grid, at_PQ: Tensor) -> PreTrainedModel:
        """The view without the layers before `first`, which is given the reference's hidden states."""
        states, path = group.states[first], self.target.sublayers.path
        begins_P = torch.tensor([len(self.trace.prompts[p]) for p in group.prompts], device=at_PQ.device)[grid.prompt_P]
        rows, at = grid.prompt_P[:, None], at_PQ - begins_P[:, None]
        hidden_PQH = states[rows.to(states.device), at.to(states.device)]
        layers = list(view.get_submodule(path).children())
        as_tuple = self.target.sublayers.layer_returns_tuple
        before = [RemovedLayer(layer, as_tuple) for layer in layers[:first]]
        return with_layers(view, path, [*before, Resumed(layers[first], hidden_PQH), *layers[first + 1 :]])

    def _keep_target(self, logits_PTV: Tensor, prompts: tuple[int, ...]) -> None:
        """The target's own log-probabilities of the continuations' tokens."""
        for row, prompt in enumerate(prompts):
            length, first = self.lengths[prompt], len(self.trace.prompts[prompt])
            at_1T = torch.arange(first - 1, length - 1, device=self.ids.device)[None]
            of_1 = torch.tensor([prompt], device=self.ids.device)
            scores_1TV = self.scores(logits_PTV[row : row + 1, first - 1 : length - 1], of_1, at_1T)
            self.target_PT[prompt, first:length] = log_probs(scores_1TV, self.ids[prompt : prompt + 1, first:length])[0]
