"""The search space: which masks a search may propose, and how a mask is written as parameters of a trial.

A parameter is a name with its lowest and highest whole number; Optuna is not needed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from skipsearch.mask import KINDS, SkipMask, Sublayer

Structure = Literal["sublayers", "layers", "spans"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The masks that a search may propose.

    Attributes:
        num_layers: decoder layers of the model.
        fixed: sublayers that are never skipped.
        structure: "sublayers": one 0/1 parameter for each free sublayer (1 = skipped). "layers": one for each layer
            whose two sublayers are both free, for engines that only skip whole layers. "spans": `spans` runs of
            whole layers, with two parameters each: first layer and length.
        spans: number of runs.
        max_skipped: the most sublayers that a mask may skip; None: no limit.
    """

    num_layers: int
    fixed: SkipMask
    structure: Structure = "sublayers"
    spans: int = 1
    max_skipped: int | None = None

    def __str__(self) -> str:
        """In the words of a [space] table. A study stores it, and names it when another space is used later."""
        fixed = self.fixed
        words = [self.structure, f"fixed attention {sorted(fixed.attention)}", f"fixed mlp {sorted(fixed.mlp)}"]
        if self.structure == "spans":
            words.append(f"spans {self.spans}")
        if self.max_skipped is not None:
            words.append(f"max_skipped {self.max_skipped}")
        return ", ".join(words)

    @property
    def free(self) -> list[Sublayer]:
        """Sublayers that masks of this space may skip."""
        if self.structure == "sublayers":
            return [(kind, i) for kind in KINDS for i in range(self.num_layers) if not self.fixed.skips(kind, i)]
        return [(kind, i) for kind in KINDS for i in self._layers]

    @property
    def _layers(self) -> list[int]:
        """Layers whose two sublayers are both free."""
        return [i for i in range(self.num_layers) if not any(self.fixed.skips(kind, i) for kind in KINDS)]

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """Parameters with their lowest and highest value: "attention.03", "mlp.11", "layer.07", "span.0.first"."""
        if self.structure == "sublayers":
            return {f"{kind}.{i:02d}": (0, 1) for kind, i in self.free}
        if self.structure == "layers":
            return {f"layer.{i:02d}": (0, 1) for i in self._layers}
        longest = self.num_layers if self.max_skipped is None else min(self.max_skipped // 2, self.num_layers)
        bounds = {}
        for number in range(self.spans):
            bounds[f"span.{number}.first"] = (0, self.num_layers - 1)
            bounds[f"span.{number}.length"] = (0, longest)
        return bounds

    def params(self, mask: SkipMask) -> dict[str, int]:
        """A mask as parameters. Sublayers that the space cannot express are not skipped: `mask(params(m)) <= m`."""
        mask = self.mask_within(mask)
        if self.structure == "sublayers":
            return {name: int(mask.skips(*sub)) for name, sub in zip(self.bounds, self.free, strict=True)}
        if self.structure == "layers":
            return {f"layer.{i:02d}": int(mask.skips("attention", i)) for i in self._layers}
        runs: list[tuple[int, int]] = []
        for i in sorted(mask.attention):
            first, length = runs[-1] if runs else (i, 0)
            if first + length == i:
                runs[-1:] = [(first, length + 1)]
            else:
                runs.append((i, 1))
        longest = sorted(runs, key=lambda run: -run[1])[: self.spans]
        longest = sorted(longest) + [(0, 0)] * (self.spans - len(longest))
        params: dict[str, int] = {}
        for number, (first, length) in enumerate(longest):
            params |= {f"span.{number}.first": first, f"span.{number}.length": length}
        return params

    def mask(self, params: Mapping[str, int]) -> SkipMask:
        """Parameters as a mask of the space."""
        if self.structure == "sublayers":
            skipped = [sub for name, sub in zip(self.bounds, self.free, strict=True) if params[name]]
        elif self.structure == "layers":
            skipped = [(kind, i) for kind in KINDS for i in self._layers if params[f"layer.{i:02d}"]]
        else:
            spans = [(params[f"span.{n}.first"], params[f"span.{n}.length"]) for n in range(self.spans)]
            free = set(self._layers)
            # A fixed layer ends a run, or the run would become two, and some engines can skip only one.
            runs = (itertools.takewhile(free.__contains__, range(first, first + length)) for first, length in spans)
            inside = set(itertools.chain.from_iterable(runs))
            skipped = [(kind, i) for kind in KINDS for i in inside]
        return self.mask_within(SkipMask.from_sublayers(skipped, self.num_layers))

    def mask_within(self, mask: SkipMask) -> SkipMask:
        """The mask without fixed sublayers. If it skips too many, some are dropped, evenly over the model's depth."""
        if self.structure != "sublayers":  # drop whole layers
            whole = [i for i in self._layers if all(mask.skips(kind, i) for kind in KINDS)]
            most = None if self.max_skipped is None else self.max_skipped // 2
            kept = whole[:most] if self.structure == "spans" else _evenly(whole, most)
            return SkipMask(attention=kept, mlp=kept, num_layers=self.num_layers)
        skipped = list((mask - self.fixed).sublayers())
        return SkipMask.from_sublayers(_evenly(skipped, self.max_skipped), self.num_layers)


def _evenly(items: list[T], most: int | None) -> list[T]:
    """At most `most` of the items, evenly spaced, so that neither end of the model is preferred."""
    if most is None or len(items) <= most:
        return items
    return [items[(2 * n + 1) * len(items) // (2 * most)] for n in range(most)]
