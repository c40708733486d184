"""Batch: tokens of the sequences being decoded, the cache that draft and target share, and forwards over both.

Rows may have different lengths. Shapes: B rows, K drafted tokens, V vocabulary, Q tokens of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from skipsearch.compiled.buffers import Scores
from skipsearch.decoding.processors import TokenSelection, process
from skipsearch.errors import DecodingError
from skipsearch.model.cache import CACHE, SharedCache, length_of
from skipsearch.model.target import CompiledForwards, Target

SLACK = 64  # slots behind the longest sequence for what a batch's other rows draft
ALIGNED = 16  # width of the deterministic mode's blocks: a full tile of half-precision kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Padding of the prompts of a batch, and keys that exist already.

    Attributes:
        pads: tokens of padding on the left of each row; empty: none anywhere.
        rows: numbers of the rows in the batch that the processors were made for; empty: 0, 1, 2, ...
        past: a dynamic cache to continue from.
        past_only: tokens that `past` holds and the prompts do not repeat.
        chunk: the most tokens that one forward of the prefill takes; None: all.
    """

    pads: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    past: Cache | None = None
    past_only: int = 0
    chunk: int | None = None


class Batch:
    """A batch of sequences being decoded: their tokens, their shared cache, and forwards over them.

    Args:
        target: verifies; compiled forwards serve one row, not aligned.
        input_ids: [B, T] prompts, padded on the left.
        capacity: the most tokens that a sequence may ever hold, padding included.
        draft: the draft view; None decodes plainly.
        selection: how tokens are chosen, by default greedily.
        layout: padding, and a cache to continue from.
        aligned: verify in blocks of this width that begin at multiples of it, so that a token's logits
            come from the same shapes however it was drafted (one row; 0: blocks as they fall).

    Attributes:
        rows: which sequence of the batch each active row is; those that ended have left.
        lengths: tokens of each active row, padding included.
        ids: tokens [B, C] of each row, drafts behind the committed ones.

    Raises:
        DecodingError: several rows, or a past without its tokens, in aligned blocks.
    """

    ids: Tensor
    compiled: CompiledForwards | None

    def __init__(
        self, target: Target, input_ids: Tensor, *, capacity: int, draft: PreTrainedModel | None = None,
        selection: TokenSelection | None = None, layout: Layout | None = None, aligned: int = 0,
    ) -> None:  # fmt: skip
        layout = layout or Layout()
        target.check_ids(input_ids)
        length_of(layout.past)  # what is refused is refused before buffers are taken
        rows, length = input_ids.shape
        self.target, self.selection, self.aligned = target, selection or TokenSelection(), aligned
        self.rows, self.lengths = list(layout.rows or range(rows)), [length] * rows
        self.compiled, self.chunk = target.compiled, layout.chunk
        buffers = None
        if self.compiled is not None:
            assert rows == 1 and not aligned
            self.buffers = buffers = self.compiled.acquire(capacity + layout.past_only, self)
            self.give_back = buffers.give_back  # noted here: the next owner's is another one
            self.target_stack = self.compiled.stack_of(target.model)
            self.ids, self.chunk = buffers.ids, self.compiled.chunk
        else:
            self.ids = torch.zeros((rows, capacity + SLACK), dtype=torch.long, device=input_ids.device)
        self.draft_with(draft)
        self.ids[:, :length] = input_ids
        pads = list(layout.pads) or [0] * rows
        self.cache = SharedCache(target, capacity, layout.past, rows, None if buffers is None else buffers.layers)
        # A token's slot in the cache is its place in `ids` less this: common padding is not computed at all.
        self.offset = (0 if self.cache.committed[0] else min(pads)) - layout.past_only
        self.pads = [pad - max(0, self.offset) for pad in pads]
        # What a batch's other rows draft, and what fills an aligned block, may lie beyond the context.
        size = capacity + layout.past_only + SLACK if buffers is None else len(buffers.positions)
        self.positions = torch.arange(size, device=input_ids.device)
        self.positions.clamp_(max=max(target.context, capacity + layout.past_only) - 1)
        if buffers is not None:
            buffers.positions.copy_(self.positions)
        for b, committed in enumerate(self.cache.committed):
            # Of a cache that holds the whole prompt, the last token is processed again; for the same shapes, all are.
            self.cache.commit(b, 0 if aligned else min(committed, length - 1 - self.offset))
        if aligned and (rows > 1 or self.offset < 0):
            raise DecodingError(
                f"deterministic decoding takes one sequence with all its tokens, got {rows} sequences and "
                f"{layout.past_only} tokens in {CACHE} alone; pass whole prompts, one by one"
            )

    def draft_with(self, view: PreTrainedModel | None) -> None:
        """Draft with this view from now on. Keys that an earlier view wrote are not used."""
        self.draft_model = view
        self.draft_stack = None if self.compiled is None or view is None else self.compiled.stack_of(view)

    def put(self, row: int, ahead: int, tokens: list[int]) -> None:
        """Write drafted tokens behind a row's last one and `ahead` others."""
        place = self.lengths[row] + ahead
        self.ids[row, place : place + len(tokens)] = torch.tensor(tokens, device=self.ids.device)

    def _forward(self, model: PreTrainedModel, starts: list[int], width: int, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last `keep` of `width` tokens, written to the cache from `starts` on."""
        if self.compiled is not None:
            return self._compiled(model is self.target.model, starts[0], width, keep).logits
        leave_out = self.target.takes_logits_to_keep and keep < width
        extra: dict[str, Any] = {"logits_to_keep": keep} if leave_out else {}
        first, rows = starts[0], len(starts)
        if all(start == first for start in starts) and not any(self.pads):
            self.cache.seek(starts)
            ids = self.ids[:rows, first + self.offset : first + self.offset + width]
            position_ids = self.positions[None, first : first + width].expand(rows, -1)
        else:
            device = self.ids.device
            pads = torch.tensor(self.pads, device=device)
            slots_BQ = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
            self.cache.seek(starts, slots_BQ)
            ids = self.ids[:rows].gather(1, (slots_BQ + self.offset).clamp(max=self.ids.shape[1] - 1))
            position_ids = self.positions[(slots_BQ - pads[:, None]).clamp(min=0, max=len(self.positions) - 1)]
            layer = self.cache.cache.layers

            def keys(window: int | None) -> Tensor:
                length, offset = layer[self.cache.windows.index(window)].get_mask_sizes(width)
                return torch.arange(offset, offset + length, device=device)[None]

            extra["attention_mask"] = self.target.attention.masks(slots_BQ, keys, pads if any(self.pads) else None)
        if self.target.takes_positions:
            extra["position_ids"] = position_ids
        out = model(input_ids=ids, **{CACHE: self.cache.cache}, use_cache=True, **extra)
        logits: Tensor = out.logits[:, -keep:]
        return logits

    def _process(self, processors: LogitsProcessorList, logits_BV: Tensor, ends: list[int]) -> Tensor:
        """Scores [B, V] for the token behind the first ends[b] of each row, given that prefix."""
        if not processors:
            return logits_BV
        rows_of: dict[int, list[int]] = {}
        for row, end in enumerate(ends):
            rows_of.setdefault(end, []).append(row)
        scores_BV = torch.empty(logits_BV.shape, dtype=torch.float32, device=logits_BV.device)
        for end, rows in rows_of.items():  # processors take rows of one length
            every = len(rows) == len(ends)
            prefix = self.ids[: len(ends), :end] if every else self.ids[rows, :end]
            logits = logits_BV if every else logits_BV[rows]
            scores = process(processors, [self.rows[row] for row in rows], prefix, logits)
            scores_BV[... if every else rows] = scores
        return scores_BV

    def _compiled(self, target: bool, start: int, width: int, keep: int) -> Scores:
        """The same through the compiled model, with the likeliest tokens and their probabilities."""
        assert self.compiled is not None
        stack = self.target_stack if target else self.draft_stack
        scores: Scores = self.compiled.forward(
            stack, self.buffers, start, start + self.offset, width, keep_last=keep == 1
        )
        have = scores.top.shape[1]
        if have == keep:
            return scores
        last = min(width, have)
        return Scores(scores.logits[:, last - keep : last], scores.top[:, last - keep : last])

    def _target_logits(self, k: int) -> tuple[Tensor, Tensor | None]:
        """The target's logits [B, k + 1, V] for the token behind each row's last one and behind k drafts.

        And, of a compiled forward, the likeliest tokens with their probabilities [2, k + 1].
        """
        last = self.lengths[0] - 1 - self.offset
        starts = self.cache.committed
        if not self.aligned:
            ahead = (last - starts[0]) // self.chunk * self.chunk if self.chunk else 0
            if self.chunk and last + k + 1 - starts[0] - ahead > self.chunk:
                ahead = last - starts[0]
            starts = self._prefill(starts, ahead)
            if self.compiled is not None:
                scores = self._compiled(True, starts[0], last + k + 1 - starts[0], k + 1)
                return scores.logits, scores.top
            return self._forward(self.target.model, starts, last + k + 1 - starts[0], k + 1), None
        first = last // self.aligned * self.aligned
        assert last + k < first + self.aligned, "a draft reaches beyond its aligned block"
        self._prefill(starts, first - starts[0])
        # Committed rows of the block come out as they did before; nothing attends to the filling behind the draft.
        logits = self._forward(self.target.model, [first], self.aligned, self.aligned)
        return logits[:, last - first : last - first + k + 1], None

    def _prefill(self, starts: list[int], width: int) -> list[int]:
        """Process so many tokens for their keys and values alone; returns where they end."""
        while width > 0:
            step = min(width, self.chunk or width)
            self._forward(self.target.model, starts, step, 1)
            starts, width = [start + step for start in starts], width - step
        return starts

    def room(self, max_length: int) -> list[int]:
        """How many tokens each row may draft so that the block, with the bonus token, stays within the limit."""
        rooms = [max_length - length - 1 for length in self.lengths]
        if self.aligned:
            last = self.lengths[0] - 1 - self.offset
            rooms = [min(rooms[0], self.aligned - 1 - last % self.aligned)]
        return rooms

    def truncate(self, row: int, length: int) -> None:
        """Forget all tokens of an active row behind the first `length`; the last one that stays is processed again.

        Raises:
            DecodingError: the cut lies inside a given cache of a sliding window, whose tokens are not known.
        """
        self.lengths[row] = length
        committed = min(self.cache.committed[row], length - 1 - self.offset)
        if committed < self.cache.floor:
            if self.offset < 0:
                raise DecodingError(
                    f"length is {length}, which lies inside {CACHE}, and a sliding window forgets; "
                    f"pass the whole prompt"
                )
            committed = 0  # everything is processed again
        self.cache.commit(row, committed)

    def drop(self, ended: list[int]) -> None:
        """Take ended rows out of the batch; the last active ones move to their places."""
        left = len(self.rows) - len(ended)
        free = [row for row in ended if row < left]
        movers = sorted(set(range(left, left + len(ended))) - set(ended))
        self.cache.move(movers, free, left)
        if free:
            self.ids[free] = self.ids[movers]
        for values in (self.rows, self.lengths, self.pads):
            for source, target in zip(movers, free, strict=True):
                values[target] = values[source]
            del values[left:]
