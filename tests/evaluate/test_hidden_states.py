"""Hidden states: layers and sublayers as units make up the model."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny

from skipsearch import SkipMask
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.hidden_states import layer_states, nearest, sublayer_states
from skipsearch.mask import KINDS
from skipsearch.model.target import Target


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_sublayers_as_units_make_up_the_model(family: str) -> None:
    """Prevents halves of layers that compute something else than the layer does, and an idle one from being kept."""
    model = make_tiny(family, seed=1)
    layers = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    for name, weight in layers[2].named_parameters():
        if ("mlp" in name or "ffn" in name) and "norm" not in name:
            weight.data.zero_()
    every = range(4)
    halves = [draft_view(model, SkipMask(**{other: every}, num_layers=4)) for other in reversed(KINDS)]
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    states = layer_states(Target.of(model), ids, torch.ones_like(ids, dtype=torch.bool))
    halved = sublayer_states(Target.of(model), states, halves)
    assert len(halved.units) == 8 and len(halved.hidden) == 9
    assert [torch.equal(a, b) for a, b in zip(halved.hidden[::2], states.hidden, strict=True)] == [True] * 5
    through = torch.stack([halved.hidden[4]] * 3)
    ran = halved.run_all(5, halved.run_all(4, through))
    if family != "gpt_neox":  # there the MLP does not read what attention adds
        torch.testing.assert_close(ran[1], halved.hidden[6])
    chosen = nearest(halved, [True] * 8, 0, 5)
    assert [len(units) for units in chosen] == [0, 1, 2, 3, 4, 5] and chosen[1] == {5}
    assert nearest(halved, [True] * 8, 3, 5) == chosen[3:]
    assert all(3 not in units for units in nearest(halved, [unit != 3 for unit in range(8)], 2, 8))
