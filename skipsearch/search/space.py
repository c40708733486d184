"""The search space: which masks a search may propose, and a mask as Optuna parameters and back.

Knows no Optuna: a parameter is a name with its lowest and highest whole number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.preset import Preset, Structure

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The masks of a search.

    Attributes:
        num_layers: decoder layers of the model.
        fixed: sublayers that are never skipped.
        structure: "sublayers": a 0/1 parameter for each free sublayer (1 = skipped). "layers": one for each layer
            that is free with both its sublayers, for engines that take only whole layers. "spans": `spans` runs of
            whole layers, a first layer and a length each.
        spans: how many runs.
        max_skipped: the most sublayers that a mask may skip; None without limit.
    """

    num_layers: int
    fixed: SkipMask
    structure: Structure = "sublayers"
    spans: int = 1
    max_skipped: int | None = None

    @classmethod
    def of(cls, num_layers: int, preset: Preset | None) -> Space:
        if preset is None:
            return cls(num_layers=num_layers, fixed=SkipMask(num_layers=num_layers))
        return cls(
            num_layers=num_layers, fixed=preset.fixed, structure=preset.structure, spans=preset.spans,
            max_skipped=preset.max_skipped,
        )  # fmt: skip

    def __str__(self) -> str:
        """In the words of a [space] table: what a study tells when it was made with another one."""
        words = [
            self.structure,
            f"fixed attention {sorted(self.fixed.attention)}",
            f"fixed mlp {sorted(self.fixed.mlp)}",
        ]
        words += [f"spans {self.spans}"] if self.structure == "spans" else []
        return ", ".join([*words, *([] if self.max_skipped is None else [f"max_skipped {self.max_skipped}"])])

    @property
    def free(self) -> list[Sublayer]:
        """Sublayers that some mask of the space skips."""
        if self.structure == "sublayers":
            return [(kind, i) for kind in KINDS for i in range(self.num_layers) if not self.fixed.skips(kind, i)]
        return [(kind, i) for kind in KINDS for i in self._layers]

    @property
    def _layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if not any(self.fixed.skips(kind, i) for kind in KINDS)]

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """Parameters with their lowest and highest value: "attention.03", "mlp.11", "layer.07", "span.0.first"."""
        if self.structure == "sublayers":
            return {f"{kind}.{i:02d}": (0, 1) for kind, i in self.free}
        if self.structure == "layers":
            return {f"layer.{i:02d}": (0, 1) for i in self._layers}
        last = self.num_layers - 1
        longest = self.num_layers if self.max_skipped is None else max(1, self.max_skipped // 2)
        bounds = {}
        for number in range(self.spans):
            bounds[f"span.{number}.first"] = (0, last)
            bounds[f"span.{number}.length"] = (0, min(longest, self.num_layers))
        return bounds

    def params(self, mask: SkipMask) -> dict[str, int]:
        """A mask as parameters; what the space cannot express is left out, so `mask(params(m))` skips part of m."""
        mask = self.mask_within(mask)
        if self.structure == "sublayers":
            return {name: int(mask.skips(*sub)) for name, sub in zip(self.bounds, self.free, strict=True)}
        whole = [i for i in self._layers if all(mask.skips(kind, i) for kind in KINDS)]
        if self.structure == "layers":
            return {f"layer.{i:02d}": int(i in whole) for i in self._layers}
        runs: list[tuple[int, int]] = []
        for i in whole:
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
            # A fixed layer ends a run: an engine that takes one run could not be served two.
            runs = (itertools.takewhile(free.__contains__, range(first, first + length)) for first, length in spans)
            inside = set(itertools.chain.from_iterable(runs))
            skipped = [(kind, i) for kind in KINDS for i in inside]
        return self.mask_within(SkipMask.from_sublayers(skipped, self.num_layers))

    def mask_within(self, mask: SkipMask) -> SkipMask:
        """The mask without fixed sublayers and, where it skips too many, with an even choice of those it skips."""
        if self.structure != "sublayers":  # whole layers, so that the choice is one among layers
            whole = [i for i in self._layers if all(mask.skips(kind, i) for kind in KINDS)]
            kept = _evenly(whole, None if self.max_skipped is None else self.max_skipped // 2)
            if self.structure == "spans" and len(kept) < len(whole):
                kept = whole[: len(kept)]
            return SkipMask(attention=kept, mlp=kept, num_layers=self.num_layers)
        return SkipMask.from_sublayers(
            _evenly(list((mask - self.fixed).sublayers()), self.max_skipped), mask.num_layers
        )


def _evenly(items: list[T], most: int | None) -> list[T]:
    """At most so many of them, spread evenly: a rule that favours no end of the model."""
    if most is None or len(items) <= most:
        return items
    return [items[(2 * n + 1) * len(items) // (2 * most)] for n in range(most)]
