"""The draft that is exported, what checkpoints cannot hold, and the comparison with the draft view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.draft.view import draft_view, with_layers
from skipsearch.errors import ExportError
from skipsearch.mask import KINDS, SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.load import Loaded
from skipsearch.model.weights import Weights
from skipsearch.plan import QUANTISED

CHECKED = 16  # random tokens on which logits are compared
ANY = "--to custom-generate holds any plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A mask file with the model that it is for, where that lies, and whether its own code may run."""

    loaded: Loaded
    file: MaskFile
    weights: Weights
    trust: bool = False

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def mask(self) -> SkipMask:
        return self.file.mask

    @property
    def kept(self) -> list[int]:
        """The layers of which something runs."""
        return [i for i in range(self.mask.num_layers) if not all(self.mask.skips(kind, i) for kind in KINDS)]

    def with_layers(self, kept: list[int]) -> PreTrainedModel:
        """The model with these layers alone, in this order; it shares the weights and the config."""
        target = self.loaded.target
        return with_layers(self.model, target.sublayers.path, [target.layers[i] for i in kept])


def check_skips(draft: Draft, to: str, whole: bool) -> None:
    """Refuse what a checkpoint cannot hold: other forms than skipping, no layer, and with `whole` parts of layers.

    Raises:
        ExportError: names the first sublayer that does not fit.
    """
    plan = draft.file.plan
    for kind, i in (sublayer for form in QUANTISED for sublayer in plan.of_form(form)):
        raise ExportError(f"{kind} of layer {i} drafts in {plan.form(kind, i)}, which {to} cannot hold; {ANY}")
    if not plan.only_skips:
        raise ExportError(f"the draft has a head of its own, which {to} cannot hold; {ANY}")
    if not plan.skip:
        raise ExportError(f"the file serves n-grams without a mask, which {to} cannot hold; {ANY}")
    if not draft.kept:
        raise ExportError("all layers are skipped, so nothing is left to write; export a mask that keeps some")
    for kind, i in sorted(plan.skip.sublayers(), key=lambda sublayer: sublayer[1]):
        if whole and i in draft.kept:
            raise ExportError(
                f"{kind} of layer {i} is skipped alone, and {to} takes out whole layers; of models like Llama --to "
                f"nemotron-nas holds sublayers, {ANY}"
            )


@torch.no_grad()
def compare_logits(draft: Draft, written: PreTrainedModel) -> dict[str, Any]:
    """Compare what was loaded back with the draft view on random tokens.

    Raises:
        ExportError: the logits differ by more than rounding does.
    """
    ids = draft.loaded.target.random_ids(CHECKED)
    wanted, got = _logits(draft_view(draft.model, draft.mask), ids), _logits(written, ids)
    exact = draft.model.dtype == torch.float32  # else near-ties may fall the other way
    difference = float((got - wanted).abs().max())
    same = torch.equal(got.argmax(-1), wanted.argmax(-1))
    if not difference <= float(wanted.abs().max()) * (1e-4 if exact else 5e-2) or (exact and not same):
        raise ExportError(
            f"what was written loads back as another draft, logits differ by {difference:.3g}: the format cannot hold "
            f"these layers of {type(draft.model).__name__}; {ANY}"
        )
    return {"tokens": CHECKED, "largest_difference": difference, "same_argmax": same}


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()
