"""Multi-token joint decoding, LOSSY: MTAD (arXiv 2407.09722), and the exact joint decoding that it approximates.

Plain sampling draws one token after the other; joint decoding wants several tokens that are likely together. MTAD lets
a draft model propose beams, and the target accepts the longest prefix that it holds for not much less likely than
the draft does. The output is NOT the target's own: it is likelier under the target, and nothing else is promised.
Exactly: a block's accepted tokens x have target_joint(x) > threshold * draft_joint(x).

Shapes: B beams, V vocabulary, N nodes of the tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from skipsearch.decoding.accept import Sampling, draw, probabilities
from skipsearch.decoding.processors import process
from skipsearch.decoding.stats import Block, DecodeStats
from skipsearch.decoding.tree import Reader, TokenTree
from skipsearch.errors import DecodingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Settings of MTAD.

    Attributes:
        width: beams, at least 1.
        length: tokens of a draft, at least 1.
        threshold: a prefix is accepted if its joint likelihood under the target, over that under the draft, is above
            it; in [0, 1).
    """

    width: int = 4
    length: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            if getattr(self, name) < 1:
                raise DecodingError(f"{name} is {getattr(self, name)}, must be at least 1; try 4")
        if not 0 <= self.threshold < 1:
            raise DecodingError(f"threshold is {self.threshold}, must be at least 0 and below 1; try 0.5")


Scores = Callable[[Tensor, TokenTree, list[int]], Tensor]


def beam_step(joint_B: Tensor, step_BV: Tensor, width: int, generator: torch.Generator | None) -> list[tuple[int, int]]:
    """The next beams, as (beam, token), from joint log-likelihoods and those of the next token.

    A continuation's weight is its joint likelihood (the exponential of a sum of logarithms, normalised once): drawn
    without replacement, or without a generator the likeliest ones.
    """
    joint_BV = joint_B[:, None].double() + step_BV.double()
    weights = joint_BV.flatten().softmax(0)
    count = min(width, int((weights > 0).sum()))
    if generator is None:
        chosen = weights.topk(count).indices
    else:
        chosen = torch.multinomial(weights, count, generator=generator)
    return [divmod(place, step_BV.shape[1]) for place in chosen.tolist()]


def longest_prefix(
    tree: TokenTree, target_joint_N: Tensor, draft_joint_N: Tensor, threshold: float
) -> int:  # fmt: skip
    """The deepest node whose joint likelihood ratio min(1, target / draft) is above the threshold.

    Among equally deep ones the likeliest under the target. The root (nothing accepted) always clears it.
    """
    ratio_N = (target_joint_N - draft_joint_N).clamp(max=0).exp()
    clear = [node for node in range(len(tree)) if node == 0 or float(ratio_N[node]) > threshold]
    return max(clear, key=lambda node: (tree.depths[node], float(target_joint_N[node])))


