"""Trees of tokens: a node reads what its own path alone would read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipsearch.joint.tree import Reader, TokenTree
from skipsearch.model.cache import SharedCache
from skipsearch.model.target import Target


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_a_tree_says_what_its_beams_say_alone(tiny: Any, ids: torch.Tensor, family: str) -> None:
    """Prevents a node from seeing its siblings, a wrong position, and stages that differ from one pass."""
    model: PreTrainedModel = tiny(family)
    tree = TokenTree(int(ids[0, -1]))
    for parent, token in [(0, 5), (0, 6), (1, 7), (2, 7), (3, 8), (1, 9)]:
        tree.add(parent, token)
    reader = Reader(Target.of(model), SharedCache(Target.of(model), 40))
    reader.catch_up(ids[:, :-1])
    logits_NV = reader.read(tree)
    for node in range(len(tree)):
        path = torch.tensor([[tree.tokens[n] for n in tree.path(node)]], dtype=torch.long)
        alone = model(input_ids=torch.cat([ids, path], 1)).logits[0, -1]
        torch.testing.assert_close(logits_NV[node], alone, atol=2e-4, rtol=1e-3)
    again = Reader(Target.of(model), SharedCache(Target.of(model), 40))
    again.catch_up(ids[:, :-1])
    part = TokenTree(int(ids[0, -1]))
    seen = 0
    got = []
    for parent, token in [(0, 5), (0, 6), (1, 7), (2, 7), (3, 8), (1, 9)]:
        if parent >= seen:
            got.append(again.read(part, seen))
            seen = len(part)
        part.add(parent, token)
    got.append(again.read(part, seen))
    torch.testing.assert_close(torch.cat(got), logits_NV, atol=2e-4, rtol=1e-3)


def test_a_kept_path_is_as_if_it_had_been_read_in_order(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents keys of rejected siblings from staying under the kept ones."""
    model = tiny("llama")
    reader = Reader(Target.of(model), SharedCache(Target.of(model), 40))
    reader.catch_up(ids[:, :-1])
    tree = TokenTree(int(ids[0, -1]))
    tree.add(0, 5)
    b = tree.add(0, 6)
    c = tree.add(b, 7)
    reader.read(tree)
    reader.keep([0, b, c])
    after = reader.read(TokenTree(8))[0]
    alone = model(input_ids=torch.cat([ids, torch.tensor([[6, 7, 8]])], 1)).logits[0, -1]
    torch.testing.assert_close(after, alone, atol=2e-4, rtol=1e-3)
