"""TokenTree: several continuations that share prefixes; Reader: a model that reads them all in one forward.

Each token attends to the committed tokens, its ancestors and itself. A node's keys lie at a slot of its own behind the
committed ones. Keeping a path moves its keys together. Shapes: T slots, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.errors import DecodingError
from skipsearch.model.cache import CACHE, SharedCache
from skipsearch.model.target import Target


class TokenTree:
    """Tokens behind the last committed one, which is node 0.

    Attributes:
        tokens, parents, depths: of each node; parents come before their children.
    """

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """The child of a node with this token; it is made if there is none."""
        key = (parent, token)
        if key not in self._children:
            self._children[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
        return self._children[key]

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to this one; none for the root."""
        nodes: list[int] = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def of(self, leaves: Sequence[int]) -> tuple[TokenTree, list[int]]:
        """The tree of these leaves and their ancestors, and for each of its nodes the number in this tree."""
        found, names = TokenTree(self.tokens[0]), [0]
        for leaf in leaves:
            at = 0
            for node in self.path(leaf):
                at = found.add(at, self.tokens[node])
                if at == len(names):
                    names.append(node)
        return found, names

    def sees(self) -> Tensor:
        """Which nodes [N, N] each node sees: its ancestors and itself."""
        seen_NN = torch.eye(len(self), dtype=torch.bool)
        for node in range(1, len(self)):
            seen_NN[node] |= seen_NN[self.parents[node]]
        return seen_NN


class Reader:
    """A model, or a draft view of it, reading one sequence through a cache.

    Args:
        target: the model.
        cache: holds the keys of `cache.committed[0]` tokens; readers may share it.
        view: a draft view of the model, to read with in its place.

    Raises:
        DecodingError: the model cannot read a tree of tokens.
    """

    def __init__(self, target: Target, cache: SharedCache, view: PreTrainedModel | None = None) -> None:
        self.target, self.cache, self.model = target, cache, view or target.model
        if any(target.attention.windows) or not target.takes_positions:
            why = "sliding windows" if any(target.attention.windows) else "no position_ids"
            raise DecodingError(
                f"{type(target.model).__name__} has {why}, so no tree of tokens can be read; decode losslessly"
            )

    @property
    def committed(self) -> int:
        return self.cache.committed[0]

    @torch.no_grad()
    def catch_up(self, ids_1T: Tensor) -> None:
        """Commit those of these tokens that are not committed yet."""
        missing_1T = ids_1T[:, self.committed :]
        if missing_1T.shape[1]:
            self.cache.seek([self.committed])
            positions_1T = torch.arange(self.committed, ids_1T.shape[1], device=ids_1T.device)[None]
            few = {"logits_to_keep": 1} if self.target.takes_logits_to_keep else {}
            self._forward(missing_1T, positions_1T, None, few)
            self.cache.commit(0, ids_1T.shape[1])

    @torch.no_grad()
    def read(self, tree: TokenTree, first: int = 0) -> Tensor:
        """Logits [N, V] behind the nodes from `first` on; those before it have been read."""
        start, device = self.committed, self.target.device
        depths_N = torch.tensor(tree.depths, device=device)
        ids_1N = torch.tensor([tree.tokens[first:]], device=device)
        position_1N = start + depths_N[None, first:]
        keys_1T = torch.cat([torch.arange(start, device=device), start + depths_N])[None]
        before_NT = torch.ones((len(tree) - first, start), dtype=torch.bool, device=device)
        only_1NT = torch.cat([before_NT, tree.sees()[first:].to(device)], 1)[None]
        self.cache.seek([start + first])
        mask = self.target.attention.masks(position_1N, lambda _window: keys_1T, only_RQK=only_1NT)
        return self._forward(ids_1N, position_1N, mask, {})[0]

    def _forward(self, ids_1N: Tensor, position_1N: Tensor, mask: Any, given: dict[str, Any]) -> Tensor:
        given = {**given, "position_ids": position_1N}
        if mask is not None:
            given = {**given, "attention_mask": mask}
        out = self.model(input_ids=ids_1N, **{CACHE: self.cache.cache}, use_cache=True, **given)
        logits: Tensor = out.logits
        return logits

    def keep(self, nodes: Sequence[int]) -> None:
        """Commit these nodes, a path from the root on, all of which have been read; the other nodes are forgotten."""
        start = self.committed
        wanted = torch.tensor([start + node for node in nodes], dtype=torch.long)
        for layer in self.cache.cache.layers:
            if layer.is_initialized:
                for buffer in layer.buffers:
                    kept = buffer[:, :, wanted.to(buffer.device)]  # a copy: places may overlap
                    buffer[:, :, start : start + len(nodes)] = kept
        self.cache.commit(0, start + len(nodes))
