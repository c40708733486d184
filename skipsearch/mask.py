"""SkipMask: which attention and MLP sublayers the draft skips. A frozen value, without model, tensor or file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from skipsearch.errors import MaskError, shown

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, Kind] = ("attention", "mlp")
Sublayer = tuple[Kind, int]  # kind and 0-based layer
Ids = frozenset[int]
MOST_LAYERS = 1 << 14  # no model has more; tables of a cell for each layer stay small


def _layer_ids(kind: Kind, ids: Iterable[int], num_layers: int) -> Ids:
    found: set[int] = set()
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise MaskError(f"skip.{kind} must hold whole layer numbers, got {shown(i)}; write them as 0, 1, 2, ...")
        if not 0 <= i < num_layers:
            raise MaskError(
                f"skip.{kind} holds layer {shown(i)}, must be in 0..{num_layers - 1} for a model of {num_layers} "
                f"layers; use a mask made for this model"
            )
        if i in found:
            raise MaskError(f"skip.{kind} holds layer {i} twice; remove one of them")
        found.add(i)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class SkipMask:
    """The sublayers that the draft skips. Each of `num_layers` decoder layers has one attention and one MLP sublayer.

    Args:
        attention: 0-based ids of layers whose attention sublayer is skipped, each at most once.
        mlp: the same for MLP sublayers.
        num_layers: decoder layers of the model, from 1 to `MOST_LAYERS`.

    Raises:
        MaskError: an id is duplicate, out of range or not an integer.
    """

    attention: Ids
    mlp: Ids
    num_layers: int

    def __init__(self, *, attention: Iterable[int] = (), mlp: Iterable[int] = (), num_layers: int) -> None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= MOST_LAYERS:
            raise MaskError(
                f"num_layers must be a whole number from 1 to {MOST_LAYERS}, got {shown(num_layers)}; count the layers"
            )
        object.__setattr__(self, "num_layers", num_layers)
        object.__setattr__(self, "attention", _layer_ids("attention", attention, num_layers))
        object.__setattr__(self, "mlp", _layer_ids("mlp", mlp, num_layers))

    @classmethod
    def from_bits(cls, bits: Iterable[int | bool]) -> SkipMask:
        """A mask from 2L flags: attention 0..L-1, then mlp 0..L-1; nonzero = skipped."""
        flags = [bool(b) for b in bits]
        if len(flags) % 2:
            raise MaskError(f"a mask needs an even number of bits, got {len(flags)}; give attention, then mlp")
        half = len(flags) // 2
        return cls(
            attention=[i for i in range(half) if flags[i]],
            mlp=[i for i in range(half) if flags[half + i]],
            num_layers=half,
        )

    @classmethod
    def from_sublayers(cls, sublayers: Iterable[Sublayer], num_layers: int) -> SkipMask:
        """A mask from (kind, layer) pairs, as `sublayers()` yields them."""
        pairs = list(sublayers)
        for kind, i in pairs:
            if kind not in KINDS:
                raise MaskError(f"sublayer {i} is of kind {kind!r}, must be one of: {', '.join(KINDS)}; correct it")
        return cls(
            attention=[i for kind, i in pairs if kind == "attention"],
            mlp=[i for kind, i in pairs if kind == "mlp"],
            num_layers=num_layers,
        )

    def bits(self) -> tuple[int, ...]:
        """2L flags: attention 0..L-1, then mlp 0..L-1; 1 = skipped."""
        layers = range(self.num_layers)
        return (*(int(i in self.attention) for i in layers), *(int(i in self.mlp) for i in layers))

    def sublayers(self) -> Iterator[Sublayer]:
        """The skipped sublayers in order: attention first, then mlp, each by layer."""
        for kind in KINDS:
            for i in sorted(getattr(self, kind)):
                yield kind, i

    def skips(self, kind: Kind, layer: int) -> bool:
        """Whether this sublayer is skipped."""
        return layer in (self.attention if kind == "attention" else self.mlp)

    def to_dict(self) -> dict[str, Any]:
        """`{"attention": [...], "mlp": [...], "num_layers": L}` with sorted ids."""
        return {"attention": sorted(self.attention), "mlp": sorted(self.mlp), "num_layers": self.num_layers}

    def to_per_layer_config(self) -> dict[str, dict[str, list[str]]]:
        """The mask in the words of transformers: `{"3": {"skip": ["attention"]}, ...}`."""
        skipped = {i: [k for k in KINDS if self.skips(k, i)] for i in range(self.num_layers)}
        return {str(i): {"skip": [str(k) for k in kinds]} for i, kinds in skipped.items() if kinds}

    def _same_model(self, other: SkipMask) -> None:
        if other.num_layers != self.num_layers:
            raise MaskError(
                f"masks of {self.num_layers} and {other.num_layers} layers cannot be combined; use masks of one model"
            )

    def _combined(self, other: SkipMask, operation: Callable[[Ids, Ids], Ids]) -> SkipMask:
        self._same_model(other)
        return SkipMask(
            attention=operation(self.attention, other.attention), mlp=operation(self.mlp, other.mlp),
            num_layers=self.num_layers,
        )  # fmt: skip

    def __or__(self, other: SkipMask) -> SkipMask:
        return self._combined(other, operator.or_)

    def __and__(self, other: SkipMask) -> SkipMask:
        return self._combined(other, operator.and_)

    def __sub__(self, other: SkipMask) -> SkipMask:
        return self._combined(other, operator.sub)

    def __xor__(self, other: SkipMask) -> SkipMask:
        return self._combined(other, operator.xor)

    def __le__(self, other: SkipMask) -> bool:
        self._same_model(other)
        return self.attention <= other.attention and self.mlp <= other.mlp

    def __len__(self) -> int:
        return len(self.attention) + len(self.mlp)

    def __bool__(self) -> bool:
        return len(self) > 0

    def __str__(self) -> str:
        """Two rows of cells, one column for each layer: a full block runs, a dot is skipped."""
        rows = (
            f"{kind:<9} {''.join('·' if self.skips(kind, i) else '█' for i in range(self.num_layers))}"
            f"  {len(getattr(self, kind))} of {self.num_layers} skipped"
            for kind in KINDS
        )
        return "\n".join(rows)
