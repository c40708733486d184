"""What a search prepares: the costs are those of the contexts in the options."""

from __future__ import annotations

import itertools

from conftest import make_tiny
from traces import make_trace

from skipsearch import SkipMask
from skipsearch.evaluate.cost import Costs, Point
from skipsearch.evaluate.objective import score
from skipsearch.evaluate.prompts import Prompts
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.windows import WindowReplay, Windows
from skipsearch.mask import KINDS
from skipsearch.model.space import Space
from skipsearch.model.target import Target
from skipsearch.search.prepare import Prepared


def test_the_requested_context_decides_the_mask() -> None:
    """Prevents --context from being ignored: the best of all masks is different at a long context."""
    model = make_tiny("llama", seed=1)
    for layer in model.model.layers[2:]:  # so that skipping attention is never free
        layer.self_attn.o_proj.weight.data *= 3
    trace = make_trace(model, prompts=8)
    windows, points = Windows(Replay(Target.of(model), trace, 4)), []
    for context, attention in ((8, 0.3), (3000, 20.0)):
        plain = 4 * attention + 4.2
        verify = tuple(plain * (1 + 0.02 * k) for k in range(13))
        points.append(Point(context=context, attention=(attention,) * 4, mlp=(1.0,) * 4, rest=0.2, exit_check=0.0,
                            verify=verify))  # fmt: skip
    found = []
    for contexts in ((8,), (3000,), (8, 3000)):
        point = Prepared(
            prompts=Prompts(calibration=(), held_out=()), trace=trace, identity={}, target=Target.of(model),
            costs=Costs(identity="", points=tuple(points)), space=Space(num_layers=4, fixed=SkipMask(num_layers=4)),
            contexts=contexts, windows=windows,
        ).point  # fmt: skip
        some = [(kind, i) for kind in KINDS for i in (1, 3)]
        masks = (SkipMask.from_sublayers(c, 4) for n in range(1, 5) for c in itertools.combinations(some, n))
        found.append(
            max((score(WindowReplay(windows, mask), point) for mask in masks), key=lambda s: s.tokens_per_second)
        )
    near, far, mixed = found
    assert not near.mask.attention and near.mask.mlp and far.mask.attention
    assert far.tokens_per_second < mixed.tokens_per_second < near.tokens_per_second
