"""Form speed: seconds of one row's products in each form on this machine, to leave out forms that do not pay here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from skipsearch.draft.copies import possible_forms
from skipsearch.draft.forms import quantised, weight_of, why_not
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.plan import QUANTISED, Form, Quantised

SAMPLE = {"cpu": 1.5e8, "cuda": 1e9}  # bytes of weights that are timed: a quarter of them is more than caches hold
MOST = 64  # matrices
ROUNDS = 5
PAYS = 0.87  # seconds of a form over those of the next milder one, below which it is worth its harm


@torch.no_grad()
def form_seconds(target: Target) -> dict[Form, float | str]:
    """Seconds of products of one row with some of the model's weights in each form; or why a form is not possible."""
    linears = _sample(target)
    found: dict[Form, float | str] = {}
    if not linears:
        return {"run": 0.0, **{form: "there are no plain linear layers" for form in QUANTISED}}
    runs: dict[Form, Callable[[], float]] = {"run": _timed(target, linears)}
    for form in QUANTISED:
        why = possible_forms(target.model)[form] or next(
            (why for linear in linears if (why := why_not(_weight(linear), form))), None
        )
        if why is None:
            runs[form] = _timed(target, [quantised(linear, form) for linear in linears])
        else:
            found[form] = why
    rounds: dict[Form, list[float]] = {form: [] for form in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            rounds[name].append(run())
    for name, seconds in rounds.items():
        found[name] = statistics.median(seconds)
    return found


def paying_forms(seconds: dict[Form, float | str]) -> list[Quantised]:
    """The quantised forms that are clearly cheaper than every milder one."""
    kept, last = list[Quantised](), seconds["run"]
    for form in QUANTISED:
        now = seconds.get(form, "")
        if isinstance(now, float) and isinstance(last, float) and now < PAYS * last:
            kept, last = [*kept, form], now
    return kept


def _sample(target: Target) -> list[nn.Module]:
    """Linear layers of one shape, the largest that layers share."""
    by_shape: dict[tuple[int, ...], list[nn.Module]] = {}
    for layer in target.layers:
        for module in layer.modules():
            weight = weight_of(module)
            if weight is not None and weight.device.type != "meta":
                by_shape.setdefault(tuple(weight.shape), []).append(module)
    linears = max(by_shape.values(), key=lambda some: sum(_weight(m).numel() for m in some), default=[])
    size = _weight(linears[0]).numel() * _weight(linears[0]).element_size() if linears else 1
    sample = SAMPLE["cuda" if target.device.type == "cuda" else "cpu"]
    return linears[: max(1, min(MOST, int(sample / size)))]


def _weight(module: nn.Module) -> Tensor:
    weight = weight_of(module)
    assert weight is not None
    return weight


def _timed(target: Target, modules: Sequence[nn.Module]) -> Callable[[], float]:
    """A function that takes the time of one row's products, as the target's backend runs them."""
    weight = _weight(modules[0]) if weight_of(modules[0]) is not None else None
    columns = int(getattr(modules[0], "in_features", 0) or (weight.shape[1] if weight is not None else 0))
    row = torch.ones((1, columns), dtype=target.dtype, device=target.device)
    products: Callable[[], object] = lambda: [module(row) for module in modules]
    if target.compiled is not None:
        products = target.compiled.products(modules, row)

    def run() -> float:
        synchronize(target.device)
        begin = time.perf_counter()
        products()
        synchronize(target.device)
        return time.perf_counter() - begin

    run()
    return run
