"""DraftHead: the head of a draft, quantised, or over some of the tokens alone.

Shapes: N tokens that a draft may choose from, V vocabulary, I hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipsearch.draft.forms import quantised
from skipsearch.plan import HeadForm

NEVER = -1e4
BEST = 8  # tokens that are scored again in full precision


class DraftHead(nn.Module):
    """Logits [.., V]; tokens that a draft may not choose have `NEVER`, whose probability is zero.

    It is finite, so that a processor that allows none of the others leaves a distribution to draw from.

    Of a quantised head the best few are scored again with the model's own weights: the best two are often so near that
    rounding would exchange them.

    Args:
        head: the model's own; its weights are shared, never written.
        form: of the weights.
        ids: tokens to choose from; None: all.
    """

    ids: Tensor | None

    def __init__(self, head: nn.Linear, form: HeadForm, ids: tuple[int, ...] | None) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.register_buffer("ids", None if ids is None else torch.tensor(ids, device=head.weight.device))
        chosen = _rows(head, self.ids)
        self.product = chosen if form == "full" else quantised(chosen, form)
        self.exact = form == "full"

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.device)  # layers may lie on several devices
        logits: Tensor = self.product(hidden)
        if not self.exact:
            best = logits.topk(min(BEST, logits.shape[-1]), -1).indices
            tokens = best if self.ids is None else self.ids[best]
            scores = (self.weight[tokens].float() @ hidden.float()[..., None])[..., 0].to(logits.dtype)
            scores = scores if self.bias is None else scores + self.bias[tokens]
            logits = logits.scatter(-1, best, scores)
        if self.ids is None:
            return logits
        out = logits.new_full((*logits.shape[:-1], len(self.weight)), NEVER)
        return out.index_copy(-1, self.ids, logits)


def _rows(head: nn.Linear, places: Tensor | None) -> nn.Linear:
    """The head with some rows of its weights alone, copied."""
    if places is None:
        return head
    chosen = nn.Linear(head.in_features, len(places), bias=head.bias is not None, device="meta")
    chosen.weight = nn.Parameter(head.weight.detach()[places], requires_grad=False)
    if head.bias is not None:
        chosen.bias = nn.Parameter(head.bias.detach()[places], requires_grad=False)
    return chosen
