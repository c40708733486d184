"""Identity: which model a mask file is for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from skipsearch.errors import MaskError
from skipsearch.maskfile import MaskFile, ModelCard
from skipsearch.model.target import Target

NOT_IN_FIRST = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
# Fields that change nothing that a layer computes while decoding, and parts of the names of such fields.
NO_LAYER = {
    *NOT_IN_FIRST, "use_cache", "id2label", "label2id", "num_labels", "problem_type", "return_dict", "auto_map",
    "initializer_range", "initializer_factor", "pretraining_tp", "chunk_size_feed_forward", "task_specific_params",
    "tokenizer_class", "finetuning_task", "router_aux_loss_coef", "custom_pipelines",
}  # fmt: skip
NO_LAYER_PARTS = ("token_id", "dropout", "pdrop", "output_", "_attn_implementation", "summary_")


def model_card(target: Target, model_id: str) -> ModelCard:
    """The identity of a model for mask.json. The fingerprint covers what its config says of layers."""
    config = target.model.config
    return ModelCard(
        id=model_id, revision=getattr(config, "_commit_hash", None), architecture=type(target.model).__name__,
        num_layers=target.num_layers, config_sha256=_sha256(_of_layers(config.to_dict())),
    )  # fmt: skip


def _of_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that decide what layers compute. Empty ones are left out: a newer library adds some to old configs."""
    return {
        name: _of_layers(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value and name not in NO_LAYER and not any(part in name for part in NO_LAYER_PARTS)
    }  # fmt: skip


def _first_fingerprint(config: PreTrainedConfig) -> str:
    """What files held at first: the whole config, but for its path and dtype."""
    return _sha256({k: v for k, v in config.to_dict().items() if k not in NOT_IN_FIRST})


def _sha256(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def check_mask_belongs(file: MaskFile, target: Target) -> None:
    """Check that a mask file was made for this model.

    Raises:
        MaskError: the number of layers or the config fingerprint differs. In a file without a fingerprint, only the
            number of layers is compared.
    """
    card, found = model_card(target, file.model.id), file.model.config_sha256
    if file.model.num_layers != card.num_layers:
        raise MaskError(
            f"model.num_layers of the mask is {file.model.num_layers}, this model has {card.num_layers}; "
            f"use a mask that was searched on this model"
        )
    if found is not None and found not in (card.config_sha256, _first_fingerprint(target.model.config)):
        raise MaskError(
            f"model.config_sha256 of the mask is {found[:12]}... (made for {file.model.id}), "
            f"this model's is {str(card.config_sha256)[:12]}...; search a mask for this model with `skipsearch run`"
        )


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash over a sample of every parameter. Cheap for large models; training changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
