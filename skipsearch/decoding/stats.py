"""What decoding records: one block of one row, and the raw counts of a run.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from skipsearch.decoding.sources import MASK, PLAIN, SOURCES, TARGET, Part

LETTERS = {name[0]: name for name in (MASK, *SOURCES, TARGET)}  # in a trail


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One draft and one verify of one row.

    Attributes:
        row: which sequence of the batch.
        tokens: the committed tokens: accepted drafts, then the target's own.
        drafted: K of this block.
        accepted: num_accepted, 0..K.
        rejected: the drafted tokens behind those.
    """

    row: int
    tokens: list[int]
    drafted: int
    accepted: int
    _place: int
    _logits_BKV: Tensor
    _scores_BKV: Tensor
    rejected: Sequence[int] = ()

    @property
    def logits_KV(self) -> Tensor:
        """The target's raw logits, a row for each of K + 1 positions."""
        return self._logits_BKV[self._place, : self.drafted + 1]

    @property
    def scores_KV(self) -> Tensor:
        """The same after the logits processors."""
        return self._scores_BKV[self._place, : self.drafted + 1]


@dataclass(slots=True)
class Trail:
    """Where each token of one sequence came from, in the order of decoding.

    Attributes:
        marks: a letter a token, see `LETTERS`: of the source that drafted it, a capital if it was rejected; or the
            target's own.
        rejected: the ids of rejected tokens.
    """

    marks: str = ""
    rejected: list[int] = field(default_factory=list)

    def add(self, block: Block, parts: Sequence[Part]) -> None:
        """Append a block whose draft has these parts."""
        drafted, n = "".join(part.source[0] * part.tokens for part in parts), block.accepted
        self.marks += drafted[:n] + drafted[n : n + len(block.rejected)].upper() + TARGET[0] * (len(block.tokens) - n)
        self.rejected += block.rejected

    @property
    def sources(self) -> list[str]:
        """The source of each committed token, by name."""
        return [LETTERS[mark] for mark in self.marks if mark.islower()]


@dataclass(slots=True, kw_only=True)
class DecodeStats:
    """Raw counts of a run; ratios are made from them last.

    Attributes:
        blocks: how many blocks drafted k tokens and had n of them accepted, by (k, n).
        committed: tokens in the output beyond the prompt.
        accepted_from: accepted tokens, by the source that drafted them ("mask", or a token source).
        blocks_from: blocks, by the source that began their draft ("plain": nothing was drafted).
        lossy: whether the output is not the target's own, by design (joint decoding).
        trails: where the tokens of each row came from; of one run, `add` leaves them out.
    """

    blocks: Counter[tuple[int, int]] = field(default_factory=Counter)
    committed: int = 0
    accepted_from: Counter[str] = field(default_factory=lambda: Counter({MASK: 0, **dict.fromkeys(SOURCES, 0)}))
    blocks_from: Counter[str] = field(default_factory=Counter)
    lossy: bool = False
    trails: dict[int, Trail] = field(default_factory=dict)

    def count(self, block: Block, parts: Sequence[Part], prefill: bool = False) -> None:
        """Add a block whose draft has these parts; of a row of a batch, a part may be longer than its draft.

        Args:
            prefill: count its tokens alone.
        """
        self.committed += len(block.tokens)
        self.trails.setdefault(block.row, Trail()).add(block, parts)
        accepted = block.accepted
        if not prefill:
            self.blocks[block.drafted, accepted] += 1
            self.blocks_from[parts[0].source if parts else PLAIN] += 1
            for part in parts:
                taken = min(accepted, part.tokens)
                self.accepted_from[part.source] += taken
                accepted -= taken

    def add(self, other: DecodeStats) -> None:
        """Add the counts of another run."""
        self.blocks.update(other.blocks)
        self.committed += other.committed
        self.accepted_from.update(other.accepted_from)
        self.blocks_from.update(other.blocks_from)
        self.lossy |= other.lossy

    @property
    def verifies(self) -> int:
        return sum(self.blocks.values())

    @property
    def drafted(self) -> int:
        return sum(k * count for (k, _), count in self.blocks.items())

    @property
    def accepted(self) -> int:
        return sum(n * count for (_, n), count in self.blocks.items())

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, a ratio of sums; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tau(self) -> float:
        """Tokens committed per verify: mean(n) + 1."""
        return self.accepted / self.verifies + 1 if self.verifies else 0.0
