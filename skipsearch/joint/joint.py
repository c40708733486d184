"""Multi-token joint decoding, LOSSY: MTAD (arXiv 2407.09722).

Plain sampling draws one token after the other. Joint decoding looks for several tokens that are likely together. In
MTAD a draft model proposes beams, and the target accepts the longest prefix whose joint likelihood is not much lower
under the target than under the draft. The output is NOT the target's own: it is likelier under the target, and nothing
else is promised.
Exactly: a block's accepted tokens x have target_joint(x) > threshold * draft_joint(x).

Shapes: B beams, V vocabulary, N nodes of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.decoding.accept import draw, probabilities
from skipsearch.decoding.loop import Ending, cut_block
from skipsearch.decoding.processors import TokenSelection, process
from skipsearch.decoding.rows import rows_may_differ
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.sources import MASK, Part
from skipsearch.decoding.stats import Block, DecodeStats
from skipsearch.errors import DecodingError
from skipsearch.joint.tree import Reader, TokenTree
from skipsearch.model.cache import CACHE, SharedCache
from skipsearch.model.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Settings of MTAD.

    Attributes:
        width: beams, at least 1.
        length: tokens of a draft, at least 1.
        threshold: a prefix is accepted if its joint likelihood under the target, over that under the draft, is above
            it; in [0, 1).
        draft_model: a smaller model that drafts in place of the mask's view.
    """

    width: int = 4
    length: int = 4
    threshold: float = 0.5
    draft_model: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            if getattr(self, name) < 1:
                raise DecodingError(f"{name} is {getattr(self, name)}, must be at least 1; try 4")
        if not 0 <= self.threshold < 1:
            raise DecodingError(f"threshold is {self.threshold}, must be at least 0 and below 1; try 0.5")


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


def longest_prefix(tree: TokenTree, target_joint: list[float], draft_joint: list[float], threshold: float) -> int:
    """The deepest node whose joint likelihood ratio min(1, target / draft) is above the threshold.

    Among equally deep ones the likeliest under the target. The root (nothing accepted) always clears it.

    Args:
        target_joint, draft_joint: joint log-likelihoods of each node.
    """
    ratios = [math.exp(min(0.0, a - b)) for a, b in zip(target_joint, draft_joint, strict=True)]
    clear = [node for node in range(len(tree)) if node == 0 or ratios[node] > threshold]
    return max(clear, key=lambda node: (tree.depths[node], target_joint[node]))


def check_draft_model(draft: Target, target: Target) -> None:
    """Raise DecodingError if their vocabularies differ in size, or they lie on different devices."""
    if draft.vocabulary != target.vocabulary:
        raise DecodingError(
            f"draft_model has {draft.vocabulary} tokens, the model {target.vocabulary}; choose one with its tokenizer"
        )
    if draft.device != target.device:
        raise DecodingError(f"draft_model lies on {draft.device}, the model on {target.device}; move one of them")


