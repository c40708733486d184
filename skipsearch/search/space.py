"""The search space: which sublayers may be skipped, and a mask as Optuna parameters and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skipsearch.mask import KINDS, Kind, SkipMask
from skipsearch.model.preset import Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Free sublayers, a 0/1 integer parameter each (1 = skipped).

    Attributes:
        num_layers: decoder layers of the model.
        fixed: sublayers that are never skipped.
    """

    num_layers: int
    fixed: SkipMask

    @classmethod
    def of(cls, num_layers: int, preset: Preset | None) -> Space:
        return cls(num_layers=num_layers, fixed=preset.fixed if preset else SkipMask(num_layers=num_layers))

    @property
    def free(self) -> list[tuple[Kind, int]]:
        return [(kind, i) for kind in KINDS for i in range(self.num_layers) if not self.fixed.skips(kind, i)]

    @property
    def names(self) -> list[str]:
        """Parameter names, one for each free sublayer: "attention.03", "mlp.11"."""
        return [f"{kind}.{i:02d}" for kind, i in self.free]

    def params(self, mask: SkipMask) -> dict[str, int]:
        """A mask as parameters; what it skips among fixed sublayers is left out."""
        return {name: int(mask.skips(*sub)) for name, sub in zip(self.names, self.free, strict=True)}

    def mask(self, params: Mapping[str, int]) -> SkipMask:
        """Parameters as a mask."""
        chosen = [sub for name, sub in zip(self.names, self.free, strict=True) if params[name]]
        return SkipMask.from_sublayers(chosen, self.num_layers)
