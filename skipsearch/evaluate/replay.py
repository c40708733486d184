"""Replay: what speculative decoding with a mask would accept, without decoding.

Greedy output is known in advance (the trace), so a draft that starts behind t committed tokens can be
run over the reference tokens t..t+K in one pass against the reference keys and values: up to its first
mismatch it is the real draft. Promises the accepted counts of real decoding, exactly (in fp32). Knows no
seconds. With a confidence exit, how far a draft goes *beyond* its first mismatch is taken from the
reference tokens too; that decides its cost by a fraction of a token, never what is accepted.

Sampled output too: given that a token x stands in the target's own output, the chance that it came there as an accepted
draft is min(1, draft_probs(x) / target_probs(x)), whose mean over x is sum(min(target_probs, draft_probs)), the
acceptance of speculative sampling. A fixed random number for each token of the trace decides, the same for every mask.

Shapes: P prompts; T positions.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from skipsearch.decoding.rows import rows_may_differ
from skipsearch.evaluate.mask_replay import Lane, MaskReplay
from skipsearch.evaluate.trace import Trace
from skipsearch.mask import SkipMask
from skipsearch.model.cache import layer_windows
from skipsearch.model.sublayers import input_device


def free_memory(device: torch.device) -> float:
    """Bytes that the device has free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not told here
        return 4e9


class Replay:
    """Scores masks on one trace.

    Args:
        model: the target.
        trace: its own continuations.
        max_length: the largest K that a policy may have.
        rows: block starts to run in one pass, at most.
        lanes: parts of each continuation that are walked at once. One is exact; more make fewer and larger passes,
            and a few blocks begin where decoding would not have begun them.
        reference: keys and values of every layer over the trace, with room for a pass behind them, of a model on which
            another replay was `together`; None: they are made by running it.
        memory: bytes that a pass may take beside the reference; None: a quarter of what the device has free.
    """

    def __init__(
        self, model: PreTrainedModel, trace: Trace, max_length: int = 8, rows: int = 128, memory: float | None = None,
        lanes: int = 1, reference: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.trace, self.max_length = model, trace, max_length
        self.lengths = [len(p) + len(c) for p, c in zip(trace.prompts, trace.continuations, strict=True)]
        self.lanes: list[Lane] = []
        self.parts, self.longest = lanes, max(self.lengths)
        self.side = max(2, lanes)  # starts of a prompt in one row, at most
        for p, (prompt, length) in enumerate(zip(trace.prompts, self.lengths, strict=True)):
            first = len(prompt) + 1  # the prefill gives the token before
            cuts = [first + (length - first) * lane // lanes for lane in range(lanes + 1)]
            self.lanes += [Lane(p, a, b) for a, b in itertools.pairwise(cuts) if a < b]
        # Room behind each row, so that a draft near the end has (meaningless) tokens to read.
        self.ids, _ = trace.padded(input_device(model), max_length)
        self.windows = layer_windows(DynamicCache(config=model.config))
        self.temperature = trace.temperature
        # chances [P, T] of acceptance, and the target's own log-probability of each token; with sampling alone
        shape = (len(self.lengths), self.longest + max_length + 1)
        self.chance_PT = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.ids.device)
        self.target_PT = torch.zeros(shape, device=self.ids.device)
        self.scratch: dict[Any, Tensor] = {}
        self.reference = self._reference() if reference is None else reference
        self.together = True
        self.together = reference is not None or (rows_may_differ(model) and self._keys_may_move())
        # Else each start is a pass of its own: slower, and the same.
        self.rows = self._rows(rows, memory) if self.together else 1

    @torch.no_grad()
    def _reference(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [P, H, T, D] of every layer over the whole trace; padding is behind, so unseen."""
        config = self.model.config.get_text_config(decoder=True)
        kept: list[list[tuple[Tensor, Tensor]]] = []
        for first in range(0, len(self.ids), 8):
            cache = Cache(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
            ids = self.ids[first : first + 8, : max(self.lengths)]
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            if self.temperature:
                self.target_PT[first : first + 8, 1 : ids.shape[1]] = self.log_probs(logits[:, :-1], ids[:, 1:])
            kept.append([(layer.keys, layer.values) for layer in cache.layers])
        room = (0, 0, 0, self.side * self.max_length)  # behind each row, for what a pass adds
        return [
            (F.pad(torch.cat([c[i][0] for c in kept]), room), F.pad(torch.cat([c[i][1] for c in kept]), room))
            for i in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def _keys_may_move(self) -> bool:
        """Whether drafts side by side come out as they do alone: not where a key's bias follows from its place."""
        prompt = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        starts = [(prompt, max(1, self.longest - 1 - far)) for far in (2, 0)]
        drafts = MaskReplay(self, SkipMask(num_layers=len(self.reference)))
        try:
            _, at_PQ, logits_PQV = drafts.logits(starts)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model makes nothing of such masks
        alone = self.model(input_ids=self.ids[prompt : prompt + 1, : self.longest], use_cache=False).logits[0].float()
        known = at_PQ < self.longest
        far = (logits_PQV[known].float() - alone[at_PQ[known]]).abs().max()
        half = self.model.dtype in (torch.float16, torch.bfloat16)
        return bool(far <= (0.05 if half else 1e-3) * alone.abs().max())

    def _rows(self, most: int, memory: float | None) -> int:
        """Rows of a pass that fit: each has a copy of its prompt's keys and values in one layer, and its logits."""
        keys, values = max(self.reference, key=lambda pair: pair[0][0].numel() + pair[1][0].numel())
        of_layer = 2 * (keys[0].numel() * keys.element_size() + values[0].numel() * values.element_size())
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        row = of_layer + 4 * 4 * self.max_length * vocabulary
        budget = memory if memory is not None else 0.25 * free_memory(self.ids.device)
        return int(max(1, min(most, budget // row)))

    def log_probs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities [...] of ids [...] under logits [..., V] at the trace's temperature."""
        scores = logits.float() / self.temperature
        return scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(-1)

    def sample(self, count: int = 2) -> list[Lane]:
        """So many lanes of every prompt's, early ones and late ones by turns: a part that looks like the whole."""
        turns = sorted(range(self.parts), key=lambda turn: (turn % 2, turn))[:count]
        numbers = Counter[int]()
        chosen = []
        for lane in self.lanes:
            if (numbers[lane.prompt] + lane.prompt) % self.parts in turns:
                chosen.append(lane)
            numbers[lane.prompt] += 1
        return chosen or self.lanes

    def of(self, mask: SkipMask) -> MaskReplay:
        """The replay of one mask."""
        return MaskReplay(self, mask)
