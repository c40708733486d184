"""State: what a model computes with beside its inputs, to notice when it was changed between two calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformers import PreTrainedConfig, PreTrainedModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
IDLE = "transformers.utils.output_capturing"  # its hooks stay for ever, and do nothing unless outputs are asked for
# These change nothing that is computed.
IGNORED = {"max_seq_len_cached", "_output_capturing_hooks_installed", "_compiled_call_impl"}
SKIPPED = frozenset(vars(nn.Module())) - {"training"} | IGNORED
PLAIN, SMALL = frozenset((bool, int, float, str, type(None))), frozenset((list, tuple, set, dict))


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model at one moment.

    Attributes:
        weights: changes when parameters are moved, converted or replaced; not when they are written to in place.
        code: changes when modules, buffers or functions are replaced, hooks put on or off, or settings switched, those
            of configs too.
        writes: how often parameters were written to in place; 0 if not asked for.
        foreign: what runs beside the code of the modules' classes, in words; None: nothing.
    """

    weights: int
    code: int
    writes: int
    foreign: str | None

    @classmethod
    def of(cls, model: PreTrainedModel, count_writes: bool = False) -> ModelState:
        """The state now. Takes about 1.5 ms for 400 modules."""
        weights = hash(tuple((p.data_ptr(), p.dtype, p.device) for p in model.parameters()))
        parts: list[Any] = [*_hooks_of(vars(every_module), ("_global_forward_hooks", "_global_forward_pre_hooks"))]
        foreign = "every module has a hook" if parts else None
        configs = dict[int, PreTrainedConfig]()  # models read some of their fields in each forward
        for module in model.modules():
            own = module.__dict__
            parts += (type(module), type(module).forward)
            parts += [None if buffer is None else buffer.data_ptr() for buffer in own["_buffers"].values()]
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                hooks = [*_hooks_of(own, HOOKS), *([id(own["forward"])] if "forward" in own else [])]
                foreign = foreign or (_said_of(model, module) if hooks else None)
                parts += hooks
            for key, value in own.items():
                if key not in SKIPPED:
                    kind = type(value)
                    if kind in PLAIN:
                        parts.append((key, value))
                    elif kind in SMALL:  # an adapter's scale, or which adapters are active
                        parts.append((key, _plain(value)))
                    elif isinstance(value, Tensor):
                        parts.append((key, value.data_ptr()))
                    elif isinstance(value, PreTrainedConfig):
                        configs[id(value)] = value
                    elif callable(value) and key != "forward":  # a function in place of a method
                        parts.append((key, id(value)))
        for config in configs.values():
            parts += [(key, value) for key, value in vars(config).items() if type(value) in PLAIN]
        writes = sum(map(writes_to, model.parameters())) if count_writes else 0
        return cls(weights, hash(tuple(parts)), writes, foreign)


def writes_to(weight: Tensor) -> int:
    """How often a tensor was written to in place; 0 for one that does not count them."""
    return 0 if weight.is_inference() else weight._version


def _hooks_of(own: dict[str, Any], names: tuple[str, ...]) -> Iterator[int]:
    for name in names:
        for hook in own.get(name, {}).values():
            if getattr(hook, "__module__", "") != IDLE:
                yield id(hook)


def _said_of(model: nn.Module, module: nn.Module) -> str:
    name = next(name for name, part in model.named_modules() if part is module)
    what = "a forward of its own" if "forward" in vars(module) else "a hook"
    return f"{type(module).__name__} {name or 'the model itself'!r} has {what}"


def _plain(value: Any) -> str | None:
    """A small collection of plain values in words; None for any other."""
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    return repr(value) if len(items) <= 64 and all(type(item) in PLAIN for item in items) else None