def check_draft_model(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raise DecodingError if their vocabularies differ in size."""
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise DecodingError(f"draft_model has {sizes[0]} tokens, the model {sizes[1]}; choose one with its tokenizer")


class JointDecoder:
    """One sequence decoded by MTAD.

    Args:
        target, draft: readers; a draft view's shares the target's cache, a separate model's has its own.
        processors: applied to both; "likelihood" is of what they leave.
        sampling: generators; None takes the likeliest beams and tokens.
    """

    def __init__(
        self, target: Reader, draft: Reader, ids: Tensor, settings: Joint, processors: LogitsProcessorList,
        sampling: Sampling | None,
    ) -> None:  # fmt: skip
        self.target, self.draft, self.settings = target, draft, settings
        self.processors, self.sampling = processors, sampling
        self.ids = ids  # [1, T], the last one not yet read
        if any(target.cache.windows) or any(draft.cache.windows):
            raise DecodingError(
                "the model has sliding windows, through which no tree of tokens can be read; decode losslessly"
            )

    @property
    def shared(self) -> bool:
        return self.draft.cache is self.target.cache

    def block(self, length: int) -> tuple[list[int], int, Tensor]:
        """Draft so many tokens, verify, commit; returns the tokens, how many were accepted, and logits behind them."""
        self.target.catch_up(self.ids[:, :-1])
        if not self.shared:
            self.draft.catch_up(self.ids[:, :-1])
        tree, joint, leaves = self._beams(length)
        small, names = tree.of(leaves)
        logits_NV = self.target.read(small)
        scores_NV = self._log_probs(logits_NV, small, list(range(len(small))))
        target_joint = torch.zeros(len(small), dtype=torch.float64)
        for node in range(1, len(small)):
            parent = small.parents[node]
            target_joint[node] = target_joint[parent] + float(scores_NV[parent, small.tokens[node]])
        draft_joint = torch.tensor([joint[name] for name in names], dtype=torch.float64)
        last = longest_prefix(small, target_joint, draft_joint, self.settings.threshold)
        path = small.path(last)
        if self.sampling is None:
            token = int(scores_NV[last].argmax())
        else:
            token = int(draw(scores_NV[last : last + 1].exp(), self.sampling.accept))
        self.target.keep([0, *path])
        if not self.shared:
            read = [names[node] for node in [0, *path]]
            self.draft.keep([node for node in read if node < self._read])
        tokens = [*(small.tokens[node] for node in path), token]
        self.ids = torch.cat([self.ids, torch.tensor([tokens], device=self.ids.device)], 1)
        return tokens, len(path), logits_NV[[0, *path]]

    def _beams(self, length: int) -> tuple[TokenTree, list[float], list[int]]:
        """Draft beams: the tree of all that was looked at, joint log-likelihoods of its nodes, and the beams' ends."""
        tree, joint, beams = TokenTree(int(self.ids[0, -1])), [0.0], [0]
        self._read = 0
        generator = None if self.sampling is None else self.sampling.draft
        for _ in range(length):
            first = self._read
            logits_NV = self.draft.read(tree, first)
            self._read = len(tree)
            step_BV = self._log_probs(logits_NV[[beam - first for beam in beams]], tree, beams)
            joint_B = torch.tensor([joint[beam] for beam in beams], dtype=torch.float64, device=step_BV.device)
            chosen, before = beam_step(joint_B, step_BV, self.settings.width, generator), beams
            beams = []
            for beam, token in chosen:
                beams.append(tree.add(before[beam], token))
                joint.append(joint[before[beam]] + float(step_BV[beam, token]))
        return tree, joint, beams

    def _log_probs(self, logits_NV: Tensor, tree: TokenTree, nodes: list[int]) -> Tensor:
        """Log-probabilities [N, V] behind these nodes, after the processors."""
        if not self.processors:
            return logits_NV.float().log_softmax(-1)
        scores = []
        for logits_V, node in zip(logits_NV, nodes, strict=True):
            path = [[tree.tokens[n] for n in tree.path(node)]]
            prefix = torch.cat([self.ids, torch.tensor(path, dtype=torch.long, device=self.ids.device)], 1)
            scores.append(process(self.processors, [0], prefix, logits_V[None])[0])
        return probabilities(torch.stack(scores)).log()


def decode_jointly(
    decoder: JointDecoder, *, max_length: int, row: int = 0, eos_ids: frozenset[int] = frozenset(),
    should_stop: Callable[[Block, int, Tensor], bool] | None = None, stats: DecodeStats | None = None,
) -> Iterator[Block]:  # fmt: skip
    """Yield block after block until an end-of-sequence token, `should_stop`, or `max_length`; as `loop.decode`."""
    stats = stats if stats is not None else DecodeStats()
    stats.lossy = True
    while (length := decoder.ids.shape[1]) < max_length:
        drafted = min(decoder.settings.length, max_length - length - 1)
        tokens, accepted, logits_NV = decoder.block(drafted)
        block = Block(
            row=row, tokens=tokens, drafted=drafted, accepted=accepted, _place=0, _logits_BKV=logits_NV[None],
            _scores_BKV=logits_NV[None],
        )  # fmt: skip
        end = next(
            (
                i for i, token in enumerate(tokens)
                if token in eos_ids or (should_stop and should_stop(block, i, decoder.ids[:, : length + i + 1]))
            ), None,
        )  # fmt: skip
        if end is not None:
            del block.tokens[end + 1 :]
        stats.count(drafted, accepted, "mask", drafted)
        stats.committed += len(block.tokens)
        yield block
        if end is not None:
            return


@torch.no_grad()
def joint_log_probs(model: PreTrainedModel, ids_1T: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Every continuation of so many tokens [V**length, length] and its log-likelihood: for tiny vocabularies.

    Multi-token joint decoding (MTJD, arXiv 2407.09722, section 3) takes the likeliest.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rows = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)), device=ids_1T.device)
    whole = torch.cat([ids_1T.expand(len(rows), -1), rows], 1)
    logits = model(input_ids=whole).logits[:, ids_1T.shape[1] - 1 : -1].double().log_softmax(-1)
    return rows, logits.gather(-1, rows[..., None])[..., 0].sum(-1)
