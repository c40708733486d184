"""`gguf`: the GGUF file of a model without the layers that the draft skips, its blocks as they are; for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipsearch.errors import ExportError
from skipsearch.export.draft import Draft, check_whole_layers, compare_logits
from skipsearch.model.load import load_model

FILE = "draft.gguf"


def check(draft: Draft) -> None:
    """Raises ExportError: a layer is skipped in part, or the model does not come from a GGUF file."""
    check_whole_layers(draft, "gguf")
    if draft.weights.gguf_file is None:
        raise ExportError(
            f"model {draft.name} does not come from a GGUF file; pass one with --model, or convert what --to hf writes"
        )


def write(draft: Draft, folder: Path) -> str:
    """Copy the file without the blocks of skipped layers; returns how it is used."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    source, place = Path(draft.weights.source) / str(draft.weights.gguf_file), _places(draft)
    reader = GGUFReader(source)
    name = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / FILE, name)
    for key, field in reader.fields.items():
        value: Any = field.contents()
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        if key == f"{name}.block_count":
            value = len(draft.kept)
        elif key.startswith(f"{name}.") and isinstance(value, list) and len(value) == draft.mask.num_layers:
            value = [value[i] for i in draft.kept]
        kinds = [*field.types, field.types[-1]]
        writer.add_key_value(key, value, kinds[0], kinds[1] if kinds[0] == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        layer = int(block) if tensor.name.startswith("blk.") else None
        if layer is None or layer in place:
            new = tensor.name if layer is None else f"blk.{place[layer]}.{rest}"
            writer.add_tensor(new, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"llama-server -m {source} -md {folder / FILE} --draft-max {draft.file.draft.max_length}"


def _places(draft: Draft) -> dict[int, int]:
    return {layer: at for at, layer in enumerate(draft.kept)}


def compare(draft: Draft, folder: Path) -> dict[str, Any]:
    """Raises ExportError: what was written has other logits than the draft view, both dequantised."""
    dtype = str(draft.model.dtype).removeprefix("torch.")
    loaded = load_model(str(folder / FILE), dtype=dtype, device=str(draft.loaded.target.device))
    return compare_logits(draft, loaded.model)
