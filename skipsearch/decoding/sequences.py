"""Sequences: a batch being decoded, and the two steps of a block, draft and verify.

Promises that greedy output equals plain greedy decoding and that sampled output has the target's own
distribution, row by row. Rows advance each by what it accepted. Shapes: B rows, K drafted tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skipsearch.compiled.model import GUESS
from skipsearch.decoding.accept import accept_greedy, accept_sampling, draw, probabilities
from skipsearch.decoding.batch import Batch
from skipsearch.decoding.stats import Block


class Sequences(Batch):
    """A batch with the two steps of a block; made like `Batch`."""

    @torch.no_grad()
    def draft(
        self, limits: list[int], stop: Callable[[int, int, float], bool] | None = None,
        guess: Callable[[list[int]], list[int]] | None = None,
    ) -> tuple[list[int], Tensor | None]:  # fmt: skip
        """Draft with the mask behind each row's last token, at most limits[b] tokens.

        Args:
            stop: asked, with the row's place, the token and its probability, whether the row's draft ends there.
                Without it, nothing waits for the device between tokens.
            guess: of one row decoded greedily through the compiled model: asked, with what is drafted so far, which
                `GUESS` tokens may come next, or none. The draft model reads them in one pass, and goes on from
                where it would have said something else.

        Returns:
            how many tokens each row drafted (they lie in `ids`), and with sampling draft_probs [B, K, V].
        """
        assert self.draft_model is not None
        if self.compiled is not None and self.sampling is None and not self.processors:
            if stop is not None or guess is not None:
                return [self._draft_row(limits[0], stop, guess)], None
            start = self.lengths[0] - 1 - self.offset
            self.compiled.draft(self.draft_layers, self.buffers, start, self.lengths[0] - 1, limits[0])
            return list(limits), None
        ends, probs = list(self.lengths), []
        wanted = [end + limit for end, limit in zip(ends, limits, strict=True)]
        drafting = [b for b, end in enumerate(ends) if end < wanted[b]]
        while drafting and 2 * len(drafting) >= len(ends):
            # Rows that are done run along on their last token: cheaper than taking their keys out of the batch.
            # Once they are the most, they wait for nobody: what is drafted by then is verified.
            starts = [end - 1 - self.offset for end in ends]
            scores_BV = self._process(self._forward(self.draft_model, starts, 1, 1)[:, 0], ends)
            sure_B: Tensor | None = None
            if self.sampling is None:
                token_B = scores_BV.argmax(-1)
                if stop is not None:
                    top_B = scores_BV.gather(1, token_B[:, None])[:, 0]
                    sure_B = (top_B - scores_BV.float().logsumexp(-1)).exp()
            else:
                probs.append(probabilities(scores_BV))
                token_B = draw(probs[-1], self.sampling.draft)
                if stop is not None:
                    sure_B = probs[-1].max(-1).values
            if len(drafting) == len(ends) == 1:
                self.ids[0, ends[0]] = token_B[0]
            else:
                self.ids[drafting, [ends[b] for b in drafting]] = token_B[drafting]
            for b in drafting:
                ends[b] += 1
            if stop is not None:
                assert sure_B is not None
                said = torch.stack([token_B.double(), sure_B.double()]).tolist()  # both at once: one wait
                ended = {b for b in drafting if stop(b, int(said[0][b]), said[1][b])}
                drafting = [b for b in drafting if b not in ended]
            drafting = [b for b in drafting if ends[b] < wanted[b]]
        drafted = [end - length for end, length in zip(ends, self.lengths, strict=True)]
        return drafted, torch.stack(probs, dim=1) if probs else None

    def _draft_row(
        self, limit: int, stop: Callable[[int, int, float], bool] | None,
        guess: Callable[[list[int]], list[int]] | None,
    ) -> int:  # fmt: skip
        """Draft greedily for one row of the compiled model; returns how many tokens."""
        tokens: list[int] = []
        first, ended = self.lengths[0], False
        while len(tokens) < limit and not ended:
            end = first + len(tokens)
            guessed = guess(tokens) if guess is not None and len(tokens) + GUESS < limit else []
            if guessed:
                self.ids[0, end : end + len(guessed)] = torch.tensor(guessed, device=self.ids.device)
            scores = self._compiled(False, end - 1 - self.offset, 1 + len(guessed), 1 + len(guessed))
            said, sure = scores.said.tolist()
            for j, token in enumerate(map(int, said)):
                tokens.append(token)
                ended = stop is not None and stop(0, token, sure[j])
                if ended or j == len(guessed) or token != guessed[j]:
                    break
            self.ids[0, first + len(tokens) - 1] = tokens[-1]  # the others stand there, as they were guessed
        return len(tokens)

    @torch.no_grad()
    def verify(self, drafted: list[int], draft_probs_BKV: Tensor | None = None) -> list[Block]:
        """Run the target over what is not yet committed, accept, and append each row's block.

        With nothing drafted this is one step of plain decoding, and the first time it is the prefill.
        """
        rows, k = len(drafted), max(drafted)
        logits_BKV, said_2K = self._target_logits(k)
        device = logits_BKV.device
        if rows == 1 and self.sampling is None and not self.processors:
            return [self._accept_row(drafted[0], logits_BKV, said_2K)]
        if self.processors:
            ends = [[length + j for length in self.lengths] for j in range(k + 1)]
            scores_BKV = torch.stack([self._process(logits_BKV[:, j], ends[j]) for j in range(k + 1)], dim=1)
        else:
            scores_BKV = logits_BKV
        draft_ids_BK = self._behind(k)
        if self.sampling is None:
            likeliest_BK = scores_BKV.argmax(-1)
            n_B, bonus_B = accept_greedy(draft_ids_BK, torch.tensor(drafted, device=device), likeliest_BK)
        else:
            target_probs_BKV = probabilities(scores_BKV)
            if draft_probs_BKV is None:
                draft_probs_BKV = target_probs_BKV[:, :0]
            n_B, bonus_B = accept_sampling(
                target_probs_BKV, draft_probs_BKV, draft_ids_BK, torch.tensor(drafted, device=device),
                self.sampling.accept,
            )  # fmt: skip
        blocks = []
        for b, (n, bonus, *tokens) in enumerate(torch.cat([n_B[:, None], bonus_B[:, None], draft_ids_BK], 1).tolist()):
            self.lengths[b] += n + 1
            self.cache.committed[b] = self.lengths[b] - 1 - self.offset
            blocks.append(
                Block(
                    row=self.rows[b], tokens=[*tokens[:n], bonus], drafted=drafted[b], accepted=n,
                    _place=b, _logits_BKV=logits_BKV, _scores_BKV=scores_BKV,
                )
            )  # fmt: skip
        if rows == 1:
            self.ids[0, self.lengths[0] - 1] = bonus_B[0]
        else:
            self.ids[range(rows), [length - 1 for length in self.lengths]] = bonus_B
        return blocks

    def _accept_row(self, drafted: int, logits_BKV: Tensor, said_2K: Tensor | None) -> Block:
        """Greedy acceptance for one row: a single wait for the device, and no kernels for a handful of numbers."""
        first = self.lengths[0]
        likeliest_K = logits_BKV[0].argmax(-1) if said_2K is None else said_2K[0].long()
        target = likeliest_K.tolist() if not drafted else None
        if target is None:
            both = torch.cat([likeliest_K, self.ids[0, first : first + drafted]]).tolist()
            target, draft = both[: drafted + 1], both[drafted + 1 :]
            n = next((j for j in range(drafted) if draft[j] != target[j]), drafted)
        else:
            n = 0
        self.lengths[0] = first + n + 1
        self.cache.committed[0] = self.lengths[0] - 1 - self.offset
        self.ids[0, first + n] = likeliest_K[n]
        return Block(
            row=self.rows[0], tokens=target[: n + 1], drafted=drafted, accepted=n, _place=0, _logits_BKV=logits_BKV,
            _scores_BKV=logits_BKV,
        )  # fmt: skip

    def _behind(self, k: int) -> Tensor:
        """The k tokens [B, k] behind each row's last one."""
        rows, first = len(self.lengths), self.lengths[0]
        if all(length == first for length in self.lengths):
            return self.ids[:rows, first : first + k]
        where = torch.tensor(self.lengths, device=self.ids.device)[:, None] + torch.arange(k, device=self.ids.device)
        return self.ids[:rows].gather(1, where.clamp(max=self.ids.shape[1] - 1))