class JointDecoder:
    """One sequence decoded by MTAD.

    Args:
        target, draft: readers; a draft view's shares the target's cache, a separate model's has its own.
        ids: the prompt [1, T]; `pad` tokens of it are padding, which processors see and models do not.
        settings: of the beams and of acceptance.
        selection: processors, applied to both before likelihoods are taken, and generators; without generators the
            likeliest beams and tokens are chosen.
        row: which one of the batch that the processors were made for.
    """

    def __init__(
        self, target: Reader, draft: Reader, ids: Tensor, settings: Joint, selection: TokenSelection | None = None,
        pad: int = 0, row: int = 0,
    ) -> None:  # fmt: skip
        selection = selection or TokenSelection()
        self.target, self.draft, self.settings = target, draft, settings
        self.processors, self.sampling = selection.processors, selection.sampling
        self.ids, self.pad, self.row = ids, pad, row

    @property
    def readers(self) -> list[Reader]:
        """The readers that own a cache."""
        return [self.target] if self.draft.cache is self.target.cache else [self.target, self.draft]

    def block(self, length: int, eos_ids: frozenset[int] = frozenset()) -> tuple[list[int], int, Tensor, Tensor]:
        """Draft so many tokens, or fewer where a beam ends with one of `eos_ids`, verify, commit.

        Returns:
            the tokens, how many of them were accepted, and the target's logits and scores [N, V] behind each.
        """
        for reader in self.readers:
            reader.catch_up(self.ids[:, self.pad : -1])
        tree, joint, leaves = self._beams(length, eos_ids)
        small, names = tree.of(leaves)
        logits_NV = self.target.read(small)
        scores_NV = self._scores(logits_NV, small, list(range(len(small))))
        logp_NV = probabilities(scores_NV).log()
        parents, tokens = torch.tensor(small.parents[1:]), torch.tensor(small.tokens[1:])
        steps = logp_NV[parents.long(), tokens.long()].tolist()
        target_joint = [0.0]
        for parent, step in zip(small.parents[1:], steps, strict=True):
            target_joint.append(target_joint[parent] + step)
        last = longest_prefix(small, target_joint, [joint[name] for name in names], self.settings.threshold)
        path = [0, *small.path(last)]
        if self.sampling is None:
            token = int(logp_NV[last].argmax())
        else:
            token = int(draw(logp_NV[last : last + 1].exp(), self.sampling.accept))
        self.target.keep(path)
        if self.draft is not self.target and self.draft.cache is not self.target.cache:
            self.draft.keep([names[node] for node in path if names[node] < self._read])
        found = [*(small.tokens[node] for node in path[1:]), token]
        self.ids = torch.cat([self.ids, torch.tensor([found], device=self.ids.device)], 1)
        return found, len(path) - 1, logits_NV[path], scores_NV[path]

    def cut(self, length: int) -> None:
        """Forget all tokens behind the first `length`; the last one left is read again."""
        self.ids = self.ids[:, :length]
        for reader in self.readers:
            reader.cache.commit(0, min(reader.committed, length - self.pad - 1))

    def _beams(self, length: int, eos_ids: frozenset[int]) -> tuple[TokenTree, list[float], list[int]]:
        """Draft beams: the tree of all drafted tokens, its nodes' joint log-likelihoods, each beam's last node."""
        tree, joint, beams, ended = TokenTree(int(self.ids[0, -1])), [0.0], [0], list[int]()
        self._read = 0  # nodes whose keys the draft has
        generator = None if self.sampling is None else self.sampling.draft
        for _ in range(length):
            if not beams:
                break
            first = self._read
            logits_NV = self.draft.read(tree, first)
            self._read = len(tree)
            step_BV = probabilities(self._scores(logits_NV[[beam - first for beam in beams]], tree, beams)).log()
            joint_B = torch.tensor([joint[beam] for beam in beams], dtype=torch.float64, device=step_BV.device)
            width = max(1, self.settings.width - len(ended))
            chosen, before = beam_step(joint_B, step_BV, width, generator), beams
            steps = step_BV[[beam for beam, _ in chosen], [token for _, token in chosen]].tolist()
            added = [tree.add(before[beam], token) for beam, token in chosen]
            ended += [node for node in added if tree.tokens[node] in eos_ids]
            beams = [node for node in added if tree.tokens[node] not in eos_ids]
            joint += [joint[before[beam]] + step for (beam, _), step in zip(chosen, steps, strict=True)]
        return tree, joint, ended + beams

    def _scores(self, logits_NV: Tensor, tree: TokenTree, nodes: list[int]) -> Tensor:
        """Scores [N, V] behind these nodes, after the processors."""
        if not self.processors:
            return logits_NV
        scores = []
        for logits_V, node in zip(logits_NV, nodes, strict=True):
            path = [[tree.tokens[n] for n in tree.path(node)]]
            prefix = torch.cat([self.ids, torch.tensor(path, dtype=torch.long, device=self.ids.device)], 1)
            scores.append(process(self.processors, [self.row], prefix, logits_V[None])[0])
        return torch.stack(scores)


def decode_jointly(decoder: JointDecoder, ending: Ending, stats: DecodeStats | None = None) -> Iterator[Block]:
    """Yield block after block until the sequence ends; as `loop.decode`."""
    stats = stats if stats is not None else DecodeStats()
    stats.lossy, ended = True, False
    while not ended and (length := decoder.ids.shape[1]) < ending.max_length:
        drafted = min(decoder.settings.length, ending.max_length - length - 1)
        tokens, accepted, logits_NV, scores_NV = decoder.block(drafted, ending.eos_ids)
        block = Block(
            row=decoder.row, tokens=tokens, drafted=drafted, accepted=accepted, _place=0,
            _logits_BKV=logits_NV[None], _scores_BKV=scores_NV[None],
        )  # fmt: skip
        last = ending.first_end(block, decoder.ids, length)
        if last is not None:
            ended = True
            decoder.cut(length + last + 1)
            block = cut_block(block, last + 1)
        stats.count(block, [Part(MASK, drafted)])
        yield block


def jointly(sequences: Sequences, settings: Joint, ending: Ending, stats: DecodeStats) -> Iterator[Block]:
    """Decode one row by MTAD, with its draft view or a smaller model as draft.

    Raises:
        DecodingError: keys were given beforehand, or no tree of tokens can be read through one of the models.
    """
    target = sequences.target
    if sequences.offset < 0 or sequences.cache.committed[0]:
        raise DecodingError(f"{CACHE} was given, which joint decoding does not take; pass the whole prompt")
    if not rows_may_differ(target):
        raise DecodingError(f"{type(target.model).__name__} cannot read a tree of tokens; decode losslessly")
    ids = sequences.ids[:1, : sequences.lengths[0]]
    if settings.draft_model is None:
        drafting = Reader(target, sequences.cache, sequences.draft_model)
    else:
        small = Target.of(settings.draft_model)
        check_draft_model(small, target)
        drafting = Reader(small, SharedCache(small, ids.shape[1] + 64))
    reader = Reader(target, sequences.cache)
    decoder = JointDecoder(
        reader, drafting, ids, settings, sequences.selection, sequences.offset, sequences.rows[0]
    )  # fmt: skip
    return decode_jointly(decoder, ending, stats)
