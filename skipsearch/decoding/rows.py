"""Whether rows of a batch may have different lengths: tested once per model, not looked up in a list."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from skipsearch.decoding.batch import Layout
from skipsearch.decoding.sequences import Sequences
from skipsearch.model.target import Target

_proven: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()  # by kernel


def rows_may_differ(target: Target) -> bool:
    """Whether a batch can be decoded together; if not, its rows are decoded one after another, and a warning says so.

    Position biases that are made from a two-dimensional mask (ALiBi) and kernels that take no mask fail it.
    """
    model, kernel = target.model, str(target.model.config._attn_implementation)
    proven = _proven.setdefault(model, {})
    if kernel not in proven:
        proven[kernel] = kernel in ("sdpa", "eager") and _try_two_rows(replace(target, compiled=None))
        if not proven[kernel]:
            warnings.warn(
                f"{type(model).__name__} with {kernel} attention cannot hold rows of different lengths in one batch, "
                f"so they are decoded one after another",
                stacklevel=2,
            )
    return proven[kernel]


@torch.no_grad()
def _try_two_rows(target: Target) -> bool:
    """Two sequences, one padded and one cut back, take a block in one batch; each must come out as it does alone."""
    ids = target.random_ids(18).view(2, 9)
    pads, drafted = (0, 3), [1, 0]
    both = Sequences(target, ids, capacity=16, layout=Layout(pads=pads))
    try:
        both.verify([0, 0])
        both.truncate(1, 8)
        starts = list(both.lengths)
        blocks = both.verify(drafted)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False  # the model does not understand such masks
    half = target.dtype in (torch.float16, torch.bfloat16)
    for row, block in enumerate(blocks):
        before = torch.cat([ids[row, pads[row] :], both.ids[row, 9:10]])[: starts[row] - pads[row]]
        tokens = torch.cat([before, both.ids.new_zeros(drafted[row])])
        alone = target.model(input_ids=tokens[None]).logits[0, -(drafted[row] + 1) :].float()
        if not (block.logits_KV.float() - alone).abs().max() <= (0.05 if half else 1e-3) * alone.abs().max():
            return False
    return True
