"""The draft that is exported, what formats refuse, and the comparison of what was written with the draft view."""

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
from skipsearch.model.identity import check_mask_belongs
from skipsearch.model.load import Loaded
from skipsearch.model.weights import Weights
from skipsearch.plan import QUANTISED

CHECKED = 16  # random tokens on which logits are compared
ANY = "--to custom-generate holds any plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A mask file with the model that it is for.

    Attributes:
        name: the model as the user named it; `weights`: where it lies.
        trust: whether model code from the hub may run.
    """

    loaded: Loaded
    file: MaskFile
    name: str
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

    def with_kept(self, kept: list[int]) -> PreTrainedModel:
        """The model with these layers alone, in this order; it shares the weights, and still the model's config."""
        target = self.loaded.target
        return with_layers(self.model, target.sublayers.path, [target.layers[i] for i in kept])


def check_belongs(draft: Draft) -> None:
    """Refuse a mask of another model, and one that drafts with the whole model.

    Raises:
        MaskError, ExportError: it is.
    """
    check_mask_belongs(draft.file, draft.loaded.target)
    if not draft.file.plan.drafts and not draft.file.draft.ngram:
        raise ExportError("the mask skips nothing, so its draft is the model itself; export one that skips")


def check_skips(draft: Draft, to: str) -> None:
    """Refuse what no checkpoint holds: quantised copies, smaller heads, nothing at all.

    Raises:
        ExportError: names the first sublayer that does not fit.
    """
    plan = draft.file.plan
    for form in QUANTISED:
        for kind, i in plan.of_form(form):
            raise ExportError(f"{kind} of layer {i} runs in {form}, which {to} cannot hold; {ANY}")
    if not plan.only_skips:
        raise ExportError(f"the head drafts in another form than the model's, which {to} cannot hold; {ANY}")
    if not draft.kept:
        raise ExportError("all layers are skipped, so nothing is left to write; export a mask that keeps some")
    if len(draft.kept) == plan.num_layers and not plan.skip:
        raise ExportError(f"the file serves n-grams without a mask, which {to} cannot hold; {ANY}")


def check_whole_layers(draft: Draft, to: str) -> None:
    """Refuse a mask that skips one sublayer of a layer.

    Raises:
        ExportError: names the first one.
    """
    check_skips(draft, to)
    for kind, i in sorted(draft.mask.sublayers(), key=lambda sublayer: sublayer[1]):
        if i in draft.kept:
            raise ExportError(
                f"{kind} of layer {i} is skipped alone, and {to} takes out whole layers; --to nemotron-nas holds "
                f"sublayers of Llama models, {ANY}"
            )


@torch.no_grad()
def compare_logits(draft: Draft, written: PreTrainedModel) -> dict[str, Any]:
    """Compare the logits of what was loaded back with those of the draft view, on random tokens.

    Raises:
        ExportError: they differ by more than rounding does.
    """
    ids = draft.loaded.target.random_ids(CHECKED)
    wanted, got = _logits(draft_view(draft.model, draft.mask), ids), _logits(written, ids)
    if got.shape != wanted.shape:
        raise ExportError(f"the export loads back with logits of {list(got.shape)}, not {list(wanted.shape)}")
    exact = draft.model.dtype == torch.float32
    difference = float((got - wanted).abs().max())
    same = bool((got.argmax(-1) == wanted.argmax(-1)).all())
    # A near-tie may fall the other way in bf16.
    if not difference <= float(wanted.abs().max()) * (1e-4 if exact else 5e-2) or (exact and not same):
        raise ExportError(
            f"what was written loads back as another draft: its logits differ by {difference:.3g}, so this format "
            f"cannot hold this model; {ANY}"
        )
    return {"tokens": CHECKED, "largest_difference": difference, "same_argmax": same}


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()
