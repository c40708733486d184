"""Sequences: a batch being decoded, and the two steps of a block, draft and verify.

Promises that greedy output equals plain greedy decoding and that sampled output has the target's own
distribution, row by row. Each row advances by what it accepted. Shapes: B rows, K drafted tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skipsearch.compiled.model import GUESS
from skipsearch.decoding.accept import (
    accept_greedy,
    accept_sampling,
    draft_probabilities,
    draw,
    probabilities,
)  # fmt: skip
from skipsearch.decoding.batch import Batch
from skipsearch.decoding.stats import Block

Stop = Callable[[int, int, float], bool]  # row's place, token, its probability -> does the row's draft end here?
Guess = Callable[[list[int]], list[int]]  # tokens drafted so far -> `GUESS` tokens that may come next, or none


class Sequences(Batch):
    """A batch with the two steps of a block; made like `Batch`."""

    def close(self) -> None:
        """Let go of keys and buffers: the traceback of an error may keep this alive."""
        self.cache.cache.layers.clear()
        if self.compiled is not None:
            self.give_back()

    @torch.no_grad()
    def draft(
        self, limits: list[int], stop: Stop | None = None, guess: Guess | None = None
    ) -> tuple[list[int], Tensor | None]:  # fmt: skip
        """Draft behind each row's last token, at most limits[b] tokens.

        Args:
            stop: called for each drafted token. Without it, nothing waits for the device between tokens.
            guess: for one row decoded greedily through compiled forwards. The draft model reads the guessed tokens in
                one forward, and goes on from the first one that it would have chosen differently.

        Returns:
            how many tokens each row drafted (they lie in `ids`), and with sampling draft_probs [B, K, V].
        """
        assert self.draft_model is not None
        if self.compiled is None or not self.selection.plain_argmax:
            return self._draft_rows(limits, stop)
        guess = guess if self.compiled.guesses(self.draft_stack) else None
        if stop is not None or guess is not None:
            return [self._draft_compiled(limits[0], stop, guess)], None
        start = self.lengths[0] - 1 - self.offset
        self.compiled.draft(self.draft_stack, self.buffers, start, self.lengths[0] - 1, limits[0])
        return list(limits), None

    def _draft_rows(self, limits: list[int], stop: Stop | None) -> tuple[list[int], Tensor | None]:
        """Draft token by token, all rows in one forward."""
        assert self.draft_model is not None
        ends, probs, processors = list(self.lengths), list[Tensor](), self.selection.of_drafts
        wanted = [end + limit for end, limit in zip(ends, limits, strict=True)]
        drafting = [b for b, end in enumerate(ends) if end < wanted[b]]
        # Rows that are done run along on their last token: cheaper than taking their keys out of the batch.
        # Once more than half are done, drafting ends for all: what is drafted by then is verified.
        while drafting and 2 * len(drafting) >= len(ends):
            starts = [end - 1 - self.offset for end in ends]
            scores_BV = self._process(processors, self._forward(self.draft_model, starts, 1, 1)[:, 0], ends)
            token_B, confidence_B = self._choose(scores_BV, probs, stop is not None)
            if len(drafting) == len(ends) == 1:
                self.ids[0, ends[0]] = token_B[0]
            else:
                self.ids[drafting, [ends[b] for b in drafting]] = token_B[drafting]
            for b in drafting:
                ends[b] += 1
            if stop is not None and confidence_B is not None:
                both = torch.stack([token_B.double(), confidence_B.double()])  # one wait for the device
                tokens, confidences = both.tolist()
                drafting = [b for b in drafting if not stop(b, int(tokens[b]), confidences[b])]
            drafting = [b for b in drafting if ends[b] < wanted[b]]
        drafted = [end - length for end, length in zip(ends, self.lengths, strict=True)]
        return drafted, torch.stack(probs, dim=1) if probs else None

    def _choose(self, scores_BV: Tensor, probs: list[Tensor], confident: bool) -> tuple[Tensor, Tensor | None]:
        """The next draft token of each row [B], and if requested its probability [B].

        With sampling, the distribution that the token was drawn from is appended to `probs`.
        """
        sampling = self.selection.sampling
        if sampling is not None:
            probs.append(draft_probabilities(scores_BV))
            return draw(probs[-1], sampling.draft), probs[-1].max(-1).values if confident else None
        token_B = scores_BV.argmax(-1)
        if not confident:
            return token_B, None
        top_B = scores_BV.gather(1, token_B[:, None])[:, 0]
        return token_B, (top_B - scores_BV.float().logsumexp(-1)).exp()

    def _draft_compiled(self, limit: int, stop: Stop | None, guess: Guess | None) -> int:
        """Draft greedily for one row through compiled forwards; returns how many tokens.

        The next forward starts behind the last token that the draft model chose, so wrong guesses are forgotten.
        """
        tokens: list[int] = []
        first, ended = self.lengths[0], False
        while len(tokens) < limit and not ended:
            end = first + len(tokens)
            guessed = guess(tokens) if guess is not None and len(tokens) + GUESS < limit else []
            if guessed:
                self.ids[0, end : end + len(guessed)] = torch.tensor(guessed, device=self.ids.device)
            width = 1 + len(guessed)
            likeliest, confidences = self._compiled(False, end - 1 - self.offset, width, width).top.tolist()
            for j, token in enumerate(map(int, likeliest)):
                tokens.append(token)
                ended = stop is not None and stop(0, token, confidences[j])
                if ended or j == len(guessed) or token != guessed[j]:
                    break
            self.ids[0, first + len(tokens) - 1] = tokens[-1]  # those before it were guessed, and stand there
        return len(tokens)

    @torch.no_grad()
    def verify(self, drafted: list[int], draft_probs_BKV: Tensor | None = None) -> list[Block]:
        """Run the target over what is not yet committed, accept, and append each row's block.

        With nothing drafted this is one step of plain decoding, and the first time it is the prefill.
        """
        rows, k = len(drafted), max(drafted)
        logits_BKV, top_2K = self._target_logits(k)
        if rows == 1 and self.selection.plain_argmax:
            return [self._accept_row(drafted[0], logits_BKV, top_2K)]
        if self.selection.in_order:
            assert rows == 1, "processors that are called in order take one sequence"
            return [self._accept_in_order(drafted[0], logits_BKV, draft_probs_BKV)]
        scores_BKV, processors = logits_BKV, self.selection.processors
        if processors:
            ends = [[length + j for length in self.lengths] for j in range(k + 1)]
            scores_BKV = torch.stack(
                [self._process(processors, logits_BKV[:, j], ends[j]) for j in range(k + 1)], dim=1
            )  # fmt: skip
        draft_ids_BK, drafted_B = self._behind(k), torch.tensor(drafted, device=logits_BKV.device)
        if self.selection.sampling is None:
            n_B, bonus_B = accept_greedy(draft_ids_BK, drafted_B, scores_BKV.argmax(-1))
        else:
            target_probs_BKV = probabilities(scores_BKV)
            if draft_probs_BKV is None:
                draft_probs_BKV = target_probs_BKV[:, :0]
            n_B, bonus_B = accept_sampling(
                target_probs_BKV, draft_probs_BKV, draft_ids_BK, drafted_B, self.selection.sampling.accept
            )
        blocks = []
        for b, (n, bonus, *tokens) in enumerate(torch.cat([n_B[:, None], bonus_B[:, None], draft_ids_BK], 1).tolist()):
            self._commit(b, n)
            blocks.append(
                Block(
                    row=self.rows[b], tokens=[*tokens[:n], bonus], drafted=drafted[b], accepted=n,
                    rejected=tokens[n : drafted[b]], _place=b, _logits_BKV=logits_BKV, _scores_BKV=scores_BKV,
                )
            )  # fmt: skip
        if rows == 1:
            self.ids[0, self.lengths[0] - 1] = bonus_B[0]
        else:
            self.ids[range(rows), [length - 1 for length in self.lengths]] = bonus_B
        return blocks

    def _accept_row(self, drafted: int, logits_BKV: Tensor, top_2K: Tensor | None) -> Block:
        """Greedy acceptance for one row: a single wait for the device, and no kernels for a handful of numbers."""
        first = self.lengths[0]
        likeliest_K = logits_BKV[0].argmax(-1) if top_2K is None else top_2K[0].long()
        target, draft, n = likeliest_K.tolist() if not drafted else [], list[int](), 0
        if drafted:
            both = torch.cat([likeliest_K, self.ids[0, first : first + drafted]]).tolist()
            target, draft = both[: drafted + 1], both[drafted + 1 :]
            n = next((j for j in range(drafted) if draft[j] != target[j]), drafted)
        self._commit(0, n)
        self.ids[0, first + n] = likeliest_K[n]
        return Block(
            row=self.rows[0], tokens=target[: n + 1], drafted=drafted, accepted=n, rejected=draft[n:], _place=0,
            _logits_BKV=logits_BKV, _scores_BKV=logits_BKV,
        )  # fmt: skip

    def _accept_in_order(self, drafted: int, logits_1KV: Tensor, draft_probs_1KV: Tensor | None) -> Block:
        """Acceptance token by token: processors are called once for each token that is committed, and in order."""
        first, sampling, n = self.lengths[0], self.selection.sampling, 0
        draft = self.ids[0, first : first + drafted].tolist()
        scores_1KV = logits_1KV.float().clone()
        while True:
            scores_1V = self._process(self.selection.processors, logits_1KV[:, n], [first + n])
            scores_1KV[:, n] = scores_1V
            if sampling is None:
                token = int(scores_1V.argmax())
            elif n == drafted:
                token = int(draw(probabilities(scores_1V), sampling.accept))
            else:
                assert draft_probs_1KV is not None
                target_12V = probabilities(scores_1V)[:, None].expand(-1, 2, -1)  # the second row is not used
                ids_11, one_1 = self.ids[:1, first + n : first + n + 1], torch.ones(1, device=self.ids.device)
                taken_1, other_1 = accept_sampling(
                    target_12V, draft_probs_1KV[:, n : n + 1], ids_11, one_1, sampling.accept
                )  # fmt: skip
                token = draft[n] if taken_1 else int(other_1)
            if n == drafted or token != draft[n] or token in self.selection.ends:
                break
            n += 1
        self._commit(0, n)
        self.ids[0, first + n] = token
        return Block(
            row=self.rows[0], tokens=[*draft[:n], token], drafted=drafted, accepted=n, rejected=draft[n:], _place=0,
            _logits_BKV=logits_1KV, _scores_BKV=scores_1KV,
        )  # fmt: skip

    def _commit(self, row: int, accepted: int) -> None:
        """Advance a row by its accepted drafts and the bonus token, which the next forward processes.

        Here rejected drafts are forgotten: their slots are not committed (see `model.cache`).
        """
        self.lengths[row] += accepted + 1
        self.cache.commit(row, self.lengths[row] - 1 - self.offset)

    def _behind(self, k: int) -> Tensor:
        """The k tokens [B, k] behind each row's last one."""
        rows, first = len(self.lengths), self.lengths[0]
        if all(length == first for length in self.lengths):
            return self.ids[:rows, first : first + k]
        where = torch.tensor(self.lengths, device=self.ids.device)[:, None] + torch.arange(k, device=self.ids.device)
        return self.ids[:rows].gather(1, where.clamp(max=self.ids.shape[1] - 1))
