"""`gguf`: the GGUF file of a model without the layers that the draft skips, its blocks as they are; for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from skipsearch.errors import ExportError
from skipsearch.export.draft import Draft
from skipsearch.model.load import load_model

FILE = "draft.gguf"


def write(draft: Draft, folder: Path) -> str:
    """Copy the file without the blocks of skipped layers; returns how it is used.

    Raises:
        ExportError: the model does not come from a GGUF file.
    """
    if draft.weights.gguf_file is None:
        raise ExportError("the model is no GGUF file; pass one with --model, or convert what --to hf writes")
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    source = Path(draft.weights.source) / draft.weights.gguf_file
    place = {f"blk.{layer}.": f"blk.{at}." for at, layer in enumerate(draft.kept)}
    reader = GGUFReader(source)
    name = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / FILE, name)
    for key, field in reader.fields.items():
        value: Any = field.contents()
        if key.startswith("GGUF.") or key == "general.architecture":
            continue  # the writer's own
        if key == f"{name}.block_count":
            value = len(draft.kept)
        elif key.startswith(f"{name}.") and isinstance(value, list) and len(value) == draft.mask.num_layers:
            value = [value[i] for i in draft.kept]
        array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(key, value, field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        block = tensor.name[: tensor.name.find(".", 4) + 1] if tensor.name.startswith("blk.") else ""
        if not block or block in place:
            new = place.get(block, "") + tensor.name.removeprefix(block)
            writer.add_tensor(new, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"llama-server -m {source} -md {folder / FILE} --draft-max {draft.file.draft.max_length}"


def load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The file, dequantised as the model was."""
    dtype = str(draft.model.dtype).removeprefix("torch.")
    return load_model(str(folder / FILE), dtype=dtype, device=str(draft.loaded.target.device)).model
